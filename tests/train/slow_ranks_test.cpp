// Which ranks are called slow: made-up times, and times that ranks on a busy machine really had.
#include "src/train/slow_ranks.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <sstream>
#include <string>

#include "src/core/error.h"
#include "src/core/random.h"

namespace attamba {
namespace {

TEST(SlowRanks, ARankThatTakesTwiceAsLongIsNamedOnceAndAgainAfterItRecovered) {
  SlowRanks slow;
  RandomStream random(4);
  std::vector<int> named;
  for (int step = 0; step < 300; ++step) {
    std::vector<double> seconds(8);
    for (double& s : seconds) {
      s = 0.1 * std::exp(0.1 * random.normal());
    }
    const bool is_slow = (step >= 50 && step < 120) || step >= 200;
    seconds[5] *= is_slow ? 2 : 1;
    for (const SlowRanks::Slow& found : slow.observe(seconds, 1)) {
      named.push_back(step);
      EXPECT_EQ(found.rank, 5);
      EXPECT_NEAR(found.ratio, 2, 0.5);
    }
  }
  ASSERT_EQ(named.size(), 2u);
  EXPECT_LT(named[0], 50 + 20);
  EXPECT_LT(named[1], 200 + 20);
}

TEST(SlowRanks, SingleSlowStepsAndRanksWithoutWorkDoNotMatter) {
  SlowRanks slow;
  for (int step = 0; step < 200; ++step) {
    const std::vector<double> seconds{0.1, step % 5 == 0 ? 3 : 0.1, 0.12, 0};
    EXPECT_TRUE(slow.observe(seconds, 1).empty()) << step;
  }
  SlowRanks alone;
  for (int step = 0; step < 50; ++step) {
    EXPECT_TRUE(alone.observe(std::vector<double>{0.1 + step}, 1).empty());
  }
}

TEST(SlowRanks, ShortStepsCountTogether) {
  SlowRanks slow;
  std::size_t named = 0;
  int step = 0;
  for (; step < 1000 && named == 0; ++step) {  // 5.1 ms each, 20 of them count as one
    named += slow.observe(std::vector<double>{1e-3, 1e-3, step % 20 < 4 ? 9e-3 : 1.1e-3}, 0.0051).size();
  }
  EXPECT_GE(step, 20 * static_cast<int>(SlowRanks::kWindow)) << "slow for a moment again and again adds up, in its time";
  EXPECT_EQ(named, 1u);
}

/// Microseconds per step and rank; an empty line begins another run.
std::vector<std::vector<std::vector<double>>> recorded_runs() {
  std::ifstream in(ATTAMBA_SOURCE_DIR "/tests/train/recorded_step_times.txt");
  std::vector<std::vector<std::vector<double>>> runs(1);
  for (std::string line; std::getline(in, line);) {
    std::istringstream words(line);
    std::vector<double> step;
    for (double microseconds = 0; words >> microseconds;) {
      step.push_back(1e-6 * microseconds);
    }
    if (line.empty()) {
      runs.emplace_back();
    } else if (line[0] != '#') {
      runs.back().push_back(step);
    }
  }
  return runs;
}

TEST(SlowRanks, RecordedTimesGiveFewFalseAlarmsAndEverySlowRankIsFound) {
  constexpr std::size_t kSteps = 20;  // within which a slow rank must be named
  int pieces = 0, false_alarms = 0, slow = 0, found = 0;
  for (const auto& run : recorded_runs()) {
    for (std::size_t first = 0; first + kSteps <= run.size(); first += kSteps) {
      const auto names = [&](std::size_t rank, double factor) {
        SlowRanks judge;
        bool named = false;
        for (std::size_t i = first; i < first + kSteps; ++i) {
          std::vector<double> seconds = run[i];
          seconds[rank] *= factor;
          for (const SlowRanks::Slow& one : judge.observe(seconds, 1)) {
            named = named || one.rank == static_cast<int>(rank);
          }
        }
        return named;
      };
      for (std::size_t rank = 0; rank < run[first].size(); ++rank) {
        ++pieces;
        false_alarms += names(rank, 1) ? 1 : 0;
        ++slow;
        found += names(rank, 2) ? 1 : 0;
      }
    }
  }
  std::cout << false_alarms << " false alarms and " << found << " slow ranks found in " << pieces << " pieces of " << kSteps
            << " steps\n";
  ASSERT_GT(pieces, 300);
  EXPECT_LE(false_alarms, pieces / 100);
  EXPECT_GE(found, slow * 99 / 100);
}

}  // namespace
}  // namespace attamba
