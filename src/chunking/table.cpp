#include "src/chunking/table.h"

#include <algorithm>

#include "src/core/error.h"

namespace attamba {

namespace {

/// Calls body(document, first_row, length) for each document of sequence s.
template <class Body>
void for_each_document(const BatchLayout& layout, std::int64_t s, const Body& body) {
  const std::int64_t n = layout.length, base = s * n;
  std::int64_t document = 0;
  for (std::int64_t begin = 0; begin < n; ++document) {
    std::int64_t end = n;
    if (!layout.document_starts.empty()) {
      const std::int32_t start = layout.document_starts[static_cast<std::size_t>(base + begin)];
      end = begin + 1;
      while (end < n && layout.document_starts[static_cast<std::size_t>(base + end)] == start) {
        ++end;
      }
    }
    body(document, base + begin, end - begin);
    begin = end;
  }
}

std::int32_t row(std::int64_t value) {
  return static_cast<std::int32_t>(value);
}

/// The rows of one document, given its chunk ends (positions in the document) and the index at which they stand in table.ends.
void fill_document(const ChunkTable& table, std::span<const std::int32_t> ends, std::int64_t first_index,
                   std::int64_t first_row, std::int64_t length, std::int64_t leading, bool full_attention) {
  std::size_t chunk = 0, visible = 0;
  std::int64_t chunk_start = 0;
  for (std::int64_t t = 0; t < length; ++t) {
    const std::int64_t window = full_attention ? 0 : leading == 0 ? chunk_start : std::max<std::int64_t>(0, t - leading + 1);
    while (visible < ends.size() && ends[visible] < window) {
      ++visible;
    }
    const auto at = static_cast<std::size_t>(first_row + t);
    table.key_begin[at] = row(first_index);
    table.key_end[at] = row(first_index + static_cast<std::int64_t>(visible));
    table.local_begin[at] = row(first_row + window);
    table.starts[at] = row(first_row + chunk_start);
    if (!table.labels.empty()) {
      table.labels[at] = row(t - chunk_start);
    }
    if (chunk < ends.size() && ends[chunk] == t) {
      chunk_start = t + 1;
      ++chunk;
    }
  }
}

}  // namespace

void fill_chunk_table(const ChunkTable& table, const ChunkingStrategy& strategy, std::int64_t layer, std::int64_t leading,
                      const BatchLayout& layout) {
  require<UsageError>(leading >= 0, "chunking: leading_tokens is ", leading, ", must not be negative");
  std::vector<std::int32_t> ends;
  for (std::int64_t s = 0; s < layout.sequences; ++s) {
    std::int64_t next_index = s * layout.length;
    for_each_document(layout, s, [&](std::int64_t document, std::int64_t first_row, std::int64_t length) {
      ends.clear();
      strategy.ends({.length = length,
                     .layer = layer,
                     .seed = layout.seed,
                     .step = layout.step,
                     .sample = layout.samples.empty() ? s : layout.samples[static_cast<std::size_t>(s)],
                     .document = document},
                    ends);
      for (std::size_t j = 0; j < ends.size(); ++j) {
        table.ends[static_cast<std::size_t>(next_index) + j] = row(first_row + ends[j]);
      }
      fill_document(table, ends, next_index, first_row, length, leading, strategy.full_attention());
      next_index += static_cast<std::int64_t>(ends.size());
    });
  }
}

void fill_causal_table(const ChunkTable& table, std::int64_t window, const BatchLayout& layout) {
  for (std::int64_t s = 0; s < layout.sequences; ++s) {
    for_each_document(layout, s, [&](std::int64_t, std::int64_t first_row, std::int64_t length) {
      for (std::int64_t t = 0; t < length; ++t) {
        const auto at = static_cast<std::size_t>(first_row + t);
        table.ends[at] = table.key_begin[at] = table.key_end[at] = row(s * layout.length);
        table.local_begin[at] = row(first_row + (window > 0 ? std::max<std::int64_t>(0, t - window + 1) : 0));
        table.starts[at] = row(first_row);
      }
    });
  }
}

double average_keys(const ChunkTable& table) {
  double sum = 0;
  for (std::size_t t = 0; t < table.local_begin.size(); ++t) {
    sum += table.key_end[t] - table.key_begin[t] + (static_cast<double>(t) - table.local_begin[t] + 1);
  }
  return table.local_begin.empty() ? 0 : sum / static_cast<double>(table.local_begin.size());
}

}  // namespace attamba
