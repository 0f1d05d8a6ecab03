// Training samples: which window a global sample index means, and a thread that reads ahead.
//
// All of the loader's state is one integer, the global index of the next sample: which source, which epoch and which window a
// sample is follow from its index, the seed and the data sets' fingerprints, never from the number of ranks or shards.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "data/dataset.h"

namespace attamba {

struct WeightedSource {
  Dataset dataset;
  double weight = 1.0;  ///< share of the samples, relative to the other sources' weights
};

struct LoaderConfig {
  std::vector<WeightedSource> sources;
  std::int64_t n = 0;  ///< tokens of a window that are predicted; n + 1 are read
  std::uint64_t seed = 0;
};

/// A sample: window `window` of source `source`, in that source's epoch `epoch`.
struct Sample {
  std::size_t source = 0;
  std::uint64_t epoch = 0;
  std::uint64_t window = 0;
  friend bool operator==(const Sample&, const Sample&) = default;
};

/// Maps global sample indices to windows: a pure function. Sources are interleaved so that after any number of samples each has
/// had its share (within one sample per level of a binary tree over the sources); each walks through its own epochs in full,
/// every window once per epoch, in an order of its own.
class SampleSource {
 public:
  explicit SampleSource(LoaderConfig config);

  Sample sample(std::uint64_t global_index) const;
  /// Reads the n + 1 tokens of a sample, and for each of its first n where its document begins, counted from the window's
  /// start.
  void read(const Sample& sample, std::span<std::int32_t> tokens, std::span<std::int32_t> document_starts) const;

  /// "sample 17: window 5 in /data/train/shard-00001.h5".
  std::string describe(std::uint64_t global_index) const;

  std::uint64_t window_count(std::size_t source) const { return window_counts_[source]; }
  /// Over all sources: the length of an epoch of a single source, and a natural unit for several.
  std::uint64_t window_count() const;
  std::int32_t vocabulary_size() const { return config_.sources.front().dataset.vocabulary_size(); }
  const LoaderConfig& config() const { return config_; }
  /// Of everything but the position: sources, weights, n and seed. A checkpoint stores it beside the next sample's index, and
  /// a resumed run that finds another one would read other samples.
  const std::string& fingerprint() const { return fingerprint_; }

 private:
  LoaderConfig config_;
  std::vector<std::uint64_t> window_counts_;
  std::vector<std::uint64_t> shares_;  ///< prefix sums of integer weights, sources + 1 of them
  std::string fingerprint_;
};

struct Batch {
  std::uint64_t micro_batch = 0;
  std::vector<std::uint64_t> sample_indices;  ///< [b]; empty: the plan has ended
  std::vector<std::int32_t> tokens;           ///< [b, n + 1]
  std::vector<std::int32_t> document_starts;  ///< [b, n]
};

/// The global sample indices of one micro-batch of this rank; an empty list ends the stream.
using BatchPlan = std::function<std::vector<std::uint64_t>(std::uint64_t micro_batch)>;

/// Reads micro-batches `first`, `first` + 1, ... of a plan ahead of use, in a thread of its own.
class Loader {
 public:
  /// At most `depth` batches wait. The plan is called from the loader's thread.
  Loader(SampleSource source, BatchPlan plan, std::size_t depth, std::uint64_t first = 0);
  ~Loader();
  Loader(const Loader&) = delete;
  Loader& operator=(const Loader&) = delete;

  /// Waits until next() has something to say without waiting, for so long at most; false when it has not.
  bool wait(double seconds);
  /// The next batch; waits for it when it is not there yet. Rethrows what stopped the thread, each time it is called again.
  Batch next();
  /// The next batch, if it is there.
  std::optional<Batch> take();
  /// What the thread is reading, for messages; empty when it reads nothing.
  std::string reading() const;
  /// Reads no more. Returns whether the thread has ended, after waiting for that for so long at most; a destructor waits for
  /// ever, also for a file server that does not answer.
  bool stop(double seconds);
  /// Seconds that next() and wait() have spent waiting, in all.
  double wait_seconds() const { return wait_seconds_; }
  const SampleSource& source() const { return source_; }

 private:
  static constexpr std::uint64_t kNothing = ~std::uint64_t{0};
  void run(const std::stop_token& stop, std::uint64_t micro_batch);
  void read_ahead(const std::stop_token& stop, std::uint64_t micro_batch);
  Batch read(std::uint64_t micro_batch);
  Batch take_first();

  SampleSource source_;
  BatchPlan plan_;
  std::size_t depth_;
  std::mutex mutex_;
  std::condition_variable_any changed_;
  std::deque<Batch> ready_;
  std::exception_ptr error_;
  bool ended_ = false, finished_ = false;
  std::atomic<std::uint64_t> reading_ = kNothing;  ///< index of a sample
  double wait_seconds_ = 0;
  std::jthread thread_;  ///< last: it uses all of the above
};

}  // namespace attamba
