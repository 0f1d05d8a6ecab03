// SHA-256 (FIPS 180-4): the identity of tokenizers and data sets. `sha256sum tokenizer.model` prints the same digits.
#pragma once

#include <string>
#include <string_view>

namespace attamba {

/// The digest of `bytes` as 64 lower-case hexadecimal digits.
std::string sha256(std::string_view bytes);

}  // namespace attamba
