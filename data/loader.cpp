#include "data/loader.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <utility>

#include "data/sample_order.h"
#include "data/sha256.h"
#include "src/core/error.h"

namespace attamba {
namespace {

/// Weights become integers out of this many, so that sharing out samples is exact arithmetic.
constexpr double kShareUnit = 0x1p32;

/// Of the first `samples` samples of a node, how many go to its left part: floor((samples left + total / 2) / total). It grows
/// by 0 or 1 per sample, so it is also the left part's own count.
std::uint64_t left_count(std::uint64_t samples, std::uint64_t left, std::uint64_t total) {
  return static_cast<std::uint64_t>((static_cast<unsigned __int128>(samples) * left + total / 2) / total);
}

std::string hexadecimal(double value) {
  char text[40];
  std::snprintf(text, sizeof(text), "%a", value);
  return text;
}

}  // namespace

SampleSource::SampleSource(LoaderConfig config) : config_(std::move(config)) {
  require<UsageError>(!config_.sources.empty(), "loader: there is no data set");
  require<UsageError>(config_.n > 0, "loader: windows need at least one token, got ", config_.n);
  double total = 0;
  for (const auto& [dataset, weight] : config_.sources) {
    require<UsageError>(std::isfinite(weight) && weight > 0, "loader: the weight of '", dataset.folder().string(), "' is ",
                        weight, "; weights are positive numbers");
    total += weight;
  }
  std::string content = concat("loader n ", config_.n, " seed ", config_.seed, '\n');
  shares_.push_back(0);
  const Dataset& first = config_.sources.front().dataset;
  for (const auto& [dataset, weight] : config_.sources) {
    require(dataset.tokenizer_hash() == first.tokenizer_hash(), "loader: data set '", dataset.folder().string(),
            "' (first shard '", dataset.manifest().shards.front().file, "') was made with another tokenizer than '",
            first.folder().string(), "'");
    window_counts_.push_back(dataset.window_count(static_cast<std::uint64_t>(config_.n)));
    require(window_counts_.back() > 0, "loader: data set '", dataset.folder().string(), "' has ", dataset.token_count(),
            " tokens, fewer than one window of ", config_.n + 1);
    shares_.push_back(shares_.back() + std::max<std::uint64_t>(1, std::llround(weight / total * kShareUnit)));
    content += concat(dataset.fingerprint(), ' ', config_.sources.size() == 1 ? "1" : hexadecimal(weight), '\n');
  }
  fingerprint_ = sha256(content).substr(0, 32);
}

Sample SampleSource::sample(std::uint64_t global_index) const {
  // Down a binary tree over the sources; at each node the index becomes the index among the chosen part's own samples.
  std::size_t begin = 0;
  std::size_t end = config_.sources.size();
  std::uint64_t index = global_index;
  while (end - begin > 1) {
    const std::size_t middle = begin + (end - begin) / 2;
    const std::uint64_t left = shares_[middle] - shares_[begin];
    const std::uint64_t total = shares_[end] - shares_[begin];
    const std::uint64_t before = left_count(index, left, total);
    if (left_count(index + 1, left, total) > before) {
      index = before;
      end = middle;
    } else {
      index -= before;
      begin = middle;
    }
  }
  const std::uint64_t count = window_counts_[begin];
  const std::uint64_t epoch = index / count;
  // Sources of one seed must not share an order, nor neighbouring seeds: the odd multiplier spreads both.
  const std::uint64_t seed = config_.seed + begin * 0x9e3779b97f4a7c15u;
  return {.source = begin, .epoch = epoch, .window = permuted(index % count, count, seed, epoch)};
}

void SampleSource::read(const Sample& sample, std::span<std::int32_t> tokens, std::span<std::int32_t> document_starts) const {
  const Dataset& dataset = config_.sources[sample.source].dataset;
  const std::uint64_t begin = sample.window * static_cast<std::uint64_t>(config_.n);
  dataset.read_tokens(begin, tokens);
  dataset.fill_document_starts(begin, document_starts);
}

std::string SampleSource::describe(std::uint64_t global_index) const {
  const Sample found = sample(global_index);
  const Dataset& dataset = config_.sources[found.source].dataset;
  const auto first_token = found.window * static_cast<std::uint64_t>(config_.n);
  return concat("sample ", global_index, ": window ", found.window, " in ", dataset.shard_path(first_token).string());
}

std::uint64_t SampleSource::window_count() const {
  std::uint64_t sum = 0;
  for (const std::uint64_t count : window_counts_) {
    sum += count;
  }
  return sum;
}

Loader::Loader(SampleSource source, BatchPlan plan, std::size_t depth, std::uint64_t first)
    : source_(std::move(source)), plan_(std::move(plan)), depth_(std::max<std::size_t>(depth, 1)) {
  thread_ = std::jthread([this, first](const std::stop_token& stop) { run(stop, first); });
}

Loader::~Loader() = default;

Batch Loader::read(std::uint64_t micro_batch) {
  const auto n = static_cast<std::size_t>(source_.config().n);
  Batch batch{.micro_batch = micro_batch, .sample_indices = plan_(micro_batch), .tokens = {}, .document_starts = {}};
  const std::size_t size = batch.sample_indices.size();
  batch.tokens.resize(size * (n + 1));
  batch.document_starts.resize(size * n);
  for (std::size_t i = 0; i < size; ++i) {
    reading_ = batch.sample_indices[i];
    source_.read(source_.sample(batch.sample_indices[i]), std::span(batch.tokens).subspan(i * (n + 1), n + 1),
                 std::span(batch.document_starts).subspan(i * n, n));
  }
  reading_ = kNothing;
  return batch;
}

void Loader::run(const std::stop_token& stop, std::uint64_t micro_batch) {
  std::exception_ptr error;
  try {
    read_ahead(stop, micro_batch);
  } catch (...) {
    error = std::current_exception();
  }
  const std::scoped_lock lock(mutex_);
  error_ = error;
  finished_ = true;
  changed_.notify_all();
}

void Loader::read_ahead(const std::stop_token& stop, std::uint64_t micro_batch) {
  for (bool ended = false; !ended && !stop.stop_requested(); ++micro_batch) {
    Batch batch = read(micro_batch);
    ended = batch.sample_indices.empty();
    std::unique_lock lock(mutex_);
    if (!changed_.wait(lock, stop, [&] { return ready_.size() < depth_; })) {
      return;
    }
    if (!ended) {
      ready_.push_back(std::move(batch));
    }
    ended_ = ended;
    changed_.notify_all();
  }
}

std::string Loader::reading() const {
  const std::uint64_t index = reading_;
  return index == kNothing ? std::string() : source_.describe(index);
}

bool Loader::stop(double seconds) {
  thread_.request_stop();
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return finished_; });
}

bool Loader::wait(double seconds) {
  std::unique_lock lock(mutex_);
  const auto answers = [&] { return !ready_.empty() || error_ || ended_; };
  if (answers()) {
    return true;
  }
  const auto begin = std::chrono::steady_clock::now();
  const bool answered = changed_.wait_for(lock, std::chrono::duration<double>(seconds), answers);
  wait_seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return answered;
}

Batch Loader::next() {
  std::unique_lock lock(mutex_);
  if (ready_.empty() && !error_ && !ended_) {
    const auto begin = std::chrono::steady_clock::now();
    changed_.wait(lock, [&] { return !ready_.empty() || error_ || ended_; });
    wait_seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }
  // Batches read before the error are still good.
  if (ready_.empty()) {
    if (error_) {
      std::rethrow_exception(error_);
    }
    return {};
  }
  return take_first();
}

std::optional<Batch> Loader::take() {
  const std::lock_guard lock(mutex_);
  return ready_.empty() ? std::nullopt : std::optional(take_first());
}

/// Called with the lock held.
Batch Loader::take_first() {
  Batch batch = std::move(ready_.front());
  ready_.pop_front();
  changed_.notify_all();
  return batch;
}

}  // namespace attamba
