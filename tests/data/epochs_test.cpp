// Random shards, documents, windows, batches and ranks: every window is trained on once per epoch, in an order that nothing but
// seed, epoch and position decides.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <set>
#include <vector>

#include "data/batch_feed.h"
#include "data/loader.h"
#include "tests/data/numbered_data.h"

namespace attamba {
namespace {

using namespace testing;

/// The same tokens in several shards, and in a single one.
struct Numbered {
  Dataset shards, whole;
  std::set<std::uint64_t> documents;  ///< where they begin
};

Numbered make_data(RandomStream& random, const TemporaryFolder& folder) {
  std::vector<std::uint64_t> sizes(1 + random.below(8));
  for (std::uint64_t& size : sizes) {
    size = 1 + random.below(random.below(2) == 0 ? 10 : 1000);
  }
  ++sizes.front();  // two tokens at least make a window
  std::uint64_t tokens = 0;
  for (const std::uint64_t size : sizes) {
    tokens += size;
  }
  std::set<std::uint64_t> documents{0};
  for (std::uint64_t i = random.below(30); i > 0; --i) {
    documents.insert(random.below(tokens));  // some of them go on in the next shards
  }
  std::filesystem::create_directory(folder / "shards");
  std::filesystem::create_directory(folder / "whole");
  std::vector<ShardEntry> entries;
  std::uint64_t first = 0;
  for (const std::uint64_t size : sizes) {
    entries.push_back(write_numbered_shard(folder / "shards", entries.size(), first, size, documents));
    first += size;
  }
  write_numbered_manifest(folder / "shards", entries);
  write_numbered_manifest(folder / "whole", {write_numbered_shard(folder / "whole", 0, 0, tokens, documents)});
  return {Dataset::open(folder / "shards"), Dataset::open(folder / "whole"), documents};
}

/// How a run cuts its steps.
struct Batches {
  std::int64_t micro_batch = 1;  ///< samples
  std::int64_t per_step = 1;     ///< micro-batches

  std::int64_t samples() const { return micro_batch * per_step; }
  /// What the ranks' loaders read for a step, rank after rank.
  std::vector<std::uint64_t> of_step(std::int64_t step, std::int64_t ranks) const {
    std::vector<std::uint64_t> all;
    for (std::int64_t rank = 0; rank < ranks; ++rank) {
      const MicroBatchShare share{.per_step = per_step, .rank = rank, .ranks = ranks};
      EXPECT_TRUE(share.count() == share.rounds() || share.count() == share.rounds() - 1) << "ranks wait for each other";
      const BatchFeed::Settings feed{.share = share, .micro_batch = micro_batch, .first_step = step, .end_step = step + 1};
      for (std::uint64_t j = 0; j < static_cast<std::uint64_t>(share.count()); ++j) {
        const std::vector<std::uint64_t> samples = feed.samples(j);
        all.insert(all.end(), samples.begin(), samples.end());
      }
      EXPECT_TRUE(share.count() == 0 || feed.samples(static_cast<std::uint64_t>(share.count())).empty()) << "the run has ended";
    }
    return all;
  }
};

/// Two epochs, with another number of ranks from some step on.
void expect_every_window_once_per_epoch(const SampleSource& source, const SampleSource& other, const Batches& batches,
                                        RandomStream& random) {
  const std::uint64_t windows = source.window_count();
  const auto batch = static_cast<std::uint64_t>(batches.samples());
  const auto steps = static_cast<std::int64_t>((2 * windows + batch - 1) / batch);
  const auto changed = static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(steps)));
  const auto ranks_before = static_cast<std::int64_t>(1 + random.below(16)),
             ranks_after = static_cast<std::int64_t>(1 + random.below(16));
  SCOPED_TRACE(concat(ranks_before, " ranks, from step ", changed, " on ", ranks_after));
  std::vector<int> seen(2 * windows);  // the first epoch's windows, then the second one's
  for (std::int64_t step = 0; step < steps; ++step) {
    std::vector<std::uint64_t> indices = batches.of_step(step, step < changed ? ranks_before : ranks_after);
    for (const std::uint64_t index : indices) {
      const Sample sample = other.sample(index);
      ASSERT_EQ(sample.epoch, index / windows);
      ASSERT_LT(sample.window, windows);
      if (sample.epoch < 2) {
        ++seen[sample.epoch * windows + sample.window];
      }
    }
    std::sort(indices.begin(), indices.end());
    ASSERT_EQ(indices.size(), batch);
    for (std::uint64_t i = 0; i < batch; ++i) {
      const std::uint64_t index = static_cast<std::uint64_t>(step) * batch + i;
      ASSERT_EQ(indices[i], index) << "the ranks' shares are not the step's samples, each of them once";
      ASSERT_EQ(source.sample(index), other.sample(index)) << "the order knows the shards, or what was asked for before";
    }
  }
  EXPECT_TRUE(std::all_of(seen.begin(), seen.end(), [](int times) { return times == 1; }));
}

void expect_another_order_for_another_seed_or_epoch(const SampleSource& source, const SampleSource& reseeded) {
  const std::uint64_t windows = source.window_count();
  if (windows < 10) {
    return;  // two orders may be the same by chance
  }
  std::vector<std::uint64_t> first, second, other_seed;
  for (std::uint64_t i = 0; i < windows; ++i) {
    first.push_back(source.sample(i).window);
    second.push_back(source.sample(windows + i).window);
    other_seed.push_back(reseeded.sample(i).window);
  }
  EXPECT_NE(first, second);
  EXPECT_NE(first, other_seed);
}

/// An epoch's windows, as they are read, hold their tokens and documents, and together predict every token once.
void expect_windows_to_hold_all_tokens(const SampleSource& source, const std::set<std::uint64_t>& documents,
                                       std::uint64_t tokens) {
  const auto n = static_cast<std::uint64_t>(source.config().n);
  std::vector<int> predicted(tokens);
  std::vector<std::int32_t> read(n + 1), starts(n), expected(n);
  for (std::uint64_t i = 0; i < source.window_count(); ++i) {
    const Sample sample = source.sample(i);
    source.read(sample, read, starts);
    std::int32_t start = 0;
    for (std::uint64_t t = 0; t < n; ++t) {
      const std::uint64_t position = sample.window * n + t;
      start = documents.contains(position) ? static_cast<std::int32_t>(t) : start;
      expected[t] = start;
      ASSERT_EQ(read[t], static_cast<std::int32_t>(position));
      ++predicted[static_cast<std::size_t>(read[t + 1])];
    }
    ASSERT_EQ(starts, expected);
  }
  EXPECT_EQ(std::count(predicted.begin(), predicted.end(), 1), static_cast<std::int64_t>(source.window_count() * n));
  EXPECT_EQ(std::count(predicted.begin(), predicted.end(), 0), static_cast<std::int64_t>(tokens - source.window_count() * n));
  EXPECT_LE(tokens - source.window_count() * n, n) << "only the first token, and fewer than a window's at the end";
}

TEST(Epochs, OfAThousandRandomRunsHaveEveryWindowOnceInAnOrderOfSeedEpochAndPosition) {
  constexpr int kDataSets = 50, kRunsEach = 20;  // shards take longest
  RandomStream random(13);
  for (int run = 0; run < kDataSets; ++run) {
    const TemporaryFolder folder;
    const Numbered data = make_data(random, folder);
    const std::uint64_t tokens = data.whole.token_count();
    for (int i = 0; i < kRunsEach; ++i) {
      const auto n = static_cast<std::int64_t>(1 + random.below(std::min<std::uint64_t>(tokens - 1, 100)));
      const std::uint64_t seed = random.below(1u << 31);
      const Batches batches{.micro_batch = static_cast<std::int64_t>(1 + random.below(4)),
                            .per_step = static_cast<std::int64_t>(1 + random.below(12))};
      SCOPED_TRACE(concat("run ", run, '.', i, ": ", tokens, " tokens in ", data.shards.manifest().shards.size(),
                          " shards, windows of ", n, ", seed ", seed, ", ", batches.per_step, " micro-batches of ",
                          batches.micro_batch));
      const SampleSource source({.sources = {{.dataset = data.shards}}, .n = n, .seed = seed});
      const SampleSource other({.sources = {{.dataset = data.whole}}, .n = n, .seed = seed});
      const SampleSource reseeded({.sources = {{.dataset = data.shards}}, .n = n, .seed = seed + 1});
      expect_every_window_once_per_epoch(source, other, batches, random);
      expect_another_order_for_another_seed_or_epoch(source, reseeded);
      expect_windows_to_hold_all_tokens(source, data.documents, tokens);
      if (::testing::Test::HasFailure()) {
        return;
      }
    }
  }
}

}  // namespace
}  // namespace attamba
