// What ranks tell each other about their GPUs.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "comm/gpu_ranks.h"
#include "tests/comm/multi_rank/world.h"

namespace attamba {
namespace {

TEST(Gpus, EveryRankKnowsThemAllInTheOrderOfTheRanks) {
  const std::string long_name(200, 'x');
  const int rank = world().rank();
  const auto ranks = gather_gpus(world(), {concat("host", rank / 2), concat("GPU-", rank), long_name, 22809 + rank});
  ASSERT_EQ(ranks.size(), static_cast<std::size_t>(world().size()));
  for (int r = 0; r < world().size(); ++r) {
    EXPECT_EQ(ranks[r].host, concat("host", r / 2));
    EXPECT_EQ(ranks[r].gpu, concat("GPU-", r));
    EXPECT_EQ(ranks[r].name, long_name.substr(0, 63));
    EXPECT_EQ(ranks[r].library_version, 22809 + r);
  }
}

}  // namespace
}  // namespace attamba
