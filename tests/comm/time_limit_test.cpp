#include "comm/time_limit.h"

#include <gtest/gtest.h>

#include <memory>
#include <thread>

#include "src/core/clock.h"
#include "src/core/error.h"

namespace attamba {
namespace {

TEST(Within, ResultsAndErrorsComeBackWithOrWithoutALimit) {
  for (const double limit : {0.0, 30.0}) {
    EXPECT_EQ(within(limit, [] { return 7; }), 7);
    EXPECT_THROW(within(limit, []() -> int { throw Error("no connection"); }), Error);
  }
}

TEST(Within, WorkThatNeverEndsIsLeftBehind) {
  auto release = std::make_shared<std::promise<void>>();
  const double begin = monotonic_seconds();
  EXPECT_FALSE(within(0.05, [wait = release->get_future().share(), release] {
    wait.wait();
    return 7;
  }));
  EXPECT_GE(monotonic_seconds() - begin, 0.05);
  release->set_value();
}

}  // namespace
}  // namespace attamba
