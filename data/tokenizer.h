// The SentencePiece tokenizer, and the training of new ones.
//
// Encoding a long text in one call is slow (the cost per byte grows with the length), so texts are cut where no piece of the
// vocabulary can reach across: after a newline, and before a run of spaces. Whether that holds is read off the model itself;
// the tokens are then exactly those of one call on the whole text. Words between such cuts repeat, so an Encoder remembers
// theirs.
//
// decode(encode(text)) == text for the vocabularies that train_tokenizer() makes, newlines and runs of spaces included, with
// one exception that SentencePiece itself has: U+2581, its mark for a space, comes back as a space.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace attamba {

class Tokenizer {
 public:
  /// Reads a SentencePiece .model file; throws naming the file when it is not one.
  static Tokenizer load(const std::filesystem::path& path);
  /// The same from the bytes of such a file; `name` stands for it in messages.
  static Tokenizer from_model(std::string model, const std::string& name);

  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();

  /// The pieces of a text, without BOS and EOS.
  std::vector<std::int32_t> encode(std::string_view text) const;
  /// Control tokens (BOS, EOS) decode to nothing. Throws on a token outside the vocabulary.
  std::string decode(std::span<const std::int32_t> tokens) const;

  std::int32_t vocabulary_size() const;
  /// -1 where the vocabulary has no such token.
  std::int32_t bos() const;
  std::int32_t eos() const;
  std::int32_t unknown() const;
  /// The piece as the vocabulary spells it, for display.
  const std::string& piece(std::int32_t token) const;

  /// SHA-256 of the model file.
  const std::string& hash() const;
  /// The bytes of the model file.
  const std::string& model() const;

  /// The largest cut point c in (0, text.size()) such that text[0, c) and text[c, ...) can be encoded apart without changing a
  /// token; when there is none, the best approximation: after a newline, else before a space, else between two characters.
  /// Returns text.size() for a text of fewer than two bytes.
  std::size_t cut_point(std::string_view text) const;

 private:
  friend class Encoder;
  struct State;
  explicit Tokenizer(std::unique_ptr<const State> state);
  std::unique_ptr<const State> state_;
};

/// Encodes many texts, remembering the tokens of recent words. One per thread; the tokenizer must outlive it.
class Encoder {
 public:
  /// `cached_words` slots of 96 bytes; rounded up to a power of two.
  explicit Encoder(const Tokenizer& tokenizer, std::size_t cached_words = std::size_t{1} << 15);

  /// Appends the tokens of `text`. `begins_document`: false for a later part of a document cut at Tokenizer::cut_point().
  void append(std::string_view text, bool begins_document, std::vector<std::int32_t>& tokens);

 private:
  static constexpr std::size_t kWordBytes = 38;
  static constexpr std::size_t kWordTokens = 14;
  struct Slot {
    std::uint8_t bytes = 0;  ///< 0: empty
    std::uint8_t token_count = 0;
    char text[kWordBytes] = {};
    std::int32_t tokens[kWordTokens] = {};
  };
  void append_word(std::string_view word, std::vector<std::int32_t>& tokens);

  const Tokenizer::State& state_;
  std::vector<Slot> slots_;
  std::vector<int> ids_;
  std::string first_word_;
};

enum class VocabularyKind { bpe, unigram };

struct TokenizerTraining {
  std::int64_t vocabulary_size = 32000;
  VocabularyKind kind = VocabularyKind::bpe;
  int threads = 1;
};

/// Gives the next text of a training sample, or false at the end.
using NextText = std::function<bool(std::string& text)>;

/// Trains a vocabulary (identity normalisation, byte fallback, digits split, BOS 1, EOS 2, unknown 0) and returns the bytes of
/// its .model file. A size that the text cannot support is a UsageError that names the sizes that it can.
std::string train_tokenizer(const TokenizerTraining& training, const NextText& next);

}  // namespace attamba
