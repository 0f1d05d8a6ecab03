#include "data/tokenizer.h"

#include <gmock/gmock.h>
#include <sentencepiece_processor.h>

#include "tests/data/data_test_support.h"

namespace attamba {
namespace {

using testing::error_of;
using ::testing::HasSubstr;
using testing::made_up_text;
using testing::small_model;

std::vector<int> encoded_whole(const std::string& model, const std::string& text) {
  sentencepiece::SentencePieceProcessor processor;
  EXPECT_TRUE(processor.LoadFromSerializedProto(model).ok());
  return processor.EncodeAsIds(text);
}

std::vector<std::string> awkward_texts() {
  return {"",
          " ",
          "\n",
          "   ",
          "word",
          " word",
          "word ",
          "  two  spaces  ",
          "\n\nlines\n\n\nand  \n  more\n",
          "tabs\tand\r\nreturns",
          "mark \xe2\x96\x81 and\xe2\x96\x81 spaces \xe2\x96\x81\xe2\x96\x81  x",
          "emoji 😀😀 语语 語 \xe2\x80\x8b zero width",
          std::string("a\0b \0 c", 7),
          "1234567890 3.14159",
          std::string(3000, 'x') + " " + std::string(200, ' ') + "end",
          "<s> </s> <unk> <0x0A>"};
}

TEST(Tokenizer, CutsGiveTheTokensOfOneCall) {
  const Tokenizer tokenizer = Tokenizer::from_model(small_model(), "small");
  auto texts = awkward_texts();
  for (std::uint32_t i = 0; i < 20; ++i) {
    texts.push_back(made_up_text(i, 3000));
  }
  Encoder encoder(tokenizer, 64);  // few slots, so that words are forgotten again
  for (const auto& text : texts) {
    const auto whole = encoded_whole(small_model(), text);
    EXPECT_EQ(tokenizer.encode(text), whole) << text;
    std::vector<std::int32_t> remembered;
    encoder.append(text, true, remembered);
    EXPECT_EQ(remembered, whole) << text;
    // Any number of parts cut at cut_point().
    std::vector<std::int32_t> in_parts;
    std::string_view rest = text;
    bool begins = true;
    while (rest.size() > 400) {
      const std::size_t cut = tokenizer.cut_point(rest.substr(0, 400));
      ASSERT_GT(cut, 0u);
      encoder.append(rest.substr(0, cut), begins, in_parts);
      rest.remove_prefix(cut);
      begins = false;
    }
    encoder.append(rest, begins, in_parts);
    if (text.find("xxxx") == std::string::npos) {  // a word longer than the part has no exact cut
      EXPECT_EQ(in_parts, whole) << text;
    }
  }
}

TEST(Tokenizer, DecodingGivesTheTextBack) {
  const Tokenizer tokenizer = Tokenizer::from_model(small_model(), "small");
  auto texts = awkward_texts();
  texts.push_back(made_up_text(1000, 20000));
  for (const auto& text : texts) {
    if (text.find("\xe2\x96\x81") == std::string::npos) {
      EXPECT_EQ(tokenizer.decode(tokenizer.encode(text)), text);
    }
  }
  // SentencePiece writes spaces as U+2581; a literal one is the exception that its own format makes.
  EXPECT_EQ(tokenizer.decode(tokenizer.encode("a\xe2\x96\x81z")), "a z");
}

TEST(Tokenizer, SpecialPiecesAreNeverText) {
  const Tokenizer tokenizer = Tokenizer::from_model(small_model(), "small");
  EXPECT_EQ(tokenizer.bos(), 1);
  EXPECT_EQ(tokenizer.eos(), 2);
  EXPECT_EQ(tokenizer.unknown(), 0);
  EXPECT_EQ(tokenizer.vocabulary_size(), 400);
  for (const std::int32_t token : tokenizer.encode("<s> </s> <unk> 語 😀")) {
    EXPECT_GT(token, 2);
  }
  const std::vector<std::int32_t> document = {1, 2};
  EXPECT_EQ(tokenizer.decode(document), "");
  const std::vector<std::int32_t> outside = {400};
  EXPECT_THAT(error_of([&] { (void)tokenizer.decode(outside); }), HasSubstr("token 400 is outside the vocabulary of 400"));
}

TEST(Tokenizer, UnigramRoundTrips) {
  std::uint32_t number = 0;
  const std::string model = train_tokenizer({.vocabulary_size = 500, .kind = VocabularyKind::unigram}, [&](std::string& text) {
    text = made_up_text(number++, 4000);
    return number <= 20;
  });
  const Tokenizer tokenizer = Tokenizer::from_model(model, "unigram");
  const std::string text = made_up_text(1000, 5000);
  EXPECT_EQ(tokenizer.decode(tokenizer.encode(text)), text);
}

TEST(Tokenizer, NormalisingModelsStillEncodeEverything) {
  // A model as other programs make them: it trims spaces, so cuts are approximate.
  std::string model = small_model();
  model += std::string("\x1a\x02\x20\x01", 4);  // normalizer_spec.remove_extra_whitespaces = true
  const Tokenizer tokenizer = Tokenizer::from_model(model, "trimming");
  EXPECT_EQ(tokenizer.decode(tokenizer.encode("  some   words ")), "some words");
}

TEST(Tokenizer, FilesThatAreNoModelsAreNamed) {
  const TemporaryFolder folder;
  testing::write_text(folder / "bad.model", "this is text");
  testing::write_text(folder / "empty.model", "");
  testing::write_text(folder / "short.model", small_model().substr(0, small_model().size() / 2));
  for (const std::string name : {"bad.model", "empty.model", "short.model"}) {
    const auto message = error_of([&] { (void)Tokenizer::load(folder / name); });
    EXPECT_THAT(message, HasSubstr(name));
    EXPECT_THAT(message, HasSubstr("not a SentencePiece .model file"));
  }
  EXPECT_THAT(error_of([&] { (void)Tokenizer::load(folder / "absent.model"); }), HasSubstr("absent.model"));
}

std::string train_on(const std::string& text, std::int64_t size, VocabularyKind kind = VocabularyKind::bpe) {
  bool given = false;
  return train_tokenizer({.vocabulary_size = size, .kind = kind}, [&](std::string& next) {
    next = text;
    return !std::exchange(given, true);
  });
}

TEST(TrainTokenizer, NamesTheLargestVocabularyThatTheTextSupports) {
  const std::string text = "a small text supports a small vocabulary only\n";
  for (const std::int64_t size : {std::int64_t{5000}, std::int64_t{2147483647}, std::int64_t{1} << 62}) {
    const std::string message = error_of<UsageError>([&] { (void)train_on(text, size); });
    const std::string words = "ask for at most ";
    const auto at = message.find(words);
    ASSERT_NE(at, std::string::npos) << message;
    EXPECT_THAT(message, HasSubstr(std::to_string(size)));
    // The advice holds: that size works, one more does not.
    const std::int64_t most = std::stoll(message.substr(at + words.size()));
    EXPECT_EQ(Tokenizer::from_model(train_on(text, most), "most").vocabulary_size(), most);
    EXPECT_THROW((void)train_on(text, most + 1), UsageError);
  }
}

TEST(TrainTokenizer, NamesTheSmallestVocabularyThatTheTextNeeds) {
  const std::string text = "abcdefghijklmnopqrstuvwxyzäöü many characters\n";
  const std::string message = error_of<UsageError>([&] { (void)train_on(text, 262); });
  const std::string words = "ask for at least ";
  const auto at = message.find(words);
  ASSERT_NE(at, std::string::npos) << message;
  const std::int64_t least = std::stoll(message.substr(at + words.size()));
  EXPECT_EQ(Tokenizer::from_model(train_on(text, least), "least").vocabulary_size(), least);
  EXPECT_THROW((void)train_on(text, 3), UsageError);
  EXPECT_THROW((void)train_on(text, -1), UsageError);
}

TEST(TrainTokenizer, TextWithoutContentIsAnError) {
  for (const std::string text : {"", "\n\n", "\t"}) {
    EXPECT_THAT(error_of([&] { (void)train_on(text, 300); }), HasSubstr("no text"));
  }
}

TEST(TrainTokenizer, GivesTheSameModelAgain) {
  const std::string text = made_up_text(3, 20000);
  EXPECT_EQ(train_on(text, 350), train_on(text, 350));
}

}  // namespace
}  // namespace attamba
