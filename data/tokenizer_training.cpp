#include <sentencepiece_trainer.h>

#include <algorithm>
#include <unordered_map>

#include "data/tokenizer.h"
#include "src/core/error.h"

namespace attamba {
namespace {

/// No text of this size of sample supports more pieces; SentencePiece loops for sizes near its integers' limit.
constexpr std::int64_t kLargestVocabulary = std::int64_t{1} << 24;

/// 256 bytes, BOS, EOS and unknown, and one character.
constexpr std::int64_t kSmallestVocabulary = 260;

/// Longer lines are cut: SentencePiece leaves out whole lines above its limit of 65535 bytes.
constexpr std::size_t kLongestSentence = 32768;

/// Gives SentencePiece the texts line by line. Newlines and tabs are left out, so they always become their byte's token: no
/// piece reaches across them, and texts can be cut there.
class Sentences : public sentencepiece::SentenceIterator {
 public:
  explicit Sentences(const NextText& next) : next_(next) { advance(); }

  bool done() const override { return done_; }
  void Next() override { advance(); }
  const std::string& value() const override { return sentence_; }
  sentencepiece::util::Status status() const override { return {}; }
  std::uint64_t bytes() const { return bytes_; }

 private:
  void advance() {
    for (;;) {
      while (at_ < text_.size() && is_separator(text_[at_])) {
        ++at_;
      }
      if (at_ < text_.size()) {
        break;
      }
      at_ = 0;
      if (!next_(text_)) {
        done_ = true;
        return;
      }
    }
    std::size_t end = at_;
    while (end < text_.size() && !is_separator(text_[end]) &&
           (end - at_ < kLongestSentence || (static_cast<unsigned char>(text_[end]) & 0xc0u) == 0x80u)) {
      ++end;
    }
    sentence_.assign(text_, at_, end - at_);
    bytes_ += sentence_.size();
    at_ = end;
  }
  static bool is_separator(char c) { return c == '\n' || c == '\t' || c == '\r' || c == '\0'; }

  const NextText& next_;
  std::string text_;
  std::size_t at_ = 0;
  std::string sentence_;
  std::uint64_t bytes_ = 0;
  bool done_ = false;
};

/// The number after `words` in a message of the library, or -1.
std::int64_t number_after(const std::string& message, std::string_view words) {
  const std::size_t at = message.find(words);
  if (at == std::string::npos) {
    return -1;
  }
  std::int64_t number = -1;
  for (std::size_t i = at + words.size(); i < message.size() && message[i] >= '0' && message[i] <= '9'; ++i) {
    number = std::max<std::int64_t>(number, 0) * 10 + (message[i] - '0');
  }
  return number;
}

}  // namespace

std::string train_tokenizer(const TokenizerTraining& training, const NextText& next) {
  require<UsageError>(training.vocabulary_size >= kSmallestVocabulary, "vocabulary: ", training.vocabulary_size,
                      " pieces are too few; ask for at least ", kSmallestVocabulary,
                      " (the 256 bytes, three special ones, and the characters of the text)");
  Sentences sentences(next);
  require(!sentences.done(), "vocabulary: there is no text to learn it from");
  const std::unordered_map<std::string, std::string> settings = {
      {"vocab_size", std::to_string(std::min(training.vocabulary_size, kLargestVocabulary))},
      {"model_type", training.kind == VocabularyKind::bpe ? "bpe" : "unigram"},
      {"normalization_rule_name", "identity"},
      {"remove_extra_whitespaces", "false"},
      {"allow_whitespace_only_pieces", "true"},
      {"byte_fallback", "true"},
      {"split_digits", "true"},
      {"character_coverage", "0.9999"},
      {"max_sentence_length", "65535"},
      {"num_threads", std::to_string(training.threads)},
      {"minloglevel", "2"},
  };
  std::string model;
  const auto status = sentencepiece::SentencePieceTrainer::Train(settings, &sentences, &model);
  if (!status.ok()) {
    const std::string message = status.ToString();
    const std::int64_t most = number_after(message, "Please set it to a value <= ");
    require<UsageError>(most < 0, "vocabulary: ", training.vocabulary_size, " pieces are more than the ", sentences.bytes(),
                        " bytes of text support; ask for at most ", most, " or give more text");
    const std::int64_t fewest = number_after(message, std::to_string(training.vocabulary_size) + " vs ");
    require<UsageError>(fewest < 0, "vocabulary: ", training.vocabulary_size,
                        " pieces are fewer than the text's characters need; ask for at least ", fewest);
    throw Error(concat("vocabulary: SentencePiece could not learn ", training.vocabulary_size, " pieces: ", message));
  }
  return model;
}

}  // namespace attamba
