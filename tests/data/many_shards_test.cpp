// A data set of 1,000 shards, and a run that goes on at token 10^12: nothing is opened or read but what the first window needs.
#include <gmock/gmock.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <set>
#include <vector>

#include "data/loader.h"
#include "data/sample_order.h"
#include "src/core/clock.h"
#include "tests/data/numbered_data.h"

namespace attamba {
namespace {

using namespace testing;
using ::testing::HasSubstr;

class ManyShards : public ::testing::Test {
 protected:
  static constexpr std::uint64_t kShards = 1000, kShardTokens = 64, kTokens = kShards * kShardTokens;
  static constexpr std::uint64_t kSeed = 5, kN = 100, kWindows = (kTokens - 1) / kN;
  /// The sample with token 10^12, after 15 million epochs.
  static constexpr std::uint64_t kSample = 1'000'000'000'000 / kN;

  /// Only the shards of that sample hold something. The others are zeros of the right length: whoever looks into one fails.
  void SetUp() override {
    first_token_ = permuted(kSample % kWindows, kWindows, kSeed, kSample / kWindows) * kN;
    first_shard_ = first_token_ / kShardTokens;
    last_shard_ = (first_token_ + kN) / kShardTokens;
    std::vector<ShardEntry> entries(kShards);
    for (std::uint64_t shard = first_shard_; shard <= last_shard_; ++shard) {
      const std::uint64_t first = shard * kShardTokens;
      entries[shard] = write_numbered_shard(folder_.path(), shard, first, kShardTokens, {first});
    }
    for (std::uint64_t shard = 0; shard < kShards; ++shard) {
      if (entries[shard].file.empty()) {
        entries[shard] = entries[first_shard_];
        entries[shard].file = shard_name(shard);
        write_text(folder_ / entries[shard].file, "");
        std::filesystem::resize_file(folder_ / entries[shard].file, entries[shard].bytes);
      }
    }
    write_numbered_manifest(folder_.path(), entries);
  }
  LoaderConfig config() const { return {.sources = {{.dataset = Dataset::open(folder_.path())}}, .n = kN, .seed = kSeed}; }
  /// Files of the data set that this process has open.
  std::uint64_t open_files() const {
    std::uint64_t count = 0;
    const std::string below = std::filesystem::canonical(folder_.path()).string() + '/';
    for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
      std::error_code gone;  // the descriptor that lists the folder
      count += std::filesystem::read_symlink(entry.path(), gone).string().starts_with(below) ? 1 : 0;
    }
    return count;
  }

  TemporaryFolder folder_;
  std::uint64_t first_token_ = 0, first_shard_ = 0, last_shard_ = 0;
};

TEST_F(ManyShards, AStartAtTokenTenToTheTwelfthReadsItsOwnShardsAlone) {
  const double began = monotonic_seconds();
  const SampleSource source(config());
  EXPECT_EQ(open_files(), 0u) << "opening a data set is no reason to open shards";
  std::atomic<int> asked = 0;
  Loader loader(
      source,
      [&](std::uint64_t micro_batch) {
        ++asked;
        return micro_batch == 0 ? std::vector<std::uint64_t>{kSample} : std::vector<std::uint64_t>{};
      },
      1);
  const Batch batch = loader.next();
  const double seconds = monotonic_seconds() - began;
  RecordProperty("seconds", std::to_string(seconds));
  ASSERT_EQ(batch.sample_indices, std::vector<std::uint64_t>{kSample});
  for (std::uint64_t i = 0; i <= kN; ++i) {
    ASSERT_EQ(batch.tokens[i], static_cast<std::int32_t>(first_token_ + i));
  }
  EXPECT_LE(open_files(), last_shard_ - first_shard_ + 1);
  EXPECT_LE(asked, 2) << "nobody walks to the sample through those before it";
  EXPECT_LT(seconds, 2) << "from nothing to the first batch";
}

TEST_F(ManyShards, AShardIsLookedIntoWhenItIsUsed) {
  const Dataset dataset = Dataset::open(folder_.path());
  const std::uint64_t unused = first_shard_ > 0 ? first_shard_ - 1 : last_shard_ + 1;
  std::vector<std::int32_t> token(1);
  dataset.read_tokens(first_token_, token);
  EXPECT_THAT(error_of([&] { dataset.read_tokens(unused * kShardTokens, token); }), HasSubstr(shard_name(unused)));
}

}  // namespace
}  // namespace attamba
