// Validation: the mean loss over a data set's windows, and what follows from it.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>

#include "comm/communicator.h"
#include "data/dataset.h"
#include "src/train/programs.h"

namespace attamba {

/// Losses are in nats. Word perplexity and bits per byte take the data set's whole text as denominator, in proportion to the
/// tokens that were predicted.
struct EvaluationResult {
  double loss = 0;          ///< mean over predicted tokens
  std::int64_t tokens = 0;  ///< predicted
  double words = 0;         ///< of text they stand for
  double bytes = 0;
  double perplexity() const;
  double word_perplexity() const;
  double bits_per_byte() const;
};

class Evaluator {
 public:
  /// Evaluates on the first `windows` windows of n tokens (0: all), micro_batch at a time, shared over ranks.
  Evaluator(Dataset dataset, BatchShape micro_batch, std::int64_t windows, Communicator& communicator);

  /// What a caller hears of, where it wants to.
  struct Hooks {
    /// Before each micro-batch is read, by all ranks together, also those that have none left. Must answer alike on all; when
    /// it is true, evaluation ends without a result.
    std::function<bool()> stop = {};
    std::function<void()> computing = {};  ///< a micro-batch has been read, and is computed now
  };

  /// Collective; the same result on every rank, whatever their number.
  std::optional<EvaluationResult> run(ModelPrograms& programs, const Hooks& hooks) const;
  const Dataset& dataset() const { return dataset_; }
  std::int64_t windows() const { return windows_; }

 private:
  Dataset dataset_;
  BatchShape micro_batch_;
  std::int64_t windows_;
  Communicator& communicator_;
};

}  // namespace attamba
