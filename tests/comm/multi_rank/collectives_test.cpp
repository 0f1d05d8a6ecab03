#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "comm/mpi_communicator.h"
#include "tests/comm/multi_rank/world.h"

namespace attamba {
namespace {

/// Empty, tiny, odd, and longer than a piece of 4 MiB with a ragged end.
constexpr std::int64_t kSizes[] = {0, 1, 3, 1000, 1'000'007};

template <class T>
Tensor view(std::vector<T>& values) {
  return {values.data(), {kDTypeOf<T>, {static_cast<std::int64_t>(values.size())}}};
}

/// A value of every rank and place whose sum over a few ranks is exact in every type.
template <class T>
T value_of(int rank, std::int64_t i) {
  return static_cast<T>((rank + 1) * static_cast<int>(i % 1013 - 500));
}

/// An irrational-looking value, so that sums round and their order shows.
float rough(int rank, std::int64_t i) {
  return std::sin(static_cast<float>(i) * 0.37f + static_cast<float>(rank) * 1.7f) *
         std::exp(static_cast<float>(i % 41) - 20.0f);
}

template <class T>
bool same_bytes(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

/// FNV-1a; the values of all ranks, gathered over integers.
template <class T>
std::vector<std::int64_t> hashes_of_all_ranks(const std::vector<T>& values) {
  std::uint64_t hash = 14695981039346656037ull;
  const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
  for (std::size_t i = 0; i < values.size() * sizeof(T); ++i) {
    hash = (hash ^ bytes[i]) * 1099511628211ull;
  }
  std::vector<std::int64_t> own = {static_cast<std::int64_t>(hash)};
  std::vector<std::int64_t> all(static_cast<std::size_t>(world().size()));
  world().all_gather(view(all), view(own));
  return all;
}

template <class T>
class Reduction : public testing::Test {};
using Reducible = testing::Types<float, double, std::int32_t, std::int64_t>;
TYPED_TEST_SUITE(Reduction, Reducible);

TYPED_TEST(Reduction, SumsInPlace) {
  const int ranks = world().size();
  for (const std::int64_t n : kSizes) {
    std::vector<TypeParam> data(static_cast<std::size_t>(n));
    for (std::int64_t i = 0; i < n; ++i) {
      data[i] = value_of<TypeParam>(world().rank(), i);
    }
    world().all_reduce_sum(view(data));
    std::int64_t wrong = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      wrong += data[i] != value_of<TypeParam>(0, i) * static_cast<TypeParam>(ranks * (ranks + 1) / 2);
    }
    EXPECT_EQ(wrong, 0) << "of " << n;
  }
}

TYPED_TEST(Reduction, TakesTheLargest) {
  for (const std::int64_t n : kSizes) {
    std::vector<TypeParam> data(static_cast<std::size_t>(n));
    for (std::int64_t i = 0; i < n; ++i) {
      data[i] = value_of<TypeParam>(world().rank(), i);
    }
    world().all_reduce_max(view(data));
    std::int64_t wrong = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      const int winner = i % 1013 < 500 ? 0 : world().size() - 1;  // negative values: the smallest magnitude is the largest
      wrong += data[i] != value_of<TypeParam>(winner, i);
    }
    EXPECT_EQ(wrong, 0) << "of " << n;
  }
}

TYPED_TEST(Reduction, OverlappingSumsFinishInAnyOrderOfWaiting) {
  constexpr int kRequests = 9;
  std::vector<std::vector<TypeParam>> data(kRequests);
  std::vector<std::unique_ptr<Request>> requests;
  for (int k = 0; k < kRequests; ++k) {
    data[k].assign(static_cast<std::size_t>(kSizes[k % 5]), static_cast<TypeParam>((k + 1) * (world().rank() + 1)));
    requests.push_back(world().start_all_reduce_sum(view(data[k])));
    // Collectives in the foreground go their own way meanwhile.
    std::vector<std::int32_t> one = {1};
    world().all_reduce_sum(view(one));
    EXPECT_EQ(one[0], world().size());
  }
  for (int k = kRequests - 1; k >= 0; --k) {
    requests[k]->wait();
    const auto expected = static_cast<TypeParam>((k + 1) * world().size() * (world().size() + 1) / 2);
    EXPECT_EQ(std::count(data[k].begin(), data[k].end(), expected), kSizes[k % 5]) << "request " << k;
  }
}

TYPED_TEST(Reduction, GivesEachRankItsPartOfASumAlsoInPlace) {
  const int ranks = world().size();
  for (const std::int64_t n : kSizes) {
    std::vector<TypeParam> whole(static_cast<std::size_t>(n * ranks)), part(static_cast<std::size_t>(n));
    for (std::size_t i = 0; i < whole.size(); ++i) {
      whole[i] = value_of<TypeParam>(world().rank(), static_cast<std::int64_t>(i));
    }
    std::vector<TypeParam> in_place = whole;
    const Tensor place{in_place.data() + n * world().rank(), {kDTypeOf<TypeParam>, {n}}};
    const auto request = world().start_reduce_scatter_sum(view(whole), view(part));
    world().start_reduce_scatter_sum(view(in_place), place)->wait();
    request->wait();
    std::int64_t wrong = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      const TypeParam expected =
          value_of<TypeParam>(0, i + n * world().rank()) * static_cast<TypeParam>(ranks * (ranks + 1) / 2);
      wrong += part[i] != expected || place.as<TypeParam>()[i] != expected;
    }
    EXPECT_EQ(wrong, 0) << "of " << n;
  }
}

TEST(Sum, InPartsIsExactForInt64AndWraps) {
  const auto ranks = static_cast<std::uint64_t>(world().size());
  constexpr std::uint64_t kLarge = (std::uint64_t{1} << 62) + 12345;
  for (const std::size_t n : {std::size_t{3}, std::size_t{700'001}}) {
    std::vector<std::int64_t> whole(n * ranks), part(n);
    for (std::size_t i = 0; i < whole.size(); ++i) {
      whole[i] = static_cast<std::int64_t>(kLarge + i * (std::uint64_t{1} << 31) + static_cast<std::uint64_t>(world().rank()));
    }
    world().start_reduce_scatter_sum(view(whole), view(part))->wait();
    std::int64_t wrong = 0;
    for (std::size_t i = 0; i < n; ++i) {
      const std::uint64_t place = i + n * static_cast<std::uint64_t>(world().rank());
      wrong +=
          part[i] != static_cast<std::int64_t>((kLarge + place * (std::uint64_t{1} << 31)) * ranks + ranks * (ranks - 1) / 2);
    }
    EXPECT_EQ(wrong, 0) << "of " << n;
  }
}

TEST(Sum, InPartsRoundsTheSameWayEachTime) {
  for (const std::int64_t n : kSizes) {
    std::vector<float> whole(static_cast<std::size_t>(n * world().size()));
    for (std::size_t i = 0; i < whole.size(); ++i) {
      whole[i] = rough(world().rank(), static_cast<std::int64_t>(i));
    }
    std::vector<float> again = whole, part(static_cast<std::size_t>(n)), other = part;
    std::vector<double> exact(whole.begin(), whole.end()), sizes(whole.size());
    std::transform(whole.begin(), whole.end(), sizes.begin(), [](float x) { return std::abs(static_cast<double>(x)); });
    world().all_reduce_sum(view(exact));
    world().all_reduce_sum(view(sizes));
    world().start_reduce_scatter_sum(view(whole), view(part))->wait();
    world().start_reduce_scatter_sum(view(again), view(other))->wait();
    EXPECT_TRUE(same_bytes(part, other)) << n;
    std::int64_t wrong = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      const auto at = static_cast<std::size_t>(n * world().rank() + i);
      wrong += std::abs(static_cast<double>(part[i]) - exact[at]) > 3 * 0x1p-24 * sizes[at];  // of at most 4 ranks
    }
    EXPECT_EQ(wrong, 0) << "of " << n;
  }
}

TEST(Sum, RoundedFloatsHaveTheSameBitsOnEveryRankInFrontAndBehind) {
  for (const std::int64_t n : kSizes) {
    std::vector<float> front(static_cast<std::size_t>(n));
    for (std::int64_t i = 0; i < n; ++i) {
      front[i] = rough(world().rank(), i);
    }
    std::vector<float> behind = front;
    std::vector<double> wide(front.begin(), front.end());
    const auto request = world().start_all_reduce_sum(view(behind));
    world().all_reduce_sum(view(front));
    request->wait();
    EXPECT_THAT(hashes_of_all_ranks(front), testing::Each(hashes_of_all_ranks(front)[0])) << n;
    EXPECT_TRUE(same_bytes(front, behind)) << n;
    world().all_reduce_sum(view(wide));
    EXPECT_THAT(hashes_of_all_ranks(wide), testing::Each(hashes_of_all_ranks(wide)[0])) << n;
  }
}

TEST(Sum, Int64IsExactAndWraps) {
  constexpr std::int64_t kLarge = (std::int64_t{1} << 62) + 12345;
  std::vector<std::int64_t> data = {kLarge + world().rank(), -kLarge, (std::int64_t{1} << 53) + 1, -1};
  world().all_reduce_sum(view(data));
  const auto ranks = static_cast<std::uint64_t>(world().size());
  EXPECT_EQ(data[0], static_cast<std::int64_t>(static_cast<std::uint64_t>(kLarge) * ranks + ranks * (ranks - 1) / 2));
  EXPECT_EQ(data[1], static_cast<std::int64_t>(static_cast<std::uint64_t>(-kLarge) * ranks));
  EXPECT_EQ(data[2], static_cast<std::int64_t>(((std::uint64_t{1} << 53) + 1) * ranks));
  EXPECT_EQ(data[3], -world().size());
}

TEST(Sum, ANanOnOneRankReachesAll) {
  std::vector<float> data(5, world().rank() == world().size() - 1 ? std::numeric_limits<float>::quiet_NaN() : 1.0f);
  world().all_reduce_sum(view(data));
  EXPECT_THAT(data, testing::Each(testing::IsNan()));
}

TEST(Max, ANanOnAnyOneRankReachesAll) {
  for (int bad = 0; bad < world().size(); ++bad) {
    std::vector<float> single(3, static_cast<float>(world().rank()));
    std::vector<double> wide(3, -std::numeric_limits<double>::infinity());
    if (world().rank() == bad) {
      single[1] = std::numeric_limits<float>::quiet_NaN();
      wide[1] = std::numeric_limits<double>::quiet_NaN();
    }
    world().all_reduce_max(view(single));
    world().all_reduce_max(view(wide));
    EXPECT_TRUE(std::isnan(single[1])) << "from rank " << bad;
    EXPECT_TRUE(std::isnan(wide[1])) << "from rank " << bad;
    EXPECT_EQ(single[0], static_cast<float>(world().size() - 1));
    EXPECT_EQ(wide[2], -std::numeric_limits<double>::infinity());
  }
}

template <class T>
class Movement : public testing::Test {};
using Movable = testing::Types<float, bfloat16, double, std::int32_t, std::int64_t>;
TYPED_TEST_SUITE(Movement, Movable);

/// Bytes that depend on the rank and on the place.
template <class T>
std::vector<T> pattern(int rank, std::int64_t n) {
  std::vector<T> values(static_cast<std::size_t>(n));
  auto* bytes = reinterpret_cast<unsigned char*>(values.data());
  for (std::size_t i = 0; i < values.size() * sizeof(T); ++i) {
    bytes[i] = static_cast<unsigned char>(i * 7 + i / 251 + static_cast<std::size_t>(rank) * 91);
  }
  return values;
}

TYPED_TEST(Movement, BroadcastsFromEveryRoot) {
  for (const std::int64_t n : kSizes) {
    for (int root = 0; root < world().size(); ++root) {
      std::vector<TypeParam> data = pattern<TypeParam>(world().rank(), n);
      world().broadcast(view(data), root);
      EXPECT_TRUE(same_bytes(data, pattern<TypeParam>(root, n))) << n << " from " << root;
    }
  }
}

TYPED_TEST(Movement, GathersPartsInTheOrderOfTheRanksAlsoInPlace) {
  for (const std::int64_t n : kSizes) {
    std::vector<TypeParam> expected;
    for (int rank = 0; rank < world().size(); ++rank) {
      const std::vector<TypeParam> part = pattern<TypeParam>(rank, n);
      expected.insert(expected.end(), part.begin(), part.end());
    }
    std::vector<TypeParam> own = pattern<TypeParam>(world().rank(), n);
    std::vector<TypeParam> whole(expected.size());
    world().all_gather(view(whole), view(own));
    EXPECT_TRUE(same_bytes(whole, expected)) << n;

    std::vector<TypeParam> in_place(expected.size());
    std::copy(own.begin(), own.end(), in_place.begin() + n * world().rank());
    const Tensor part{in_place.data() + n * world().rank(), {kDTypeOf<TypeParam>, {n}}};
    world().all_gather(view(in_place), part);
    EXPECT_TRUE(same_bytes(in_place, expected)) << n << " in place";
  }
}

TYPED_TEST(Movement, GathersInTheBackgroundWhileOtherThingsGoOn) {
  constexpr int kRequests = 6;
  std::vector<std::vector<TypeParam>> wholes(kRequests), parts(kRequests), expected(kRequests);
  std::vector<std::unique_ptr<Request>> requests;
  for (int k = 0; k < kRequests; ++k) {
    const std::int64_t n = kSizes[k % 5];
    for (int rank = 0; rank < world().size(); ++rank) {
      const std::vector<TypeParam> part = pattern<TypeParam>(rank + k, n);
      expected[k].insert(expected[k].end(), part.begin(), part.end());
    }
    parts[k] = pattern<TypeParam>(world().rank() + k, n);
    wholes[k].resize(expected[k].size());
    Tensor part = view(parts[k]);
    if (k % 2 == 1) {  // in place
      std::copy(parts[k].begin(), parts[k].end(), wholes[k].begin() + n * world().rank());
      part.data = wholes[k].data() + n * world().rank();
    }
    requests.push_back(world().start_all_gather(view(wholes[k]), part));
    std::vector<std::int32_t> one = {1};
    world().all_reduce_sum(view(one));
    EXPECT_EQ(one[0], world().size());
  }
  for (int k = kRequests - 1; k >= 0; --k) {
    requests[k]->wait();
    EXPECT_TRUE(same_bytes(wholes[k], expected[k])) << "request " << k;
  }
}

TEST(Barrier, NobodyLeavesBeforeTheLastHasCome) {
  using Clock = std::chrono::steady_clock;
  for (int late = 0; late < world().size(); ++late) {
    world().barrier();
    if (world().rank() == late) {
      std::this_thread::sleep_for(std::chrono::milliseconds(30));
    }
    // The steady clock is one for all processes of a host.
    std::vector<std::int64_t> came = {Clock::now().time_since_epoch().count()};
    world().barrier();
    const std::int64_t left = Clock::now().time_since_epoch().count();
    world().all_reduce_max(view(came));
    EXPECT_GE(left, came[0]);
  }
}

TEST(Ranks, AreNumberedOnTheirHostToo) {
  EXPECT_EQ(world().local_size(), world().size()) << "all ranks of this test run on one host";
  EXPECT_EQ(world().local_rank(), world().rank());
  EXPECT_THAT(world().description(), testing::HasSubstr("on 1 host"));
}

TEST(Progress, CountsCollectivesAlikeOnAllRanks) {
  if (world().size() == 1) {
    return;  // alone, nobody is waited for
  }
  using Progress = CollectiveProgress;
  const Progress::Position before = world().progress().position(Progress::foreground);
  const Progress::Position behind = world().progress().position(Progress::background);
  std::vector<float> data(3);
  const double waited = world().progress().waited();
  if (world().rank() == 0) {
    std::this_thread::sleep_for(std::chrono::milliseconds(60));
  }
  world().all_reduce_sum(view(data));
  EXPECT_TRUE(world().rank() == 0 || world().progress().waited() - waited > 0.03) << "the others waited for rank 0";
  world().start_all_reduce_sum(view(data))->wait();
  world().barrier();
  const Progress::Position after = world().progress().position(Progress::foreground);
  EXPECT_EQ(after.number, before.number + 2);
  EXPECT_FALSE(after.inside);
  EXPECT_EQ(CollectiveCall::from_signature(after.signature).describe(), "barrier");
  EXPECT_EQ(world().progress().position(Progress::background).number, behind.number + 1);
  EXPECT_FALSE(world().progress().waiting());
  std::int64_t numbers[2] = {after.number, -after.number};
  world().all_reduce_max({numbers, {DType::int64, {2}}});
  EXPECT_EQ(numbers[0], -numbers[1]) << "numbers agree between ranks";
}

TEST(Groups, AreCommunicatorsOfTheirOwn) {
  EXPECT_EQ(world().first_local_rank(), 0);
  const auto group = world().split(world().rank() % 2);
  EXPECT_EQ(group->size(), (world().size() + 1 - world().rank() % 2) / 2);
  EXPECT_EQ(group->rank(), world().rank() / 2);
  std::vector<std::int64_t> all = {1}, some = {world().rank()};
  const auto over_all = world().start_all_reduce_sum(view(all));
  group->start_all_reduce_sum(view(some))->wait();
  over_all->wait();
  EXPECT_EQ(all[0], world().size());
  std::int64_t expected = 0;
  for (int rank = world().rank() % 2; rank < world().size(); rank += 2) {
    expected += rank;
  }
  EXPECT_EQ(some[0], expected);
  // More than fits the messages by which ranks meet.
  std::vector<float> whole(50000 * static_cast<std::size_t>(group->size()), static_cast<float>(world().rank()));
  std::vector<float> part(50000);
  group->start_reduce_scatter_sum(view(whole), view(part))->wait();
  EXPECT_EQ(part.front(), static_cast<float>(expected));
  EXPECT_EQ(part.back(), static_cast<float>(expected));
}

TEST(Groups, CountTheirCollectivesBesideThoseOfAll) {
  if (world().size() == 1) {
    return;  // alone, nobody is waited for
  }
  using Progress = CollectiveProgress;
  const int color = 5 + world().rank() % 2;
  const auto first = world().split(color), second = world().split(0);
  const auto before = world().progress().positions();
  const Progress::Position behind = second->progress().position(Progress::background);
  std::vector<float> data(3);
  second->barrier();
  second->start_all_reduce_sum(view(data))->wait();
  second->start_all_reduce_sum(view(data))->wait();
  world().barrier();
  const auto after = world().progress().positions();
  std::size_t with_color = 0;
  std::int64_t entered = 0;
  for (std::size_t lane = Progress::kLanes; lane < Progress::kAllLanes; ++lane) {
    with_color += after[lane].color == color ? 1 : 0;
    EXPECT_FALSE(after[lane].inside);
    entered += after[lane].number - before[lane].number;
  }
  EXPECT_EQ(with_color, std::size_t{Progress::kLanes}) << "the group's lanes";
  EXPECT_EQ(entered, 3);
  EXPECT_EQ(second->progress().position(Progress::background).number, behind.number + 2);
  EXPECT_EQ(after[Progress::foreground].number, before[Progress::foreground].number + 1);
}

TEST(Errors, RanksThatDoDifferentThingsAllHearOfIt) {
  if (world().size() == 1) {
    return;  // one rank always agrees with itself
  }
  std::vector<float> data(world().rank() == 0 ? 7 : 5);
  EXPECT_THAT([&] { world().all_reduce_sum(view(data)); },
              testing::ThrowsMessage<Error>(testing::AllOf(testing::HasSubstr("20 bytes"), testing::HasSubstr("28 bytes"))));
  if (world().size() > 2) {  // then it is clear who is right
    EXPECT_THAT([&] { world().all_reduce_sum(view(data)); },
                testing::ThrowsMessage<RanksDisagree>(
                    testing::AllOf(testing::HasSubstr("ranks 1, 2"), testing::HasSubstr("; rank 0 on "),
                                   testing::EndsWith(" in all_reduce_sum of 28 bytes of float32"))));
  }
  const auto request = world().start_all_reduce_sum(view(data));
  EXPECT_THAT([&] { request->wait(); }, testing::ThrowsMessage<Error>(testing::HasSubstr("start_all_reduce_sum")));
  const auto different_collectives = [&] {
    if (world().rank() == 0) {
      world().barrier();
    } else {
      world().broadcast(view(data), 1);
    }
  };
  EXPECT_THAT(different_collectives, testing::ThrowsMessage<Error>(testing::HasSubstr("barrier")));
  // The transport survives: the next collective works.
  std::vector<std::int32_t> one = {1};
  world().all_reduce_sum(view(one));
  EXPECT_EQ(one[0], world().size());
}

TEST(Errors, WrongArgumentsAreRefusedBeforeAnythingMoves) {
  std::vector<bfloat16> half(4);
  EXPECT_THROW(world().all_reduce_sum(view(half)), Error);
  EXPECT_THROW(world().start_all_reduce_sum(view(half)), Error);
  std::vector<int> values(4);
  EXPECT_THROW(world().broadcast(view(values), world().size()), Error);
}

}  // namespace
}  // namespace attamba
