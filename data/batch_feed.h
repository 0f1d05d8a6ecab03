// A rank's batches, step by step: which samples they are, and what has been read of them.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "data/loader.h"

namespace attamba {

/// Which micro-batches of each step a rank computes: rank r of N takes r, r + N, ...  No rank count needs to divide anything.
struct MicroBatchShare {
  std::int64_t per_step = 1;  ///< micro-batches of a step over all ranks
  std::int64_t rank = 0, ranks = 1;

  /// Replays of a step, the last one of which closes it, with a micro-batch or without. All ranks make as many.
  std::int64_t rounds() const { return (per_step + ranks - 1) / ranks; }
  std::int64_t count() const { return rank < per_step ? (per_step - rank + ranks - 1) / ranks : 0; }
  /// Number within the step of this rank's j-th one.
  std::int64_t micro_batch(std::int64_t j) const { return rank + j * ranks; }
};

/// Reads the batches of a rank's steps ahead of use.
class BatchFeed {
 public:
  struct Settings {
    MicroBatchShare share;
    std::int64_t micro_batch = 1;               ///< samples
    std::int64_t first_step = 0, end_step = 0;  ///< steps of the run
    std::int64_t passed_over = 0;               ///< steps' worth of samples that are left out before `first_step`
    std::int64_t depth = 1;                     ///< batches that may wait

    /// The global indices of the samples of this rank's k-th micro-batch from first_step on; none after the last step.
    std::vector<std::uint64_t> samples(std::uint64_t k) const;
  };

  /// A rank that computes no micro-batches reads nothing.
  BatchFeed(const SampleSource& source, const Settings& settings);
  /// A thread that waits for a file server which does not answer is left to the end of the process.
  ~BatchFeed();
  BatchFeed(const BatchFeed&) = delete;
  BatchFeed& operator=(const BatchFeed&) = delete;

  /// Waits until next() has something to say without waiting, for so long at most; false when it has not.
  bool wait(double seconds);
  /// The next batch, which stays until it is called again. Waits for it; throws what stopped the reading.
  const Batch& next();
  /// The batch that next() will return, if it has been read; else null.
  const Batch* peek();

  /// What is being read, for messages; empty when nothing is.
  std::string reading() const { return loader_ ? loader_->reading() : std::string(); }
  double wait_seconds() const { return loader_ ? loader_->wait_seconds() : 0; }

 private:
  std::unique_ptr<Loader> loader_;
  std::optional<Batch> ahead_;
  Batch current_;
};

}  // namespace attamba
