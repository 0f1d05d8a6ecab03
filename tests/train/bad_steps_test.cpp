// What counts as a bad step, and when the run goes back.
#include "src/train/bad_steps.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "src/core/error.h"
#include "src/core/random.h"

namespace attamba {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

StepResult good(double norm) {
  return {.loss = 2, .gradient_norm = norm, .learning_rate = 1e-3, .skipped = false, .news = {}};
}
StepResult bad(double norm = kNaN) {
  return {.loss = 2, .gradient_norm = norm, .learning_rate = 1e-3, .skipped = true, .news = {}};
}

TEST(BadSteps, NormsAreLimitedByTheMedianOfTheLastGoodSteps) {
  BadSteps steps({.spike_factor = 10});
  for (std::size_t i = 0; i < BadSteps::kEnough; ++i) {
    EXPECT_EQ(steps.norm_limit(), 0) << "the median of " << i << " norms means nothing yet";
    steps.judge(good(i % 2 == 0 ? 1 : 3));
  }
  EXPECT_EQ(steps.norm_limit(), 20);
  steps.judge(bad(1e9));
  EXPECT_EQ(steps.norm_limit(), 20) << "a skipped step's norm is none of the usual ones";
  for (std::size_t i = 0; i < BadSteps::kWindow; ++i) {
    steps.judge(good(0.5));
  }
  EXPECT_EQ(steps.norm_limit(), 5) << "old norms are forgotten";
  BadSteps off({.spike_factor = 0});
  for (int i = 0; i < 100; ++i) {
    off.judge(good(1));
  }
  EXPECT_EQ(off.norm_limit(), 0);
}

TEST(BadSteps, AResumedRunHasTheLimitOfAnUninterruptedOne) {
  RandomStream random(3);
  BadSteps whole({.spike_factor = 4}), resumed({.spike_factor = 4});
  whole.rolled_back({});
  for (int i = 0; i < 100; ++i) {
    whole.judge(good(0.1 + random.uniform()));
  }
  EXPECT_GT(whole.norm_limit(), 0);
  whole.judge(bad());
  TrainingState state;
  whole.store(state);
  resumed.restore(state);
  EXPECT_EQ(resumed.norm_limit(), whole.norm_limit());
  EXPECT_EQ(resumed.skipped_in_a_row(), 1);
  EXPECT_EQ(resumed.rollbacks(), 1);
}

TEST(BadSteps, SkipsInARowCallForARollbackAndRollbacksEnd) {
  BadSteps steps({.spike_factor = 0, .skips_before_rollback = 3, .rollbacks = 2});
  EXPECT_EQ(steps.judge(bad()), BadSteps::Verdict::skipped);
  EXPECT_EQ(steps.judge(bad()), BadSteps::Verdict::skipped);
  EXPECT_EQ(steps.judge(good(1)), BadSteps::Verdict::good);
  for (int rollback = 0; rollback < 2; ++rollback) {
    EXPECT_TRUE(steps.may_roll_back());
    EXPECT_EQ(steps.judge(bad()), BadSteps::Verdict::skipped);
    EXPECT_EQ(steps.judge(bad()), BadSteps::Verdict::skipped);
    EXPECT_EQ(steps.judge(bad()), BadSteps::Verdict::roll_back);
    steps.rolled_back(TrainingState());
    EXPECT_EQ(steps.skipped_in_a_row(), 0);
  }
  EXPECT_FALSE(steps.may_roll_back());
  steps.recovered();
  EXPECT_TRUE(steps.may_roll_back());
  EXPECT_FALSE(BadSteps({.rollbacks = 0}).may_roll_back());
}

TEST(BadSteps, FingerprintsTellResultsApartToTheLastBit) {
  const StepResult one = good(0.75);
  EXPECT_NE(fingerprint(one), 0);
  EXPECT_EQ(fingerprint(one), fingerprint(good(0.75)));
  EXPECT_NE(fingerprint(one), fingerprint(good(std::nextafter(0.75, 1))));
  StepResult other = one;
  other.loss = std::nextafter(one.loss, 3);
  EXPECT_NE(fingerprint(one), fingerprint(other));
  EXPECT_NE(fingerprint(one), fingerprint(bad(0.75)));
  EXPECT_EQ(fingerprint(bad(kNaN)), fingerprint(bad(-kNaN))) << "NaNs differ between machines and mean the same";
}

TEST(BadSteps, ARankThatCameToAnotherResultIsNamed) {
  std::vector<RankNews> news(4);
  EXPECT_NO_THROW(require_agreement(news, 8));
  for (RankNews& rank : news) {
    rank.fingerprint = fingerprint(good(1));
  }
  EXPECT_NO_THROW(require_agreement(news, 8));
  news[2].fingerprint = fingerprint(good(1.0000001));
  EXPECT_THAT([&] { require_agreement(news, 8); },
              testing::ThrowsMessage<Error>(testing::AllOf(testing::HasSubstr("step 8"), testing::HasSubstr("of rank 2 "))));
}

TEST(BadSteps, NobodyIsAccusedWhereHalfOfTheRanksDiffer) {
  for (const double other : {0.5, 2.0}) {  // whichever fingerprint is the larger number
    std::vector<RankNews> news(4);
    for (std::size_t rank = 0; rank < news.size(); ++rank) {
      news[rank].fingerprint = fingerprint(good(rank % 2 == 0 ? 1 : other));
    }
    EXPECT_THAT([&] { require_agreement(news, 8); },
                testing::ThrowsMessage<Error>(testing::AllOf(testing::HasSubstr("0, 2"), testing::HasSubstr("1, 3"),
                                                             testing::HasSubstr("cannot be told"))));
  }
}

}  // namespace
}  // namespace attamba
