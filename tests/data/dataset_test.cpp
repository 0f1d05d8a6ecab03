#include "data/dataset.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "src/core/crc32c.h"
#include "tests/data/data_test_support.h"

namespace attamba {
namespace {

using namespace testing;
using ::testing::AnyOf;
using ::testing::HasSubstr;

/// A data set of several shards, made once; tests that damage it work on copies.
class DatasetTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = new TemporaryFolder;
    texts_ = new std::vector<std::string>(made_up_documents(300));
    auto options = small_preparation(*folder_, *texts_);
    options.shard_tokens = 40000;  // more than a block of checksums
    prepare(options);
  }
  static void TearDownTestSuite() {
    delete folder_;
    delete texts_;
  }
  static std::filesystem::path whole() { return *folder_ / "out"; }

  /// A fresh copy to damage.
  std::filesystem::path copy() {
    const auto path = scratch_ / ("copy" + std::to_string(copies_++));
    std::filesystem::copy(whole(), path, std::filesystem::copy_options::recursive);
    return path;
  }

  /// Reads everything, the way that training does: windows in some order, with their documents.
  static void use(const std::filesystem::path& path) {
    const Dataset dataset = Dataset::open(path);
    std::vector<std::int32_t> tokens(129);
    std::vector<std::int32_t> starts(128);
    for (std::uint64_t i = dataset.window_count(128); i-- > 0;) {
      dataset.read_tokens(i * 128, tokens);
      dataset.fill_document_starts(i * 128, starts);
      for (const std::int32_t token : tokens) {
        require(token >= 0 && token < dataset.vocabulary_size(), "a damaged token was used");
      }
    }
  }

  static TemporaryFolder* folder_;
  static std::vector<std::string>* texts_;
  TemporaryFolder scratch_;
  int copies_ = 0;
};
TemporaryFolder* DatasetTest::folder_ = nullptr;
std::vector<std::string>* DatasetTest::texts_ = nullptr;

TEST_F(DatasetTest, ReadsAnyRangeAcrossShards) {
  const Dataset dataset = Dataset::open(whole());
  const auto expected = expected_tokens(Tokenizer::load(dataset.tokenizer_model_path()), *texts_);
  ASSERT_EQ(dataset.token_count(), expected.tokens.size());
  ASSERT_GE(dataset.manifest().shards.size(), 3u);
  RandomStream random(1);
  std::vector<std::pair<std::uint64_t, std::uint64_t>> ranges = {
      {0, 0}, {0, 1}, {dataset.token_count(), 0}, {0, dataset.token_count()}};
  std::uint64_t edge = 0;
  for (const auto& shard : dataset.manifest().shards) {
    edge += shard.counts.tokens;
    ranges.emplace_back(edge - 1, std::min<std::uint64_t>(2, dataset.token_count() - edge + 1));
  }
  for (int i = 0; i < 300; ++i) {
    const std::uint64_t begin = random.below(dataset.token_count());
    ranges.emplace_back(begin, random.below(std::min<std::uint64_t>(dataset.token_count() - begin, 60000)));
  }
  for (const auto& [begin, size] : ranges) {
    std::vector<std::int32_t> tokens(size);
    dataset.read_tokens(begin, tokens);
    EXPECT_TRUE(std::equal(tokens.begin(), tokens.end(), expected.tokens.begin() + begin)) << begin << " " << size;
    std::vector<std::uint64_t> starts;
    for (const std::uint64_t start : expected.starts) {
      if (start >= begin && start < begin + size) {
        starts.push_back(start);
      }
    }
    EXPECT_EQ(dataset.document_starts(begin, begin + size), starts);
    std::vector<std::int32_t> filled(size);
    dataset.fill_document_starts(begin, filled);
    for (std::uint64_t t = 0; t < size; ++t) {
      const auto after = std::upper_bound(expected.starts.begin(), expected.starts.end(), begin + t);
      const std::uint64_t start = *(after - 1);
      ASSERT_EQ(filled[t], start < begin ? 0 : static_cast<std::int32_t>(start - begin));
      if (t % 1000 == 0) {
        ASSERT_EQ(dataset.document_begin(begin + t), start);
      }
    }
  }
  std::vector<std::int32_t> outside(2);
  EXPECT_THAT(error_of([&] { dataset.read_tokens(dataset.token_count() - 1, outside); }), HasSubstr("outside"));
  for (std::size_t i = 0; i < expected.starts.size(); ++i) {
    EXPECT_EQ(dataset.document_position(i), expected.starts[i]);
  }
}

TEST_F(DatasetTest, WindowsPredictEveryTokenOnce) {
  const Dataset dataset = Dataset::open(whole());
  for (const std::uint64_t n : {1u, 7u, 128u, 1024u}) {
    const std::uint64_t windows = dataset.window_count(n);
    EXPECT_LE(windows * n + 1, dataset.token_count());
    EXPECT_GT((windows + 1) * n + 1, dataset.token_count());
  }
  EXPECT_EQ(dataset.window_count(dataset.token_count()), 0u);
  EXPECT_EQ(dataset.window_count(dataset.token_count() - 1), 1u);
}

TEST_F(DatasetTest, FingerprintIsOfTheContent) {
  EXPECT_EQ(Dataset::open(copy()).fingerprint(), Dataset::open(whole()).fingerprint());
  const TemporaryFolder other;
  auto texts = *texts_;
  texts[100][3] = texts[100][3] == 'x' ? 'y' : 'x';
  auto options = small_preparation(other, texts);
  options.shard_tokens = 40000;
  prepare(options);
  EXPECT_NE(Dataset::open(options.output).fingerprint(), Dataset::open(whole()).fingerprint());
}

TEST_F(DatasetTest, AnotherVocabularyIsRefused) {
  const Dataset dataset = Dataset::open(whole());
  dataset.require_vocabulary(400);
  EXPECT_THAT(error_of([&] { dataset.require_vocabulary(32000); }), HasSubstr("shard-00000.h5"));
}

TEST_F(DatasetTest, MissingFilesAreNamed) {
  for (const std::string name : {"shard-00001.h5", "tokenizer.model"}) {
    const auto path = copy();
    std::filesystem::remove(path / name);
    EXPECT_THAT(error_of([&] { (void)Dataset::open(path); }), HasSubstr(name));
    EXPECT_EQ(verify_dataset(path, 2).size(), 1u);
  }
  const auto path = copy();
  std::filesystem::remove(path / "manifest.json");
  EXPECT_THAT(error_of([&] { (void)Dataset::open(path); }), HasSubstr("not a whole data set"));
  EXPECT_THAT(error_of([&] { (void)Dataset::open(path / "absent"); }), HasSubstr("absent"));
}

TEST_F(DatasetTest, TruncatedAndGrownShardsAreNamedAtOpening) {
  const auto size = std::filesystem::file_size(whole() / "shard-00001.h5");
  for (const std::uintmax_t left : {std::uintmax_t{0}, std::uintmax_t{1}, size / 2, size - 1, size + 1}) {
    const auto path = copy();
    std::filesystem::resize_file(path / "shard-00001.h5", left);
    const auto message = error_of([&] { (void)Dataset::open(path); });
    EXPECT_THAT(message, HasSubstr("shard-00001.h5"));
    EXPECT_THAT(message, HasSubstr(left < size ? "truncated" : "another file"));
  }
}

TEST_F(DatasetTest, TruncationWhileInUseIsAnErrorToo) {
  const auto path = copy();
  const Dataset dataset = Dataset::open(path);
  std::vector<std::int32_t> tokens(10);
  dataset.read_tokens(0, tokens);
  std::filesystem::resize_file(path / "shard-00000.h5", 3000);
  const std::uint64_t last = dataset.manifest().shards[0].counts.tokens - 10;
  EXPECT_THAT(error_of([&] { dataset.read_tokens(last, tokens); }), HasSubstr("shard-00000.h5"));
}

TEST_F(DatasetTest, SwappedShardsAreNamed) {
  // Shards of the same size, so that only their checksums tell them apart.
  TemporaryFolder same;
  const std::string line = made_up_text(1, 600);
  std::vector<std::string> texts;
  for (int i = 0; i < 40; ++i) {
    texts.push_back(line);
  }
  auto options = small_preparation(same, texts);
  options.shard_tokens = 2000;
  prepare(options);
  const auto out = options.output;
  ASSERT_EQ(std::filesystem::file_size(out / "shard-00000.h5"), std::filesystem::file_size(out / "shard-00001.h5"));
  use(out);
  std::filesystem::rename(out / "shard-00000.h5", out / "kept");
  std::filesystem::rename(out / "shard-00001.h5", out / "shard-00000.h5");
  std::filesystem::rename(out / "kept", out / "shard-00001.h5");
  const auto message = error_of([&] { use(out); });
  EXPECT_THAT(message, HasSubstr("swapped"));
  EXPECT_THAT(message, AnyOf(HasSubstr("shard-00000.h5"), HasSubstr("shard-00001.h5")));
  EXPECT_EQ(verify_dataset(out, 1).size(), 2u);
}

TEST_F(DatasetTest, AnotherTokenizersShardIsNamed) {
  const TemporaryFolder other;
  auto options = small_preparation(other, *texts_);
  write_text(options.tokenizer, other_model());
  options.shard_tokens = 40000;
  prepare(options);
  // Only the shard: its checksum is not the manifest's.
  auto path = copy();
  std::filesystem::copy_file(options.output / "shard-00001.h5", path / "shard-00001.h5",
                             std::filesystem::copy_options::overwrite_existing);
  EXPECT_THAT(error_of([&] { use(path); }), HasSubstr("shard-00001.h5"));
  // The shard with its own manifest, but this set's tokenizer.
  path = copy();
  for (const auto& entry : std::filesystem::directory_iterator(options.output)) {
    if (entry.path().filename() != "tokenizer.model") {
      std::filesystem::copy_file(entry.path(), path / entry.path().filename(),
                                 std::filesystem::copy_options::overwrite_existing);
    }
  }
  EXPECT_THAT(error_of([&] { use(path); }), HasSubstr("not the tokenizer that made this data set"));
  // A manifest that was made to fit: the shard itself says which tokenizer made it.
  path = copy();
  Manifest manifest = read_manifest(path);
  manifest.shards[1] = read_manifest(options.output).shards[1];
  manifest.finish();
  write_text(path / "manifest.json", to_json(manifest));
  std::filesystem::copy_file(options.output / "shard-00001.h5", path / "shard-00001.h5",
                             std::filesystem::copy_options::overwrite_existing);
  const auto message = error_of([&] { use(path); });
  EXPECT_THAT(message, HasSubstr("shard-00001.h5"));
  EXPECT_THAT(message, HasSubstr("another tokenizer"));
}

TEST_F(DatasetTest, AFlippedBitAnywhereInAShardIsFoundAndTheShardNamed) {
  const std::string name = "shard-00001.h5";
  const auto path = copy();
  const std::string good = read_whole_file(path / name);
  RandomStream random(5);
  std::vector<std::size_t> places;
  // All of the header's first bytes, where the parser is most easily misled, and places all over the file.
  for (std::size_t at = 0; at < 600; at += 3) {
    places.push_back(at);
  }
  for (int i = 0; i < 300; ++i) {
    places.push_back(random.below(good.size()));
  }
  places.push_back(good.size() - 1);
  for (const std::size_t at : places) {
    std::string bad = good;
    bad[at] = static_cast<char>(bad[at] ^ (1 << random.below(8)));
    write_text(path / name, bad);
    EXPECT_THAT(error_of([&] { use(path); }), HasSubstr(name)) << "byte " << at;
    const auto errors = verify_dataset(path, 1);
    ASSERT_EQ(errors.size(), 1u) << "byte " << at;
    EXPECT_THAT(errors[0], HasSubstr(name));
  }
  write_text(path / name, good);
  use(path);
}

TEST_F(DatasetTest, DamagedDataIsNotHandedOut) {
  const auto path = copy();
  const Manifest manifest = read_manifest(path);
  std::string shard = read_whole_file(path / "shard-00000.h5");
  const std::size_t at = manifest.shards[0].token_offset + 65536 + 10;  // in the second block
  shard[at] = static_cast<char>(shard[at] ^ 1);
  write_text(path / "shard-00000.h5", shard);
  const Dataset dataset = Dataset::open(path);
  std::vector<std::int32_t> tokens(100, -7);
  dataset.read_tokens(0, tokens);  // the first block is whole
  std::fill(tokens.begin(), tokens.end(), -7);
  const auto message = error_of([&] { dataset.read_tokens(32768 + 200, tokens); });
  EXPECT_THAT(message, HasSubstr("tokens from 32768"));
  EXPECT_TRUE(std::all_of(tokens.begin(), tokens.end(), [](std::int32_t token) { return token == -7; }));
  // Again: a damaged block never counts as checked.
  EXPECT_THROW(dataset.read_tokens(32768 + 200, tokens), Error);
}

TEST_F(DatasetTest, AChangedManifestOrTokenizerIsFound) {
  for (const std::string name : {"manifest.json", "tokenizer.model"}) {
    const auto path = copy();
    const std::string good = read_whole_file(path / name);
    const std::string blank = " \n\t\r";
    RandomStream random(9);
    for (int i = 0; i < 200; ++i) {
      const std::size_t at = random.below(good.size());
      std::string bad = good;
      bad[at] = static_cast<char>(bad[at] ^ (1 << random.below(7)));
      if (blank.find(good[at]) != std::string::npos && blank.find(bad[at]) != std::string::npos) {
        continue;  // white space for white space means the same in JSON
      }
      write_text(path / name, bad);
      EXPECT_THROW((void)Dataset::open(path), Error) << name << " byte " << at;
    }
    for (const std::size_t left : {std::size_t{0}, good.size() / 2, good.size() - 3}) {
      write_text(path / name, good.substr(0, left));
      EXPECT_THAT(error_of([&] { (void)Dataset::open(path); }), HasSubstr(name));
    }
  }
}

TEST_F(DatasetTest, AnotherFormatVersionIsNamed) {
  const auto path = copy();
  std::string text = read_whole_file(path / "manifest.json");
  const std::string words = "\"format_version\": 1";
  text.replace(text.find(words), words.size(), "\"format_version\": 2");
  write_text(path / "manifest.json", text);
  EXPECT_THAT(error_of([&] { (void)Dataset::open(path); }), HasSubstr("format version 2"));
}

}  // namespace
}  // namespace attamba
