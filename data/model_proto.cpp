#include "data/model_proto.h"

#include <cstdint>

namespace attamba {
namespace {

/// One field of a message: a number (wire type 0) or bytes (wire type 2). Fixed-size fields are skipped over.
struct Field {
  std::uint64_t number = 0;
  std::uint64_t value = 0;
  std::string_view bytes;
};

/// Walks over the fields of a serialised message.
class Fields {
 public:
  explicit Fields(std::string_view message) : rest_(message) {}

  /// False at the end, and when the message is malformed.
  bool next(Field& field) {
    field = {};
    std::uint64_t key = 0;
    if (rest_.empty() || !read_varint(key)) {
      return false;
    }
    field.number = key >> 3;
    switch (key & 7u) {
      case 0:
        return read_varint(field.value);
      case 1:
        return take(8, field.bytes);
      case 2: {
        std::uint64_t size = 0;
        return read_varint(size) && take(size, field.bytes);
      }
      case 5:
        return take(4, field.bytes);
      default:
        well_formed_ = false;
        return false;
    }
  }
  bool well_formed() const { return well_formed_; }

 private:
  bool read_varint(std::uint64_t& value) {
    value = 0;
    for (unsigned shift = 0; shift < 64; shift += 7) {
      if (rest_.empty()) {
        break;
      }
      const auto byte = static_cast<unsigned char>(rest_.front());
      rest_.remove_prefix(1);
      value |= std::uint64_t{byte & 0x7fu} << shift;
      if (byte < 0x80) {
        return true;
      }
    }
    well_formed_ = false;
    return false;
  }
  bool take(std::uint64_t size, std::string_view& bytes) {
    if (size > rest_.size()) {
      well_formed_ = false;
      return false;
    }
    bytes = rest_.substr(0, size);
    rest_.remove_prefix(size);
    return true;
  }

  std::string_view rest_;
  bool well_formed_ = true;
};

constexpr std::uint64_t kTrainerSpec = 2, kNormalizerSpec = 3;                                    // ModelProto
constexpr std::uint64_t kCharacterMap = 2, kDummyPrefix = 3, kExtraWhitespaces = 4, kEscape = 5;  // NormalizerSpec
constexpr std::uint64_t kWhitespaceAsSuffix = 24;                                                 // TrainerSpec

}  // namespace

std::optional<NormalizerSettings> read_normalizer_settings(std::string_view model) {
  NormalizerSettings settings;
  bool found = false;
  Fields fields(model);
  for (Field field; fields.next(field);) {
    Fields inner(field.number == kNormalizerSpec || field.number == kTrainerSpec ? field.bytes : std::string_view());
    for (Field setting; inner.next(setting);) {
      if (field.number == kTrainerSpec) {
        settings.whitespace_is_suffix =
            setting.number == kWhitespaceAsSuffix ? setting.value != 0 : settings.whitespace_is_suffix;
        continue;
      }
      switch (setting.number) {
        case kCharacterMap:
          settings.identity = setting.bytes.empty();
          break;
        case kDummyPrefix:
          settings.add_dummy_prefix = setting.value != 0;
          break;
        case kExtraWhitespaces:
          settings.remove_extra_whitespaces = setting.value != 0;
          break;
        case kEscape:
          settings.escape_whitespaces = setting.value != 0;
          break;
        default:
          break;
      }
    }
    if (!inner.well_formed()) {
      return std::nullopt;
    }
    found = found || field.number == kNormalizerSpec;
  }
  return fields.well_formed() && found ? std::optional(settings) : std::nullopt;
}

}  // namespace attamba
