#include "src/models/inputs.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <set>

#include "src/core/error.h"

namespace attamba {

namespace {

/// Rotation angles position * theta^(-2i/d), computed in double.
template <class A>
void fill_rope(std::span<A> table, std::int64_t n, std::int64_t d, double theta) {
  for (std::int64_t t = 0; t < n; ++t) {
    for (std::int64_t i = 0; i < d / 2; ++i) {
      const double angle = static_cast<double>(t) * std::pow(theta, -2.0 * static_cast<double>(i) / static_cast<double>(d));
      table[static_cast<std::size_t>(t * d + 2 * i)] = static_cast<A>(std::cos(angle));
      table[static_cast<std::size_t>(t * d + 2 * i + 1)] = static_cast<A>(std::sin(angle));
    }
  }
}

void fill_table(const ChunkTable& table, const ModelConfig& config, const ChunkingStrategy* chunking, std::int64_t layer,
                const BatchLayout& layout) {
  if (chunking != nullptr) {
    // The released code's window has one token more.
    const std::int64_t leading = config.chunking.leading_tokens;
    fill_chunk_table(table, *chunking, layer, leading + (config.released() && leading > 0 ? 1 : 0), layout);
  } else {
    fill_causal_table(table, config.sliding_window, layout);
  }
}

/// The first layer of each table.
std::vector<std::int64_t> layers_of_tables(const ModelConfig& config, const ChunkingStrategy* chunking) {
  std::vector<std::int64_t> layers;
  std::set<std::string> names;
  for (std::int64_t layer = 0; layer < config.n_layers; ++layer) {
    if (names.insert(table_name(chunking, layer)).second) {
      layers.push_back(layer);
    }
  }
  return layers;
}

constexpr std::size_t kMostTableParts = 6;

/// Suffixes of a table's leaves, in the order of ChunkTable's members.
std::span<const char* const> table_parts(const ModelConfig& config) {
  static constexpr std::array<const char*, kMostTableParts> kParts{".ends",        ".key_begin", ".key_end",
                                                                   ".local_begin", ".starts",    ".labels"};
  return std::span(kParts).first(config.released() ? kMostTableParts : kMostTableParts - 1);
}

}  // namespace

std::string table_name(const ChunkingStrategy* chunking, std::int64_t layer) {
  return chunking == nullptr ? "keys" : concat("chunks.", chunking->layer_class(layer));
}

double expected_keys(const ModelConfig& config, const ChunkingStrategy* chunking, std::int64_t layer, std::int64_t n) {
  std::vector<std::int32_t> memory(static_cast<std::size_t>(5 * n));
  const auto part = [&](std::size_t i) {
    return std::span(memory).subspan(i * static_cast<std::size_t>(n), static_cast<std::size_t>(n));
  };
  const ChunkTable table{.ends = part(0), .key_begin = part(1), .key_end = part(2), .local_begin = part(3), .starts = part(4)};
  fill_table(table, config, chunking, layer, {.sequences = 1, .length = n});
  return average_keys(table);
}

std::vector<Storage::Entry> batch_leaves(const ModelConfig& config, const ChunkingStrategy* chunking, std::int64_t sequences,
                                         std::int64_t n, DType dtype) {
  const TensorType rows{DType::int32, {sequences * n}};
  std::vector<Storage::Entry> leaves{{kTokensLeaf, rows},
                                     {kTargetsLeaf, rows},
                                     {kPositionsLeaf, rows},
                                     {kRopeLeaf, {accumulator_of(dtype), {n, config.head_width()}}}};
  for (const std::int64_t layer : layers_of_tables(config, chunking)) {
    for (const char* part : table_parts(config)) {
      leaves.push_back({table_name(chunking, layer) + part, rows});
    }
  }
  return leaves;
}

BatchWriter::BatchWriter(Storage& storage, const ModelConfig& config, const ChunkingStrategy* chunking, std::int64_t sequences,
                         std::int64_t n, DType dtype)
    : storage_(storage), config_(config), chunking_(chunking), sequences_(sequences), length_(n) {
  for (const auto& [name, type] : batch_leaves(config, chunking, sequences, n, dtype)) {
    storage.get(name, type);
  }
  tokens_ = leaf(kTokensLeaf);
  targets_ = leaf(kTargetsLeaf);
  positions_ = leaf(kPositionsLeaf);
  table_leaves_.push_back(kPositionsLeaf);
  const Tensor rope = storage.mirror(kRopeLeaf);
  if (rope.dtype() == DType::float64) {
    fill_rope(rope.span<double>(), n, config.head_width(), config.rope_theta);
  } else {
    fill_rope(rope.span<float>(), n, config.head_width(), config.rope_theta);
  }
  storage.upload(kRopeLeaf);
  layer_of_table_ = layers_of_tables(config, chunking);
  for (const std::int64_t layer : layer_of_table_) {
    std::array<std::span<std::int32_t>, kMostTableParts> parts;
    for (std::size_t i = 0; i < table_parts(config).size(); ++i) {
      table_leaves_.push_back(table_name(chunking, layer) + table_parts(config)[i]);
      parts[i] = leaf(table_leaves_.back());
    }
    tables_.push_back({.ends = parts[0],
                       .key_begin = parts[1],
                       .key_end = parts[2],
                       .local_begin = parts[3],
                       .starts = parts[4],
                       .labels = parts[5]});
  }
  fill_tables({.sequences = sequences, .length = n});
}

void BatchWriter::fill_tables(const BatchLayout& layout) {
  for (std::size_t i = 0; i < tables_.size(); ++i) {
    fill_table(tables_[i], config_, chunking_, layer_of_table_[i], layout);
  }
  for (std::int64_t row = 0; row < sequences_ * length_; ++row) {
    const auto at = static_cast<std::size_t>(row);
    const std::int32_t start = layout.document_starts.empty() ? 0 : layout.document_starts[at];
    positions_[at] = static_cast<std::int32_t>(row % length_) - start;
  }
  for (const std::string& name : table_leaves_) {
    storage_.upload(name);
  }
}

void BatchWriter::write(std::span<const std::int32_t> windows, std::span<const std::int32_t> document_starts,
                        std::span<const std::int64_t> samples, std::uint64_t seed, std::int64_t step, std::int64_t used) {
  const auto n = static_cast<std::size_t>(length_);
  require(windows.size() == static_cast<std::size_t>(sequences_) * (n + 1), "batch: ", windows.size(), " tokens for ",
          sequences_, " windows of ", n + 1);
  runtime(storage_.device()).wait_for_copies();  // of the last batch
  for (std::size_t s = 0; s < static_cast<std::size_t>(sequences_); ++s) {
    const auto window = windows.subspan(s * (n + 1), n + 1);
    std::copy_n(window.begin(), n, tokens_.begin() + static_cast<std::ptrdiff_t>(s * n));
    std::copy_n(window.begin() + 1, n, targets_.begin() + static_cast<std::ptrdiff_t>(s * n));
  }
  if (used >= 0) {
    std::fill(targets_.begin() + static_cast<std::ptrdiff_t>(used) * length_, targets_.end(), -1);
  }
  storage_.upload(kTokensLeaf);
  storage_.upload(kTargetsLeaf);
  const bool masked = config_.document_mask && !document_starts.empty();
  // Without documents, tables made for the documents of an earlier batch are wrong too.
  if (masked || filled_for_documents_ || (chunking_ != nullptr && chunking_->varies())) {
    fill_tables({.sequences = sequences_,
                 .length = length_,
                 .document_starts = masked ? document_starts : std::span<const std::int32_t>{},
                 .samples = samples,
                 .seed = seed,
                 .step = step});
    filled_for_documents_ = masked;
  }
}

}  // namespace attamba
