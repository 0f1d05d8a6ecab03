#include "data/prepare.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <sys/file.h>
#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <map>

#include "data/dataset.h"
#include "data/utf8.h"
#include "tests/data/data_test_support.h"

namespace attamba {
namespace {

using namespace testing;
using ::testing::HasSubstr;

std::string gzip(const std::string& text) {
  z_stream stream{};
  EXPECT_EQ(deflateInit2(&stream, 6, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY), Z_OK);
  std::string out(deflateBound(&stream, text.size()) + 64, '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(text.data()));
  stream.avail_in = static_cast<uInt>(text.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  EXPECT_EQ(deflate(&stream, Z_FINISH), Z_STREAM_END);
  out.resize(stream.total_out);
  deflateEnd(&stream);
  return out;
}

std::string zstd(const std::string& text) {
  std::string out(ZSTD_compressBound(text.size()), '\0');
  out.resize(ZSTD_compress(out.data(), out.size(), text.data(), text.size(), 3));
  return out;
}

/// Everything in a folder: name to bytes.
std::map<std::string, std::string> contents_of(const std::filesystem::path& folder) {
  std::map<std::string, std::string> contents;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(folder)) {
    if (entry.is_regular_file()) {
      contents[std::filesystem::relative(entry.path(), folder).string()] = read_whole_file(entry.path());
    }
  }
  return contents;
}

std::vector<std::int32_t> all_tokens(const Dataset& dataset) {
  std::vector<std::int32_t> tokens(dataset.token_count());
  dataset.read_tokens(0, tokens);
  return tokens;
}

void expect_holds(const std::filesystem::path& folder, std::span<const std::string> texts) {
  const Dataset dataset = Dataset::open(folder);
  const Tokenizer tokenizer = Tokenizer::load(dataset.tokenizer_model_path());
  const ExpectedTokens expected = expected_tokens(tokenizer, texts);
  EXPECT_EQ(all_tokens(dataset), expected.tokens);
  EXPECT_EQ(dataset.document_starts(0, dataset.token_count()), expected.starts);
  EXPECT_EQ(dataset.document_count(), texts.size());
  std::uint64_t bytes = 0;
  std::uint64_t words = 0;
  for (const auto& text : texts) {
    bytes += text.size();
    words += count_words(text);
  }
  EXPECT_EQ(dataset.text_bytes(), bytes);
  EXPECT_EQ(dataset.text_words(), words);
  EXPECT_TRUE(verify_dataset(folder, 2).empty());
}

TEST(Prepare, HoldsEveryDocumentOfAJsonLinesFile) {
  const TemporaryFolder folder;
  const auto texts = made_up_documents(100);
  prepare(small_preparation(folder, texts));
  expect_holds(folder / "out", texts);
  EXPECT_GT(Dataset::open(folder / "out").manifest().shards.size(), 5u);
  EXPECT_EQ(Dataset::open(folder / "out").manifest().vocabulary.token_bytes(), 2u);
}

TEST(Prepare, ReadsCompressedFilesAndFolders) {
  const TemporaryFolder folder;
  const auto texts = made_up_documents(30);
  const std::span<const std::string> all(texts);
  auto options = small_preparation(folder, texts);
  std::filesystem::create_directories(folder / "in" / ".hidden");
  std::filesystem::create_directories(folder.path() / "in" / "b");
  const auto in = folder / "in";
  write_text(in / "a.jsonl.gz", gzip(json_lines(all.subspan(0, 5))) + gzip(json_lines(all.subspan(5, 5))));
  write_text(in / "b" / "c.jsonl.zst", zstd(json_lines(all.subspan(10, 8))) + zstd(json_lines(all.subspan(18, 2))));
  write_text(in / "d.jsonl", "\n" + json_lines(all.subspan(20, 5)) + "  \n" + json_lines(all.subspan(25, 1)));
  write_text(in / "e.txt", texts[26]);
  write_text(in / "f.md.gz", gzip(texts[27]));
  write_text(in / "g.txt.zst", zstd(texts[28]));
  write_text(in / ".hidden" / "no.txt", "not this");
  write_text(in / "no.bin", "nor this");
  write_text(folder / "h", texts[29]);
  options.inputs = {in, folder / "h"};
  prepare(options);
  expect_holds(options.output, texts);
}

TEST(Prepare, CutsLargePlainTextWithoutATrace) {
  const TemporaryFolder folder;
  // Larger than a reader's piece (1 MiB) and than a worker's (128 KiB); one document whatever its size.
  const std::vector<std::string> texts = {made_up_text(1, 2700000), made_up_text(2, 400000)};
  auto options = small_preparation(folder, texts);
  write_text(folder / "1.txt", texts[0]);
  write_text(folder / "2.txt", texts[1]);
  options.inputs = {folder / "1.txt", folder / "2.txt"};
  options.shard_tokens = 100000;
  prepare(options);
  expect_holds(options.output, texts);
  const Dataset dataset = Dataset::open(options.output);
  EXPECT_GT(dataset.manifest().shards.size(), 2u);
  // The second shard lies inside the first document.
  EXPECT_EQ(dataset.manifest().shards[1].counts.documents, 0u);
  const std::uint64_t inside = dataset.manifest().shards[0].counts.tokens + 5;
  EXPECT_EQ(dataset.document_begin(inside), 0u);
}

TEST(Prepare, GivesTheSameFilesForAnyNumberOfThreads) {
  const TemporaryFolder folder;
  auto texts = made_up_documents(60);
  texts.push_back(made_up_text(5, 500000));
  auto options = small_preparation(folder, texts);
  prepare(options);
  const auto first = contents_of(options.output);
  for (const int threads : {1, 7}) {
    options.output = folder / ("out" + std::to_string(threads));
    options.threads = threads;
    prepare(options);
    EXPECT_EQ(contents_of(options.output), first);
  }
}

TEST(Prepare, ContinuesAfterAnInterruptionAndGivesTheSameFiles) {
  const TemporaryFolder folder;
  auto texts = made_up_documents(60);
  texts.insert(texts.begin() + 20, made_up_text(9, 30000));
  auto options = small_preparation(folder, texts);
  write_text(folder / "more.txt", made_up_text(11, 1500000));
  options.inputs.push_back(folder / "more.txt");
  options.valid_fraction = 0.1;
  prepare(options);
  const auto whole = contents_of(options.output);
  EXPECT_FALSE(whole.contains("train/unfinished.json"));

  options.output = folder / "resumed";
  std::size_t runs = 0;
  std::size_t shards_before = 0;
  for (bool done = false; !done; ++runs) {
    ASSERT_LT(runs, 100u);
    int left = 10 + static_cast<int>(runs);
    options.interrupted = [&] { return --left < 0; };
    try {
      prepare(options);
      done = true;
    } catch (const Error& error) {
      EXPECT_THAT(error.what(), HasSubstr("interrupted"));
      // What is there is never taken for a data set, and work is not lost.
      EXPECT_THAT(error_of([&] { (void)Dataset::open(options.output / "train"); }), HasSubstr("not a whole data set"));
      const auto now = contents_of(options.output);
      const auto shards = static_cast<std::size_t>(
          std::count_if(now.begin(), now.end(), [](const auto& file) { return file.first.ends_with(".h5"); }));
      EXPECT_GE(shards, shards_before);
      shards_before = shards;
      write_text(options.output / "train" / "shard-99999.h5.tmp", "left by a kill");
    }
  }
  EXPECT_GT(runs, 3u);
  EXPECT_EQ(contents_of(options.output), whole);
}

TEST(Prepare, RepeatedDoesNothingAndOtherOptionsAreRefused) {
  const TemporaryFolder folder;
  const auto texts = made_up_documents(20);
  auto options = small_preparation(folder, texts);
  prepare(options);
  const auto before = contents_of(options.output);
  const auto written = std::filesystem::last_write_time(options.output / "manifest.json");
  EXPECT_EQ(prepare(options).front().manifest.counts.documents, 20u);
  EXPECT_EQ(std::filesystem::last_write_time(options.output / "manifest.json"), written);

  write_text(options.output / "notes.txt", "kept");
  options.shard_tokens = 2000;
  EXPECT_THAT(error_of<UsageError>([&] { prepare(options); }), HasSubstr("--overwrite"));
  EXPECT_EQ(contents_of(options.output).at("manifest.json"), before.at("manifest.json"));
  options.overwrite = true;
  prepare(options);
  expect_holds(options.output, texts);
  EXPECT_EQ(contents_of(options.output).at("notes.txt"), "kept");
}

TEST(Prepare, HoldsOutAShareOfTheDocuments) {
  const TemporaryFolder folder;
  const auto texts = made_up_documents(400);
  auto options = small_preparation(folder, texts);
  options.valid_fraction = 0.05;
  const auto sets = prepare(options);
  ASSERT_EQ(sets.size(), 2u);
  EXPECT_EQ(sets[1].manifest.counts.documents, 20u);  // one of each 20
  EXPECT_EQ(sets[0].manifest.counts.documents, 380u);
  // Together they are the whole, each document in one of them, in order.
  const Dataset train = Dataset::open(options.output / "train");
  const Dataset valid = Dataset::open(options.output / "valid");
  const Tokenizer tokenizer = Tokenizer::load(train.tokenizer_model_path());
  std::size_t next[2] = {0, 0};
  for (const auto& text : texts) {
    auto tokens = tokenizer.encode(text);
    tokens.insert(tokens.begin(), tokenizer.bos());
    const auto is_next = [&](const Dataset& dataset, std::size_t& i) {
      if (i == dataset.document_count()) {
        return false;
      }
      std::vector<std::int32_t> found(tokens.size());
      const std::uint64_t begin = dataset.document_position(i);
      if (begin + found.size() > dataset.token_count()) {
        return false;
      }
      dataset.read_tokens(begin, found);
      i += found == tokens ? 1 : 0;
      return found == tokens;
    };
    EXPECT_TRUE(is_next(train, next[0]) || is_next(valid, next[1]));
  }
}

TEST(Prepare, TakesHeldOutFilesAndTrainsAVocabularyWithoutThem) {
  const TemporaryFolder folder;
  const auto texts = made_up_documents(50);
  const std::vector<std::string> held_out = {"ЖЖЖ held out text of its own"};
  auto options = small_preparation(folder, texts);
  write_text(folder / "valid.jsonl", json_lines(held_out));
  options.tokenizer.clear();
  options.training.vocabulary_size = 420;
  options.valid_inputs = {folder / "valid.jsonl"};
  prepare(options);
  expect_holds(options.output / "train", texts);
  expect_holds(options.output / "valid", held_out);
  const Tokenizer tokenizer = Tokenizer::load(options.output / "valid" / "tokenizer.model");
  EXPECT_EQ(tokenizer.vocabulary_size(), 420);
  EXPECT_EQ(tokenizer.hash(), Tokenizer::load(options.output / "train" / "tokenizer.model").hash());
  EXPECT_EQ(tokenizer.encode("Ж").size(), tokenizer.encode("").size() + 3);  // the space, and the bytes of an unseen character
  options.valid_inputs = options.inputs;
  options.output = folder / "twice";
  EXPECT_THAT(error_of<UsageError>([&] { prepare(options); }), HasSubstr("named twice"));
}

TEST(Prepare, StoresWideTokensOfALargeVocabulary) {
  const TemporaryFolder folder;
  const std::vector<std::string> texts = {"zz66000 and zz65999\n", made_up_text(1, 2000)};
  auto options = small_preparation(folder, texts);
  // Appends pieces to the model: ModelProto.pieces {piece, score}.
  std::string model = small_model();
  for (int i = 0; i < 66001; ++i) {
    const std::string piece = "zz" + std::to_string(i);
    std::string message =
        "\x0a" + std::string(1, static_cast<char>(piece.size())) + piece + "\x15" + std::string("\x00\x00\x80\x40", 4);
    message += "\x18\x04";  // user defined: always found
    model += "\x0a" + std::string(1, static_cast<char>(message.size())) + message;
  }
  write_text(options.tokenizer, model);
  prepare(options);
  expect_holds(options.output, texts);
  const Dataset dataset = Dataset::open(options.output);
  EXPECT_EQ(dataset.vocabulary_size(), 66401);
  EXPECT_EQ(dataset.manifest().vocabulary.token_bytes(), 4u);
  const auto tokens = all_tokens(dataset);
  EXPECT_NE(std::find(tokens.begin(), tokens.end(), 66400), tokens.end());
}

TEST(Prepare, LeavesOutEmptyDocuments) {
  const TemporaryFolder folder;
  const std::vector<std::string> texts = {"one", "", "two", ""};
  const std::vector<std::string> expected = {"one", "two", "three"};
  auto options = small_preparation(folder, texts);
  write_text(folder / "empty.txt", "");
  write_text(folder / "three.txt", "three");
  options.inputs.push_back(folder / "empty.txt");
  options.inputs.push_back(folder / "three.txt");
  EXPECT_EQ(prepare(options).front().manifest.counts.empty_documents, 3u);
  expect_holds(options.output, expected);
}

/// Prepares one input file of this content and gives the error's message; nothing that could be taken for a data set is left.
std::string failure_for(const std::string& name, const std::string& content, bool text_before = false) {
  const TemporaryFolder folder;
  const auto texts = made_up_documents(40);
  auto options = small_preparation(folder, texts);
  if (!text_before) {
    options.inputs.clear();
  }
  write_text(folder / name, content);
  options.inputs.push_back(folder / name);
  const std::string message = error_of([&] { prepare(options); });
  EXPECT_THROW((void)Dataset::open(options.output), Error);
  for (const auto& [file, bytes] : contents_of(options.output)) {
    EXPECT_FALSE(file.ends_with(".tmp")) << file;
    EXPECT_NE(file, "manifest.json");
  }
  return message;
}

TEST(PrepareErrors, EmptyText) {
  EXPECT_THAT(failure_for("empty.txt", ""), HasSubstr("holds no text"));
  EXPECT_THAT(failure_for("empty.jsonl", ""), HasSubstr("holds no text"));
  EXPECT_THAT(failure_for("empty.jsonl", "{\"text\": \"\"}\n\n"), HasSubstr("holds no text"));
  const TemporaryFolder folder;
  auto options = small_preparation(folder, {});
  std::filesystem::create_directories(folder / "nothing");
  options.inputs = {folder / "nothing"};
  EXPECT_THAT(error_of([&] { prepare(options); }), HasSubstr("holds no text"));
}

TEST(PrepareErrors, TextThatIsNotUtf8IsNamedWithFileAndByte) {
  const std::string good = made_up_text(1, 300);
  for (const bool text_before : {false, true}) {
    auto message = failure_for("bad.txt", good + "\xff more", text_before);
    EXPECT_THAT(message, HasSubstr("bad.txt': byte " + std::to_string(good.size()) + " is not UTF-8"));
    message = failure_for("bad.txt.gz", gzip(good + "\xe8\xaf"), text_before);
    EXPECT_THAT(message, HasSubstr("bad.txt.gz': byte " + std::to_string(good.size()) + " is not UTF-8"));
    const std::string lines = "{\"text\": \"fine\"}\n{\"text\": \"not \xc0\xaf fine\"}\n";
    message = failure_for("bad.jsonl", lines, text_before);
    EXPECT_THAT(message, HasSubstr("bad.jsonl': byte " + std::to_string(lines.find('\xc0')) + " is not UTF-8"));
  }
  // Far behind the first pieces.
  const std::string large = made_up_text(2, 2500000);
  EXPECT_THAT(failure_for("large.txt", large + "\x80" + large),
              HasSubstr("byte " + std::to_string(large.size()) + " is not UTF-8"));
}

TEST(PrepareErrors, TheFirstErrorOfTheInputIsReported) {
  // Many bad lines: which worker is fastest must not matter.
  std::string lines;
  for (int i = 0; i < 50; ++i) {
    lines += "{\"text\": \"fine\"}\n";
  }
  const std::size_t first = lines.size();
  for (int i = 0; i < 200; ++i) {
    lines += "not json\n";
  }
  for (int i = 0; i < 10; ++i) {
    EXPECT_THAT(failure_for("bad.jsonl", lines), HasSubstr("the line at byte " + std::to_string(first) + " is not JSON"));
  }
}

TEST(PrepareErrors, LinesThatAreNoDocuments) {
  EXPECT_THAT(failure_for("a.jsonl", "[1, 2]\n"), HasSubstr("not a JSON object"));
  EXPECT_THAT(failure_for("a.jsonl", "{\"content\": \"x\"}\n"), HasSubstr("no field \"text\""));
  EXPECT_THAT(failure_for("a.jsonl", "{\"text\": 5}\n"), HasSubstr("not a string"));
  EXPECT_THAT(failure_for("a.jsonl", "{\"text\": \"x\"}\n{\"text\": \"cut o"), HasSubstr("the line at byte 14 is not JSON"));
  EXPECT_THAT(failure_for("a.jsonl", "{\"text\": \"\\ud800\"}\n"), HasSubstr("not JSON"));
}

TEST(PrepareErrors, DamagedCompressedFiles) {
  const std::string text = made_up_text(1, 100000);
  for (const std::string name : {"a.txt.gz", "a.txt.zst"}) {
    const std::string packed = name.ends_with("gz") ? gzip(text) : zstd(text);
    EXPECT_THAT(failure_for(name, packed.substr(0, packed.size() / 2)), HasSubstr("truncated"));
    EXPECT_THAT(failure_for(name, packed.substr(0, packed.size() - 1)), HasSubstr("truncated"));
    EXPECT_THAT(failure_for(name, packed + "tail that is no frame"), HasSubstr("damaged"));
    EXPECT_THAT(failure_for(name, text), HasSubstr(name));
  }
}

TEST(PrepareErrors, MissingFilesAndWrongModels) {
  const TemporaryFolder folder;
  const auto texts = made_up_documents(3);
  auto options = small_preparation(folder, texts);
  options.inputs = {folder / "absent.txt"};
  EXPECT_THAT(error_of([&] { prepare(options); }), HasSubstr("absent.txt': No such file"));
  options.inputs = {folder / "text.jsonl"};
  options.tokenizer = folder / "text.jsonl";
  EXPECT_THAT(error_of([&] { prepare(options); }), HasSubstr("not a SentencePiece .model"));
  options.tokenizer.clear();
  options.training.vocabulary_size = 2147483647;
  EXPECT_THAT(error_of<UsageError>([&] { prepare(options); }), HasSubstr("ask for at most"));
  EXPECT_THROW((void)Dataset::open(options.output), Error);
  options.valid_fraction = 0.001;
  options.tokenizer = folder / "small.model";
  EXPECT_THAT(error_of<UsageError>([&] { prepare(options); }), HasSubstr("--valid"));
}

TEST(PrepareErrors, PlacesThatCannotBeWritten) {
  const TemporaryFolder folder;
  const auto texts = made_up_documents(3);
  auto options = small_preparation(folder, texts);
  options.output = folder / "text.jsonl";
  EXPECT_THAT(error_of([&] { prepare(options); }), HasSubstr("text.jsonl"));
  options.output = folder / "text.jsonl" / "below";
  EXPECT_THAT(error_of([&] { prepare(options); }), HasSubstr("below"));
  // A place where not even the superuser may write.
  options.output = "/proc/attamba-data";
  EXPECT_THAT(error_of([&] { prepare(options); }), HasSubstr("cannot make the folder '/proc/attamba-data'"));
  if (::geteuid() != 0) {
    std::filesystem::create_directories(folder / "closed");
    std::filesystem::permissions(folder / "closed", std::filesystem::perms::owner_read | std::filesystem::perms::owner_exec);
    options.output = folder / "closed";
    EXPECT_THAT(error_of([&] { prepare(options); }), HasSubstr("check the permissions"));
  }
}

TEST(PrepareErrors, TwoPreparationsOfOneFolder) {
  const TemporaryFolder folder;
  const auto texts = made_up_documents(3);
  auto options = small_preparation(folder, texts);
  std::filesystem::create_directories(options.output);
  const FileDescriptor other(::open((options.output / ".prepare.lock").c_str(), O_RDWR | O_CREAT, 0666));
  ASSERT_EQ(::flock(other.get(), LOCK_EX), 0);
  EXPECT_THAT(error_of([&] { prepare(options); }), HasSubstr("another 'attamba data prepare'"));
}

TEST(Prepare, RealTextWithTheTokenizerOfThePublishedRuns) {
  const std::filesystem::path data = std::filesystem::path(ATTAMBA_SOURCE_DIR) / ".." / "shared" / "data";
  if (!std::filesystem::exists(data / "wiki.test.raw")) {
    GTEST_SKIP() << "no " << data;
  }
  const TemporaryFolder folder;
  PrepareOptions options;
  options.inputs = {data / "wiki.test.raw"};
  options.output = folder / "out";
  options.tokenizer = data / "llama2.tokenizer.model";
  prepare(options);
  const std::vector<std::string> texts = {read_whole_file(data / "wiki.test.raw")};
  expect_holds(options.output, texts);
  const Dataset dataset = Dataset::open(options.output);
  EXPECT_EQ(dataset.text_words(), 241211u);  // as published for this set, without its line ends
  const Tokenizer tokenizer = Tokenizer::load(options.tokenizer);
  EXPECT_EQ(tokenizer.decode(all_tokens(dataset)), texts[0]);
}

}  // namespace
}  // namespace attamba
