// Sums and maxima of host memory, element by element.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "src/core/dtype.h"

namespace attamba {

enum class Reduction : std::uint8_t { sum, max };

namespace reduce_detail {

template <class T>
void add(const T* before, T* to, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    to[i] = static_cast<T>(before[i] + to[i]);
  }
}

template <class T>
void keep_larger(const T* before, T* to, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    bool take = before[i] > to[i];
    if constexpr (std::is_floating_point_v<T>) {
      take = take || std::isnan(before[i]);  // a NaN stays, whichever side it is on
    }
    to[i] = take ? before[i] : to[i];
  }
}

/// Integers are added as unsigned ones: the sum wraps, by definition.
template <class T, class Unsigned = T>
void reduce(Reduction operation, const void* before, void* to, std::size_t count) {
  if (operation == Reduction::sum) {
    add(static_cast<const Unsigned*>(before), static_cast<Unsigned*>(to), count);
  } else {
    keep_larger(static_cast<const T*>(before), static_cast<T*>(to), count);
  }
}

}  // namespace reduce_detail

/// to[i] = before[i] (+) to[i], for the types that reductions know.
inline void reduce(Reduction operation, DType dtype, const void* before, void* to, std::size_t count) {
  switch (dtype) {
    case DType::float64:
      return reduce_detail::reduce<double>(operation, before, to, count);
    case DType::int32:
      return reduce_detail::reduce<std::int32_t, std::uint32_t>(operation, before, to, count);
    case DType::int64:
      return reduce_detail::reduce<std::int64_t, std::uint64_t>(operation, before, to, count);
    default:
      return reduce_detail::reduce<float>(operation, before, to, count);
  }
}

}  // namespace attamba
