// The few settings that are read straight from the bytes of a SentencePiece model, whose protocol buffer classes the installed
// library does not offer (sentencepiece_model.proto: ModelProto.normalizer_spec, ModelProto.trainer_spec).
#pragma once

#include <optional>
#include <string_view>

namespace attamba {

struct NormalizerSettings {
  bool identity = true;  ///< no character map
  bool add_dummy_prefix = true;
  bool remove_extra_whitespaces = true;
  bool escape_whitespaces = true;
  bool whitespace_is_suffix = false;
};

/// Nothing when the bytes are not a well-formed protocol buffer message with a normalizer_spec.
std::optional<NormalizerSettings> read_normalizer_settings(std::string_view model);

/// Appended to a serialised model, sets normalizer_spec.add_dummy_prefix to false: parsers merge repeated messages, last value
/// wins.
inline constexpr std::string_view kWithoutDummyPrefix{"\x1a\x02\x18\x00", 4};

}  // namespace attamba
