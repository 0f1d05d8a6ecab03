#include "data/loader.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <atomic>
#include <set>

#include "src/core/clock.h"
#include "tests/data/data_test_support.h"

namespace attamba {
namespace {

using namespace testing;
using ::testing::HasSubstr;

class LoaderTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    folders_ = new std::vector<std::unique_ptr<TemporaryFolder>>;
    // Different sizes and shard sizes.
    const std::size_t documents[] = {60, 25, 90};
    for (std::size_t i = 0; i < 3; ++i) {
      folders_->push_back(std::make_unique<TemporaryFolder>());
      auto options =
          small_preparation(*folders_->back(), made_up_documents(documents[i], static_cast<std::uint32_t>(1000 * i)));
      options.shard_tokens = 3000 + 1000 * i;
      prepare(options);
    }
  }
  static void TearDownTestSuite() { delete folders_; }
  static std::filesystem::path path(std::size_t i) { return *(*folders_)[i] / "out"; }
  static Dataset dataset(std::size_t i) { return Dataset::open(path(i)); }

  static LoaderConfig one(std::uint64_t seed = 3, std::int64_t n = 64) {
    return {.sources = {{.dataset = dataset(0)}}, .n = n, .seed = seed};
  }
  static LoaderConfig three() {
    return {.sources = {{dataset(0), 0.5}, {dataset(1), 0.2}, {dataset(2), 1.3}}, .n = 50, .seed = 9};
  }

  static std::vector<std::unique_ptr<TemporaryFolder>>* folders_;
};
std::vector<std::unique_ptr<TemporaryFolder>>* LoaderTest::folders_ = nullptr;

TEST_F(LoaderTest, EveryWindowOncePerEpochForAnyNumberOfRanks) {
  const SampleSource source(one());
  const std::uint64_t windows = source.window_count();
  ASSERT_GT(windows, 100u);
  for (const std::uint64_t ranks : {1u, 2u, 3u, 7u, 64u}) {
    // Rank r takes samples r, r + ranks, ...: no divisibility is needed for the epochs to come out even.
    std::vector<std::uint64_t> seen(windows, 0);
    for (std::uint64_t rank = 0; rank < ranks; ++rank) {
      for (std::uint64_t index = rank; index < 3 * windows; index += ranks) {
        const Sample sample = source.sample(index);
        EXPECT_EQ(sample.epoch, index / windows);
        ++seen[sample.window];
      }
    }
    EXPECT_TRUE(std::all_of(seen.begin(), seen.end(), [](std::uint64_t times) { return times == 3; }));
  }
}

TEST_F(LoaderTest, OrderDependsOnSeedAndEpochAlone) {
  const SampleSource a(one(3));
  const SampleSource b(one(3));
  const SampleSource c(one(4));
  int equal_seed = 0;
  int equal_epoch = 0;
  const std::uint64_t windows = a.window_count();
  for (std::uint64_t i = 0; i < windows; ++i) {
    EXPECT_EQ(a.sample(i), b.sample(i));
    equal_seed += a.sample(i).window == c.sample(i).window ? 1 : 0;
    equal_epoch += a.sample(i).window == a.sample(i + windows).window ? 1 : 0;
  }
  EXPECT_LT(equal_seed, 10);
  EXPECT_LT(equal_epoch, 10);
  EXPECT_EQ(a.fingerprint(), b.fingerprint());
  EXPECT_NE(a.fingerprint(), c.fingerprint());
  // Far into a run, at once.
  EXPECT_LT(a.sample(std::uint64_t{1} << 50).window, windows);
}

TEST_F(LoaderTest, ShardSizesDoNotChangeTheSamples) {
  const TemporaryFolder other;
  auto options = small_preparation(other, made_up_documents(60, 0));
  options.shard_tokens = 100000;
  prepare(options);
  LoaderConfig config = one();
  const SampleSource many(config);
  config.sources[0].dataset = Dataset::open(options.output);
  const SampleSource single(config);
  ASSERT_NE(many.config().sources[0].dataset.manifest().shards.size(), 1u);
  ASSERT_EQ(single.config().sources[0].dataset.manifest().shards.size(), 1u);
  std::vector<std::int32_t> tokens_a(65), tokens_b(65), starts_a(64), starts_b(64);
  for (std::uint64_t i = 0; i < many.window_count(); ++i) {
    many.read(many.sample(i), tokens_a, starts_a);
    single.read(single.sample(i), tokens_b, starts_b);
    EXPECT_EQ(tokens_a, tokens_b);
    EXPECT_EQ(starts_a, starts_b);
  }
}

TEST_F(LoaderTest, SourcesGetTheirSharesAndWalkThroughWholeEpochs) {
  const LoaderConfig config = three();
  const SampleSource source(config);
  const double total = 0.5 + 0.2 + 1.3;
  std::vector<std::uint64_t> taken(3, 0);
  std::vector<std::set<std::uint64_t>> windows(3);
  for (std::uint64_t i = 0; i < 20000; ++i) {
    const Sample sample = source.sample(i);
    const std::uint64_t count = source.window_count(sample.source);
    EXPECT_EQ(sample.epoch, taken[sample.source] / count);
    if (taken[sample.source] % count == 0) {
      windows[sample.source].clear();
    }
    EXPECT_TRUE(windows[sample.source].insert(sample.window).second);
    ++taken[sample.source];
    for (std::size_t s = 0; s < 3; ++s) {
      // Two levels of the tree over three sources: at most one sample off per level.
      EXPECT_NEAR(static_cast<double>(taken[s]), static_cast<double>(i + 1) * config.sources[s].weight / total, 2.0);
    }
  }
  // Any position can be asked for without those before it; the far end of the range works too.
  EXPECT_EQ(source.sample(12345), SampleSource(three()).sample(12345));
  EXPECT_LT(source.sample(std::uint64_t{1} << 60).source, 3u);
}

TEST_F(LoaderTest, TinyAndEqualWeightsAreServed) {
  LoaderConfig config = three();
  config.sources[0].weight = 1e-30;
  config.sources[1].weight = 1e30;
  config.sources[2].weight = 1e30;
  const SampleSource source(config);
  std::vector<std::uint64_t> taken(3, 0);
  for (std::uint64_t i = 0; i < 1000; ++i) {
    ++taken[source.sample(i).source];
  }
  EXPECT_NEAR(static_cast<double>(taken[1]), 500, 2);
}

std::vector<std::uint64_t> consecutive(std::uint64_t micro_batch, std::uint64_t size, std::uint64_t end) {
  std::vector<std::uint64_t> indices;
  for (std::uint64_t i = micro_batch * size; i < std::min((micro_batch + 1) * size, end); ++i) {
    indices.push_back(i);
  }
  return indices;
}

TEST_F(LoaderTest, BatchesHoldTheirSamplesWindows) {
  const SampleSource source(three());
  Loader loader(
      SampleSource(three()), [](std::uint64_t m) { return consecutive(m, 4, 42); }, 2);
  std::uint64_t next = 0;
  for (;;) {
    const Batch batch = loader.next();
    if (batch.sample_indices.empty()) {
      break;
    }
    EXPECT_EQ(batch.micro_batch, next / 4);
    const std::size_t size = batch.sample_indices.size();
    ASSERT_EQ(batch.tokens.size(), size * 51);
    ASSERT_EQ(batch.document_starts.size(), size * 50);
    for (std::size_t i = 0; i < size; ++i, ++next) {
      EXPECT_EQ(batch.sample_indices[i], next);
      const Sample sample = source.sample(next);
      const Dataset& data = source.config().sources[sample.source].dataset;
      std::vector<std::int32_t> tokens(51);
      data.read_tokens(sample.window * 50, tokens);
      EXPECT_TRUE(std::equal(tokens.begin(), tokens.end(), batch.tokens.begin() + i * 51));
      for (std::size_t t = 0; t < 50; ++t) {
        const std::int32_t start = batch.document_starts[i * 50 + t];
        ASSERT_LE(start, static_cast<std::int32_t>(t));
        // A document begins with BOS (1), and no later token up to this one is another BOS.
        EXPECT_TRUE(start == 0 || tokens[static_cast<std::size_t>(start)] == 1);
        for (std::size_t k = static_cast<std::size_t>(start) + 1; k <= t; ++k) {
          EXPECT_NE(tokens[k], 1);
        }
      }
    }
  }
  EXPECT_EQ(next, 42u);
  EXPECT_TRUE(loader.next().sample_indices.empty());
}

TEST_F(LoaderTest, ResumesFromOneInteger) {
  const auto plan = [](std::uint64_t m) { return consecutive(m, 3, 1000); };
  Loader whole(SampleSource(one()), plan, 3);
  for (int i = 0; i < 17; ++i) {
    (void)whole.next();
  }
  Loader resumed(SampleSource(one()), plan, 3, 17);
  for (int i = 0; i < 5; ++i) {
    const Batch a = whole.next();
    const Batch b = resumed.next();
    EXPECT_EQ(a.micro_batch, b.micro_batch);
    EXPECT_EQ(a.sample_indices, b.sample_indices);
    EXPECT_EQ(a.tokens, b.tokens);
    EXPECT_EQ(a.document_starts, b.document_starts);
  }
}

TEST_F(LoaderTest, GoingOnAfterATrillionTokensTakesNoSearch) {
  const SampleSource source(three());
  const std::uint64_t samples = 1'000'000'000'000 / static_cast<std::uint64_t>(source.config().n);
  double fastest = 1;
  for (int attempt = 0; attempt < 5; ++attempt) {
    const double began = monotonic_seconds();
    Loader loader(
        source, [samples](std::uint64_t k) { return std::vector<std::uint64_t>{samples + k}; }, 1);
    EXPECT_EQ(loader.next().sample_indices, std::vector<std::uint64_t>{samples});
    fastest = std::min(fastest, monotonic_seconds() - began);
  }
  RecordProperty("seconds", std::to_string(fastest));
  EXPECT_LT(fastest, 0.010);
}

TEST_F(LoaderTest, ReadsAheadNoFurtherThanAsked) {
  std::atomic<std::uint64_t> planned = 0;
  Loader loader(
      SampleSource(one()),
      [&](std::uint64_t m) {
        planned = m + 1;
        return consecutive(m, 1, 1000);
      },
      3);
  for (int i = 0; i < 10; ++i) {
    const Batch batch = loader.next();
    EXPECT_LE(planned, batch.micro_batch + 1 + 3 + 1);  // taken, waiting, and the one in the thread's hands
  }
}

TEST_F(LoaderTest, ErrorsOfTheThreadReachTheCaller) {
  // A shard that is damaged after opening: batches before it arrive, then the error that names it, again and again.
  const TemporaryFolder folder;
  std::filesystem::copy(path(0), folder / "set", std::filesystem::copy_options::recursive);
  LoaderConfig config{.sources = {{.dataset = Dataset::open(folder / "set")}}, .n = 64, .seed = 1};
  const auto file = folder / "set" / "shard-00002.h5";
  std::string bytes = read_whole_file(file);
  bytes[bytes.size() - 5] = static_cast<char>(bytes[bytes.size() - 5] ^ 4);
  write_text(file, bytes);
  Loader loader(
      SampleSource(std::move(config)), [](std::uint64_t m) { return consecutive(m, 1, 100000); }, 2);
  const auto drain = [&] {
    for (int i = 0; i < 5000; ++i) {
      (void)loader.next();
    }
  };
  EXPECT_THAT(error_of(drain), HasSubstr("shard-00002.h5"));
  EXPECT_THAT(error_of(drain), HasSubstr("shard-00002.h5"));

  Loader broken_plan(
      SampleSource(one()), [](std::uint64_t) -> std::vector<std::uint64_t> { throw Error("no plan"); }, 2);
  EXPECT_THAT(error_of([&] { (void)broken_plan.next(); }), HasSubstr("no plan"));
}

TEST_F(LoaderTest, StopsWhileWaiting) {
  for (int i = 0; i < 20; ++i) {
    Loader loader(
        SampleSource(one()), [](std::uint64_t m) { return consecutive(m, 2, 100000); }, 1);
    if (i % 2 == 0) {
      (void)loader.next();
    }
  }
}

TEST_F(LoaderTest, StoppingWaitsNoLongerThanAsked) {
  std::atomic<bool> stuck = true, asked = false;
  Loader loader(
      SampleSource(one()),
      [&](std::uint64_t k) {
        asked = k == 2;
        while (k == 2 && stuck) {  // like a file server that does not answer
          std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
        return std::vector<std::uint64_t>{k};
      },
      4);
  while (!asked) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  EXPECT_FALSE(loader.stop(0.02));
  EXPECT_EQ(loader.reading(), "") << "it has not come to a sample yet";
  stuck = false;
  EXPECT_TRUE(loader.stop(60));
}

TEST_F(LoaderTest, ASampleIsNamedByItsShard) {
  const SampleSource source(one());
  const auto n = static_cast<std::uint64_t>(source.config().n);
  const Dataset& dataset = source.config().sources[0].dataset;
  for (std::uint64_t index = 0; index < 50; ++index) {
    const Sample sample = source.sample(index);
    std::uint64_t left = sample.window * n;
    std::size_t shard = 0;
    for (; left >= dataset.manifest().shards[shard].counts.tokens; ++shard) {
      left -= dataset.manifest().shards[shard].counts.tokens;
    }
    EXPECT_EQ(source.describe(index), concat("sample ", index, ": window ", sample.window, " in ",
                                             (dataset.folder() / dataset.manifest().shards[shard].file).string()));
  }
}

TEST_F(LoaderTest, SourcesThatCannotBeMixedAreRefused) {
  LoaderConfig config;
  EXPECT_THAT(error_of<UsageError>([&] { SampleSource source(config); }), HasSubstr("no data set"));
  config = one();
  config.n = 0;
  EXPECT_THAT(error_of<UsageError>([&] { SampleSource source(config); }), HasSubstr("at least one token"));
  config.n = 100000000;
  EXPECT_THAT(error_of([&] { SampleSource source(config); }), HasSubstr("fewer than one window"));
  config = one();
  for (const double weight : {0.0, -1.0, std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    config.sources[0].weight = weight;
    EXPECT_THAT(error_of<UsageError>([&] { SampleSource source(config); }), HasSubstr("weights are positive numbers"));
  }
  const TemporaryFolder other;
  auto options = small_preparation(other, made_up_documents(20, 0));
  write_text(options.tokenizer, other_model());
  prepare(options);
  config = one();
  config.sources.push_back({.dataset = Dataset::open(options.output)});
  const auto message = error_of([&] { SampleSource source(config); });
  EXPECT_THAT(message, HasSubstr("another tokenizer"));
  EXPECT_THAT(message, HasSubstr("shard-00000.h5"));
}

}  // namespace
}  // namespace attamba
