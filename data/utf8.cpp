#include "data/utf8.h"

#include <cstring>

namespace attamba {
namespace {

/// The length of the well-formed sequence at the head of [at, end), or 0.
std::size_t sequence_length(const unsigned char* at, const unsigned char* end) {
  const unsigned lead = at[0];
  const auto follows = [&](std::size_t i, unsigned low, unsigned high) {
    return at + i < end && at[i] >= low && at[i] <= high;
  };
  if (lead < 0x80) {
    return 1;
  }
  if (lead >= 0xc2 && lead <= 0xdf) {
    return follows(1, 0x80, 0xbf) ? 2 : 0;
  }
  if (lead >= 0xe0 && lead <= 0xef) {
    // No overlong forms (e0) and no surrogates (ed).
    const unsigned low = lead == 0xe0 ? 0xa0 : 0x80;
    const unsigned high = lead == 0xed ? 0x9f : 0xbf;
    return follows(1, low, high) && follows(2, 0x80, 0xbf) ? 3 : 0;
  }
  if (lead >= 0xf0 && lead <= 0xf4) {
    // No overlong forms (f0) and nothing above U+10FFFF (f4).
    const unsigned low = lead == 0xf0 ? 0x90 : 0x80;
    const unsigned high = lead == 0xf4 ? 0x8f : 0xbf;
    return follows(1, low, high) && follows(2, 0x80, 0xbf) && follows(3, 0x80, 0xbf) ? 4 : 0;
  }
  return 0;
}

}  // namespace

std::size_t first_invalid_utf8(std::string_view text) {
  const auto* begin = reinterpret_cast<const unsigned char*>(text.data());
  const auto* end = begin + text.size();
  const auto* at = begin;
  while (at < end) {
    while (end - at >= 8) {
      std::uint64_t word = 0;
      std::memcpy(&word, at, sizeof(word));
      if ((word & 0x8080808080808080u) != 0) {
        break;
      }
      at += 8;
    }
    if (at == end) {
      break;
    }
    const std::size_t length = sequence_length(at, end);
    if (length == 0) {
      return static_cast<std::size_t>(at - begin);
    }
    at += length;
  }
  return text.size();
}

std::uint64_t count_words(std::string_view text, bool inside_word) {
  std::uint64_t words = 0;
  bool space_before = !inside_word;
  for (const char c : text) {
    const bool space = is_space(c);
    words += static_cast<std::uint64_t>(space_before && !space);
    space_before = space;
  }
  return words;
}

}  // namespace attamba
