#include "data/sample_order.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <vector>

namespace attamba {
namespace {

TEST(SampleOrder, IsABijectionForEveryCount) {
  std::vector<std::uint64_t> counts = {997, 1024, 1025, 4093, 65536, 65537, 100003};
  for (std::uint64_t count = 1; count <= 300; ++count) {
    counts.push_back(count);
  }
  for (const std::uint64_t count : counts) {
    for (const std::uint64_t epoch : {0u, 1u, 7u}) {
      const KeyedPermutation permutation(count, 42, epoch);
      std::vector<bool> seen(count, false);
      for (std::uint64_t i = 0; i < count; ++i) {
        const std::uint64_t to = permutation(i);
        ASSERT_LT(to, count);
        ASSERT_FALSE(seen[to]) << "count " << count << " index " << i;
        seen[to] = true;
      }
    }
  }
}

TEST(SampleOrder, StaysInsideHugeCountsWithoutCollisions) {
  for (const std::uint64_t count :
       {(std::uint64_t{1} << 40) + 1, std::uint64_t{0xffffffffffffffff}, (std::uint64_t{1} << 63) + 12345}) {
    const KeyedPermutation permutation(count, 1, 2);
    std::set<std::uint64_t> images;
    for (std::uint64_t i = 0; i < 2000; ++i) {
      const std::uint64_t to = permutation(count / 2000 * i);
      EXPECT_LT(to, count);
      EXPECT_TRUE(images.insert(to).second);
    }
  }
}

TEST(SampleOrder, IsTheSameEverywhere) {
  // Written down once: a change of these numbers changes the sample order of every resumed run.
  std::vector<std::uint64_t> images;
  for (std::uint64_t i = 0; i < 8; ++i) {
    images.push_back(permuted(i, 1000003, 17, 3));
  }
  EXPECT_EQ(images, (std::vector<std::uint64_t>{603774, 903290, 358360, 437503, 177796, 16882, 22256, 304966}));
}

TEST(SampleOrder, SmallOrdersAreDrawnUniformly) {
  // All 24 orders of four items over 24000 seeds: each is expected 1000 times, standard deviation 31.
  std::map<std::vector<std::uint64_t>, int> orders;
  for (std::uint64_t seed = 0; seed < 24000; ++seed) {
    std::vector<std::uint64_t> order;
    for (std::uint64_t i = 0; i < 4; ++i) {
      order.push_back(permuted(i, 4, seed, 0));
    }
    ++orders[order];
  }
  EXPECT_EQ(orders.size(), 24u);
  for (const auto& [order, times] : orders) {
    EXPECT_NEAR(times, 1000, 6 * 31);
  }
}

TEST(SampleOrder, SeedsAndEpochsGiveUnrelatedOrders) {
  constexpr std::uint64_t kCount = 5000;
  const auto fixed_points = [&](std::uint64_t seed_a, std::uint64_t epoch_a, std::uint64_t seed_b, std::uint64_t epoch_b) {
    int equal = 0;
    for (std::uint64_t i = 0; i < kCount; ++i) {
      equal += permuted(i, kCount, seed_a, epoch_a) == permuted(i, kCount, seed_b, epoch_b) ? 1 : 0;
    }
    return equal;
  };
  // Two random orders agree in one place on average.
  EXPECT_LT(fixed_points(1, 0, 2, 0), 10);
  EXPECT_LT(fixed_points(1, 0, 1, 1), 10);
  EXPECT_LT(fixed_points(1, 0, 1, std::uint64_t{1} << 32), 10);
  EXPECT_LT(fixed_points(1, 0, (std::uint64_t{1} << 32) + 1, 0), 10);
  // Neighbours do not stay neighbours.
  const KeyedPermutation permutation(kCount, 1, 0);
  int close = 0;
  for (std::uint64_t i = 0; i + 1 < kCount; ++i) {
    const auto a = static_cast<std::int64_t>(permutation(i));
    const auto b = static_cast<std::int64_t>(permutation(i + 1));
    close += std::abs(a - b) <= 10 ? 1 : 0;
  }
  EXPECT_LT(close, 60);  // expected 20
}

}  // namespace
}  // namespace attamba
