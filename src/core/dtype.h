// Element types, and bfloat16 as a plain value type.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "src/core/error.h"

namespace attamba {

/// Brain floating point: the upper half of an IEEE binary32, rounded to nearest even.
struct bfloat16 {
  std::uint16_t bits = 0;

  bfloat16() = default;
  explicit bfloat16(float value) {
    const auto word = std::bit_cast<std::uint32_t>(value);
    // A NaN keeps its sign and payload's top bits and is made quiet, so that rounding never turns it into infinity. Both cases
    // are an addition, which loops over bfloat16 vectorise well.
    const std::uint32_t quiet_bit = ~word & 0x00400000u, half = 0x7fffu + ((word >> 16) & 1u);
    bits = static_cast<std::uint16_t>((word + (value != value ? quiet_bit : half)) >> 16);
  }
  explicit operator float() const { return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16); }
};

enum class DType : std::uint8_t { float32, bfloat16, float64, int32, int64 };

constexpr std::size_t size_of(DType type) {
  switch (type) {
    case DType::bfloat16:
      return 2;
    case DType::float32:
    case DType::int32:
      return 4;
    case DType::float64:
    case DType::int64:
      return 8;
  }
  return 0;
}

constexpr std::string_view name_of(DType type) {
  switch (type) {
    case DType::float32:
      return "float32";
    case DType::bfloat16:
      return "bfloat16";
    case DType::float64:
      return "float64";
    case DType::int32:
      return "int32";
    case DType::int64:
      return "int64";
  }
  return "?";
}

template <class T>
struct DTypeOf;
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::float32;
};
template <>
struct DTypeOf<bfloat16> {
  static constexpr DType value = DType::bfloat16;
};
template <>
struct DTypeOf<double> {
  static constexpr DType value = DType::float64;
};
template <>
struct DTypeOf<std::int32_t> {
  static constexpr DType value = DType::int32;
};
template <>
struct DTypeOf<std::int64_t> {
  static constexpr DType value = DType::int64;
};
template <class T>
inline constexpr DType kDTypeOf = DTypeOf<T>::value;

/// The type in which sums, norms, softmax, states, parameters' gradients and master weights of compute type T are kept.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

constexpr DType accumulator_of(DType type) {
  return type == DType::float64 ? DType::float64 : DType::float32;
}

/// Calls `body.template operator()<T>()` with the C++ type of a floating-point compute type.
template <class Body>
decltype(auto) dispatch_floating(DType type, std::string_view operation, Body&& body) {
  switch (type) {
    case DType::float32:
      return body.template operator()<float>();
    case DType::bfloat16:
      return body.template operator()<bfloat16>();
    case DType::float64:
      return body.template operator()<double>();
    default:
      throw Error(concat(operation, ": expected a floating-point tensor, got ", name_of(type)));
  }
}

}  // namespace attamba
