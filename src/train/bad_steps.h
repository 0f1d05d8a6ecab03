// Steps that went wrong: whose gradient is not finite, or far larger than usual. Their update is left out on the device; here
// is decided what counts as far larger, and when leaving out is not enough.
#pragma once

#include <cstdint>
#include <deque>
#include <span>
#include <string>
#include <vector>

#include "src/train/checkpoint_manifest.h"
#include "src/train/programs.h"

namespace attamba {

class BadSteps {
 public:
  struct Settings {
    double spike_factor = 0;                 ///< a norm above this many running medians is a spike; 0: none is
    std::int64_t skips_before_rollback = 3;  ///< so many skipped steps in a row call for a rollback
    std::int64_t rollbacks = 2;              ///< so many in a row, without a good checkpoint in between; then the run fails
  };
  enum class Verdict : std::uint8_t { good, skipped, roll_back };

  explicit BadSteps(const Settings& settings) : settings_(settings) {}

  /// The largest gradient norm that the next step may have, 0 for any finite one. A function of the norms of the steps before,
  /// which are the same bits on all ranks.
  double norm_limit() const;
  /// What the step came to. `roll_back` also when no rollback is left: ask `may_roll_back`.
  Verdict judge(const StepResult& result);
  std::int64_t skipped_in_a_row() const { return skipped_in_a_row_; }

  bool may_roll_back() const { return rollbacks_ < settings_.rollbacks; }
  /// The run has gone back to this state.
  void rolled_back(const TrainingState& state);
  /// A checkpoint was saved after good steps: the run has got over what went wrong.
  void recovered() { rollbacks_ = 0; }
  std::int64_t rollbacks() const { return rollbacks_; }

  /// What a checkpoint holds of all this, so that a resumed run decides as an uninterrupted one.
  void store(TrainingState& state) const;
  void restore(const TrainingState& state);

  /// Norms that the median is taken of, and how many there must be for it to mean something.
  static constexpr std::size_t kWindow = 64, kEnough = 16;

 private:
  Settings settings_;
  std::deque<double> norms_;
  std::int64_t skipped_in_a_row_ = 0, rollbacks_ = 0;
};

/// "not finite" or "a spike", for messages.
std::string_view describe_bad(const StepResult& result);

/// Not 0, and the same number on two ranks exactly if the step came to the same loss and norm on both, bit for bit.
std::int64_t fingerprint(const StepResult& result);

/// Throws Error that names the ranks whose fingerprint of `step` is not that of most, or all groups of ranks where no
/// fingerprint is that of most.
void require_agreement(std::span<const RankNews> news, std::int64_t step);

}  // namespace attamba
