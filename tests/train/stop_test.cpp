// When a job's time is up, and how a stop is told.
#include "src/train/stop.h"

#include <gtest/gtest.h>

#include <csignal>
#include <ctime>

#include "src/core/clock.h"
#include "src/core/error.h"

namespace attamba {
namespace {

EnvironmentLookup with(const std::string& end) {
  return [end](const std::string& name) { return name == "SLURM_JOB_END_TIME" ? std::optional(end) : std::nullopt; };
}
const EnvironmentLookup kNothing = [](const std::string&) { return std::nullopt; };

TEST(Stop, TravelsAsOneNumber) {
  EXPECT_EQ(pack(std::nullopt), 0);
  EXPECT_FALSE(unpack_stop(0));
  const auto back = unpack_stop(pack(StopRequest{70000, SIGUSR2}));
  ASSERT_TRUE(back);
  EXPECT_EQ(back->rank, 70000);
  EXPECT_EQ(describe(*back), "rank 70000 got SIGUSR2");
  EXPECT_NE(pack(StopRequest{0, SIGTERM}), 0);
}

/// Seconds from `now` until the limit is reached, with steps and saves that take no time.
double seconds_left(const TimeLimit& limit, double now) {
  double early = 0, late = 1e6;
  while (late - early > 1e-3) {
    const double middle = (early + late) / 2;
    (limit.is_up(now + middle, 0, 0) ? late : early) = middle;
  }
  return late;
}

TEST(TimeLimit, LeavesRoomForAStepASaveAndTheReserve) {
  const TimeLimit limit(1000, 50, kNothing);
  const double end = monotonic_seconds() + seconds_left(limit, monotonic_seconds());
  EXPECT_FALSE(limit.is_up(end - 51, 5, 20));  // 2 (5 + 20) = 50
  EXPECT_TRUE(limit.is_up(end - 49, 5, 20));
  const double now = monotonic_seconds();
  EXPECT_NEAR(seconds_left(TimeLimit(1000, 0, kNothing), now) - seconds_left(limit, now), 50, 0.01);
  EXPECT_LE(seconds_left(limit, now), 950) << "counted from the program's start";
  EXPECT_FALSE(TimeLimit(0, 50, kNothing).is_up(1e12, 5, 20));
}

TEST(TimeLimit, TheReserveLeavesAShortJobMostOfItsTime) {
  const double now = monotonic_seconds();
  EXPECT_NEAR(seconds_left(TimeLimit(40, 60, kNothing), now), seconds_left(TimeLimit(40, 10, kNothing), now), 0.01);
  EXPECT_GT(seconds_left(TimeLimit(40, 60, kNothing), now), 20);
}

TEST(TimeLimit, ObeysSlurmAndTheEarlierOfTwo) {
  const std::string in_an_hour = std::to_string(std::time(nullptr) + 3600);
  const double now = monotonic_seconds();
  EXPECT_NEAR(seconds_left(TimeLimit(0, 0, with(in_an_hour)), now), 3600, 1.5);
  EXPECT_NEAR(seconds_left(TimeLimit(100000, 0, with(in_an_hour)), now), 3600, 1.5);
  EXPECT_LT(seconds_left(TimeLimit(600, 0, with(in_an_hour)), now), 601);
  EXPECT_THROW(TimeLimit(0, 0, with("tomorrow")), UsageError);
}

}  // namespace
}  // namespace attamba
