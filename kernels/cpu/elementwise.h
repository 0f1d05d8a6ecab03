// What the memory-bound kernels share: argument checks and the size of a piece of work.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string_view>

#include "src/core/error.h"
#include "src/core/tensor.h"

namespace attamba::kernels::cpu {

/// Elements per range of a parallel loop: long enough to hide a fork, short enough for the second-level cache. A multiple of
/// the cache line, so that no two threads write one line.
inline constexpr std::int64_t kElementGrain = 16384;

/// Rows of `columns` elements that make about one range.
inline std::int64_t row_grain(std::int64_t columns) {
  return std::max<std::int64_t>(1, kElementGrain / std::max<std::int64_t>(1, columns));
}

inline void require_type(const Tensor& tensor, const TensorType& expected, std::string_view operation, std::string_view name) {
  require(tensor.type == expected, operation, ": ", name, " is ", tensor.type, ", expected ", expected);
}

}  // namespace attamba::kernels::cpu
