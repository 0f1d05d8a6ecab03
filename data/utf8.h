// Checks and counts on UTF-8 text.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace attamba {

/// The offset of the first byte that does not belong to well-formed UTF-8 (Unicode 15, table 3-7), or text.size().
std::size_t first_invalid_utf8(std::string_view text);

/// True for the separators of words: space, \t, \n, \v, \f, \r.
constexpr bool is_space(char c) {
  return c == ' ' || (c >= '\t' && c <= '\r');
}

/// The number of words, split at is_space(), that begin in `text`. `inside_word` tells whether the byte before the text belongs
/// to a word, so that a word cut in two is counted once.
std::uint64_t count_words(std::string_view text, bool inside_word = false);

/// Whether a character may begin here: false for the continuation bytes 10xxxxxx.
constexpr bool begins_character(char c) {
  return (static_cast<unsigned char>(c) & 0xc0u) != 0x80u;
}

}  // namespace attamba
