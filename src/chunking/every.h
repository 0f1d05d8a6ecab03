// The one loop that regular strategies share.
#pragma once

#include <cstdint>
#include <vector>

namespace attamba {

/// Appends first, first + stride, ... below length, and length - 1.
inline void append_every(std::int64_t first, std::int64_t stride, std::int64_t length, std::vector<std::int32_t>& out) {
  for (std::int64_t j = first; j < length - 1; j += stride) {
    out.push_back(static_cast<std::int32_t>(j));
  }
  out.push_back(static_cast<std::int32_t>(length - 1));
}

}  // namespace attamba
