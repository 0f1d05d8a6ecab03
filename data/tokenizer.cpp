#include "data/tokenizer.h"

#include <sentencepiece_processor.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "data/files.h"
#include "data/model_proto.h"
#include "data/sha256.h"
#include "data/utf8.h"
#include "src/core/error.h"

namespace attamba {
namespace {

/// SentencePiece's mark for a space, U+2581.
constexpr std::string_view kSpaceMark = "\xe2\x96\x81";

/// Where no cut is exact, texts are cut into pieces of about this size: large enough to make the inexact cuts rare.
constexpr std::size_t kCoarsePiece = 16384;

/// True when the piece has a space mark after something else: then a piece can reach across the cut before a run of spaces.
bool reaches_across_space(std::string_view piece) {
  const std::size_t last = piece.rfind(kSpaceMark);
  if (last == std::string_view::npos) {
    return false;
  }
  for (std::size_t at = 0; at < last; at += kSpaceMark.size()) {
    if (piece.substr(at, kSpaceMark.size()) != kSpaceMark) {
      return true;
    }
  }
  return false;
}

/// True when the piece has a newline followed by something else than a newline.
bool reaches_across_newline(std::string_view piece) {
  for (std::size_t at = 0; at + 1 < piece.size(); ++at) {
    if (piece[at] == '\n' && piece[at + 1] != '\n') {
      return true;
    }
  }
  return false;
}

}  // namespace

struct Tokenizer::State {
  std::string model;
  std::string hash;
  sentencepiece::SentencePieceProcessor processor;
  /// The same model without the space that SentencePiece puts before a text.
  sentencepiece::SentencePieceProcessor bare;
  NormalizerSettings normalizer;
  bool exact = false;          ///< the normaliser is the identity: cuts can be exact
  bool cuts_spaces = false;    ///< exact before a run of spaces
  bool cuts_newlines = false;  ///< exact after a run of newlines

  /// Whether text[at - 1] | text[at] is a cut that no piece reaches across. 0 < at < text.size().
  bool is_cut(std::string_view text, std::size_t at) const {
    if (text[at] == ' ') {
      return cuts_spaces && text[at - 1] != ' ' && !text.substr(0, at).ends_with(kSpaceMark);
    }
    return cuts_newlines && text[at - 1] == '\n' && text[at] != '\n';
  }
};

Tokenizer::Tokenizer(std::unique_ptr<const State> state) : state_(std::move(state)) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

Tokenizer Tokenizer::load(const std::filesystem::path& path) {
  return from_model(read_whole_file(path), path.string());
}

Tokenizer Tokenizer::from_model(std::string model, const std::string& name) {
  auto state = std::make_unique<State>();
  const auto normalizer = read_normalizer_settings(model);
  const bool loaded = normalizer && state->processor.LoadFromSerializedProto(model).ok() &&
                      state->bare.LoadFromSerializedProto(model + std::string(kWithoutDummyPrefix)).ok();
  require(loaded, "tokenizer '", name, "': this is not a SentencePiece .model file (", model.size(), " bytes)");
  state->normalizer = *normalizer;
  state->hash = sha256(model);
  state->model = std::move(model);

  const auto& processor = state->processor;
  bool across_space = false;
  bool across_newline = false;
  for (int id = 0; id < processor.GetPieceSize(); ++id) {
    across_space = across_space || reaches_across_space(processor.IdToPiece(id));
    across_newline = across_newline || reaches_across_newline(processor.IdToPiece(id));
  }
  // Neighbouring unknown characters become one unknown token, so a cut is exact only beside a known one.
  const auto known = [&](std::string_view piece) { return !processor.IsUnknown(processor.PieceToId(piece)); };
  const bool known_newline = known("\n") || known("<0x0A>");
  state->exact = normalizer->identity && !normalizer->remove_extra_whitespaces && normalizer->escape_whitespaces &&
                 !normalizer->whitespace_is_suffix;
  state->cuts_spaces = state->exact && !across_space && known(kSpaceMark);
  state->cuts_newlines = state->exact && !across_newline && known_newline;
  return Tokenizer(std::move(state));
}

std::vector<std::int32_t> Tokenizer::encode(std::string_view text) const {
  std::vector<std::int32_t> tokens;
  Encoder(*this, 1024).append(text, true, tokens);
  return tokens;
}

std::string Tokenizer::decode(std::span<const std::int32_t> tokens) const {
  for (const std::int32_t token : tokens) {
    require(token >= 0 && token < vocabulary_size(), "tokenizer: token ", token, " is outside the vocabulary of ",
            vocabulary_size());
  }
  std::string text;
  const auto status = state_->processor.Decode(std::vector<int>(tokens.begin(), tokens.end()), &text);
  require(status.ok(), "tokenizer: decoding failed: ", status.ToString());
  return text;
}

std::int32_t Tokenizer::vocabulary_size() const {
  return state_->processor.GetPieceSize();
}
std::int32_t Tokenizer::bos() const {
  return state_->processor.bos_id();
}
std::int32_t Tokenizer::eos() const {
  return state_->processor.eos_id();
}
std::int32_t Tokenizer::unknown() const {
  return state_->processor.unk_id();
}
const std::string& Tokenizer::piece(std::int32_t token) const {
  require(token >= 0 && token < vocabulary_size(), "tokenizer: token ", token, " is outside the vocabulary of ",
          vocabulary_size());
  return state_->processor.IdToPiece(token);
}
const std::string& Tokenizer::hash() const {
  return state_->hash;
}
const std::string& Tokenizer::model() const {
  return state_->model;
}

std::size_t Tokenizer::cut_point(std::string_view text) const {
  std::size_t space = 0;
  std::size_t character = 0;
  for (std::size_t at = text.size(); at-- > 1;) {
    if (state_->cuts_newlines || state_->cuts_spaces ? state_->is_cut(text, at) : text[at - 1] == '\n' && text[at] != '\n') {
      return at;
    }
    if (space == 0 && text[at] == ' ') {
      space = at;
    }
    if (character == 0 && begins_character(text[at])) {
      character = at;
    }
  }
  if (space != 0) {
    return space;
  }
  return character != 0 ? character : text.size();
}

Encoder::Encoder(const Tokenizer& tokenizer, std::size_t cached_words) : state_(*tokenizer.state_) {
  static_assert(sizeof(Slot) == 96);
  if (state_.cuts_spaces) {
    slots_.resize(std::bit_ceil(std::max<std::size_t>(cached_words, 1)));
  }
}

void Encoder::append_word(std::string_view word, std::vector<std::int32_t>& tokens) {
  Slot* slot = nullptr;
  if (!slots_.empty() && word.size() <= kWordBytes) {
    slot = &slots_[std::hash<std::string_view>{}(word) & (slots_.size() - 1)];
    if (std::string_view(slot->text, slot->bytes) == word) {
      tokens.insert(tokens.end(), slot->tokens, slot->tokens + slot->token_count);
      return;
    }
  }
  const auto status = state_.bare.Encode(word, &ids_);
  require(status.ok(), "tokenizer: encoding failed: ", status.ToString());
  tokens.insert(tokens.end(), ids_.begin(), ids_.end());
  if (slot != nullptr && ids_.size() <= kWordTokens) {
    slot->bytes = static_cast<std::uint8_t>(word.size());
    slot->token_count = static_cast<std::uint8_t>(ids_.size());
    std::memcpy(slot->text, word.data(), word.size());
    std::copy(ids_.begin(), ids_.end(), slot->tokens);
  }
}

void Encoder::append(std::string_view text, bool begins_document, std::vector<std::int32_t>& tokens) {
  if (text.empty()) {
    return;
  }
  if (!state_.exact) {
    // A normaliser that trims spaces treats every piece as a text of its own; any other gets its leading space only once.
    while (!text.empty()) {
      std::size_t end = std::min(text.size(), kCoarsePiece);
      end = end < text.size() ? std::min(text.find('\n', end), text.size() - 1) + 1 : end;
      const bool whole = begins_document || state_.normalizer.remove_extra_whitespaces;
      const auto status = (whole ? state_.processor : state_.bare).Encode(text.substr(0, end), &ids_);
      require(status.ok(), "tokenizer: encoding failed: ", status.ToString());
      tokens.insert(tokens.end(), ids_.begin(), ids_.end());
      text.remove_prefix(end);
      begins_document = false;
    }
    return;
  }
  std::size_t begin = 0;
  for (std::size_t at = 1; at <= text.size(); ++at) {
    if (at < text.size() && ((text[at] != ' ' && text[at - 1] != '\n') || !state_.is_cut(text, at))) {
      continue;
    }
    const std::string_view word = text.substr(begin, at - begin);
    if (begin == 0 && begins_document && state_.normalizer.add_dummy_prefix) {
      first_word_.assign(1, ' ').append(word);
      append_word(first_word_, tokens);
    } else {
      append_word(word, tokens);
    }
    begin = at;
  }
}

}  // namespace attamba
