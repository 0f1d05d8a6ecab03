// Learning rates against the formulas of docs/model.md.
#include "src/optim/schedule.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "src/core/error.h"

namespace attamba {
namespace {

constexpr double kPi = 3.14159265358979323846;

const std::vector<std::string> kNames{"cosine", "constant", "linear", "wsd", "inverse_sqrt"};

ScheduleSettings settings(const std::string& name, std::int64_t warmup = 100, std::int64_t steps = 1100) {
  return {.name = name, .peak = 2.0, .warmup = warmup, .steps = steps, .min_ratio = 0.1, .decay = 0.2};
}

TEST(Schedules, WarmUpLinearlyFromZero) {
  for (const std::string& name : kNames) {
    EXPECT_EQ(learning_rate(settings(name), 0), 0) << name;
    EXPECT_DOUBLE_EQ(learning_rate(settings(name), 1), 2.0 / 100) << name;
    EXPECT_DOUBLE_EQ(learning_rate(settings(name), 50), 1.0) << name;
    EXPECT_DOUBLE_EQ(learning_rate(settings(name), 99), 2.0 * 99 / 100) << name;
    EXPECT_DOUBLE_EQ(learning_rate(settings(name), 100), 2.0) << name << ": the peak is reached";
  }
}

TEST(Schedules, WithoutWarmUpStartAtThePeak) {
  for (const std::string& name : kNames) {
    EXPECT_DOUBLE_EQ(learning_rate(settings(name, 0), 0), 2.0) << name;
  }
}

TEST(Schedules, CosineIsThePublishedOne) {
  // The published runs: 60,000 steps, 5,000 of them warm-up, peak 3e-3, m = 1e-6.
  const ScheduleSettings published;
  EXPECT_EQ(learning_rate(published, 0), 0);
  EXPECT_DOUBLE_EQ(learning_rate(published, 2500), 1.5e-3);
  EXPECT_DOUBLE_EQ(learning_rate(published, 5000), 3e-3);
  for (const std::int64_t i : {5001, 20000, 32500, 59999}) {
    const double s = static_cast<double>(i - 5000) / 55000, m = 1e-6;
    EXPECT_DOUBLE_EQ(learning_rate(published, i), 3e-3 * (m + (1 - m) * (1 + std::cos(kPi * s)) / 2)) << i;
  }
  EXPECT_NEAR(learning_rate(published, 60000), 3e-9, 1e-18);
}

TEST(Schedules, FollowTheirFormulasAfterTheWarmUp) {
  const auto rate = [](const std::string& name, std::int64_t i) { return learning_rate(settings(name), i); };
  EXPECT_DOUBLE_EQ(rate("linear", 600), 2 * (0.1 + 0.9 * 0.5));
  EXPECT_DOUBLE_EQ(rate("cosine", 600), 2 * (0.1 + 0.9 * 0.5));
  EXPECT_DOUBLE_EQ(rate("constant", 600), 2);
  EXPECT_DOUBLE_EQ(rate("inverse_sqrt", 400), 2 * 0.5);
  EXPECT_DOUBLE_EQ(rate("wsd", 880), 2) << "the last fifth of 1100 steps starts here";
  EXPECT_DOUBLE_EQ(rate("wsd", 990), 2 * (0.1 + 0.9 * 0.5));
}

TEST(Schedules, EndAtTheirLastRateAndStayThere) {
  for (const auto& [name, last] :
       std::vector<std::pair<std::string, double>>{{"cosine", 0.2}, {"linear", 0.2}, {"wsd", 0.2}, {"constant", 2.0}}) {
    EXPECT_NEAR(learning_rate(settings(name), 1100), last, 1e-15) << name;
    EXPECT_NEAR(learning_rate(settings(name), 5000), last, 1e-15) << name << ", beyond the end";
  }
  EXPECT_NEAR(learning_rate(settings("inverse_sqrt"), 1'000'000), 0.2, 1e-15) << "never below m";
}

TEST(Schedules, NeverRiseAfterTheWarmUp) {
  for (const std::string& name : kNames) {
    for (std::int64_t i = 100; i < 1300; ++i) {
      const double now = learning_rate(settings(name), i), next = learning_rate(settings(name), i + 1);
      ASSERT_LE(next, now) << name << " at " << i;
      ASSERT_GE(next, 0.2 - 1e-15) << name << " at " << i;
    }
  }
}

TEST(Schedules, AreFiniteInRunsShorterThanTheirWarmUp) {
  for (const std::string& name : kNames) {
    for (const std::int64_t steps : {0, 1, 50, 100}) {
      for (const std::int64_t i : {0, 1, 99, 100, 101, 1000}) {
        const double rate = learning_rate(settings(name, 100, steps), i);
        EXPECT_TRUE(std::isfinite(rate) && rate >= 0 && rate <= 2) << name << ", " << steps << " steps, at " << i;
      }
    }
  }
}

TEST(Schedules, UnknownNamesAreTheUsersMistakeAtEveryStep) {
  for (const std::int64_t i : {0, 50, 100, 2000}) {
    try {
      learning_rate(settings("cosin"), i);
      ADD_FAILURE() << "accepted at step " << i;
    } catch (const UsageError& error) {
      EXPECT_THAT(error.what(), testing::HasSubstr("cosin"));
    }
  }
}

}  // namespace
}  // namespace attamba
