// Finding ranks that compute slower than the others, step after step.
#pragma once

#include <cstdint>
#include <deque>
#include <span>
#include <string>
#include <vector>

namespace attamba {

/// A rank's time, without waiting for others, is divided by the median of the other ranks' in the same step. A rank is slow
/// when the median of that ratio over the last kWindow steps is above kRatio: single slow steps, of which every machine has
/// some, do not matter, and a rank that has become slow is found within kWindow steps.
class SlowRanks {
 public:
  struct Slow {
    int rank = 0;
    double ratio = 0;    ///< of its time to the others', the median of the last steps
    double seconds = 0;  ///< its time, the median
    double others = 0;   ///< theirs
  };
  static constexpr std::size_t kWindow = 12;
  static constexpr double kRatio = 1.5;
  /// Shorter steps count together until they are so long: what an operating system does to a rank for a moment is no news.
  static constexpr double kShortest = 0.1;

  /// Seconds that each rank computed in a step, per piece of work (0 of a rank that had none), and that the step took. Returns
  /// ranks that have become slow with this step; one is named again only after it was as fast as the others for a while.
  std::vector<Slow> observe(std::span<const double> seconds, double step);

 private:
  struct History {
    std::deque<double> ratios, seconds;
    bool named = false;
  };
  std::vector<Slow> judge(std::span<const double> seconds);

  std::vector<History> ranks_;
  std::vector<double> gathered_;  ///< of steps that count together
  double gathered_time_ = 0;
};

}  // namespace attamba
