// Elementary functions as straight-line arithmetic, so that the compiler turns loops over them into SIMD code. Accurate to
// about 2 units in the last place in float32; double goes to the C library (checks only).
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "src/core/dtype.h"

namespace attamba::kernels::cpu {

inline constexpr float kSmallestExp = 0x1.098716p-126f;  ///< fast_exp(-87.3f)

/// e^x. Saturates: below -87.3 it gives the smallest normal number's neighbourhood of 0, above 88.3 about 2.4e38. NaN stays
/// NaN.
inline float fast_exp(float x) {
  constexpr float kLog2E = 1.442695040888963f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  const float clamped = x > 88.3f ? 88.3f : x;
  const float shifted = clamped * kLog2E + 12582912.0f;  // 1.5 * 2^23: rounds to the nearest integer
  const float rounded = shifted - 12582912.0f;
  const float r = clamped - rounded * kLn2High - rounded * kLn2Low;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const std::uint32_t exponent = std::bit_cast<std::uint32_t>(shifted) << 23;
  const float result = std::bit_cast<float>(std::bit_cast<std::uint32_t>(p) + exponent);
  // The lower bound comes last: clamped at the top, the compiler evaluates the caller's whole expression once more for the
  // bound, and in a sigmoid that multiplies every vector by a subnormal constant, at a cost of twice the rest.
  return x < -87.3f ? kSmallestExp : result;
}
inline double fast_exp(double x) {
  return std::exp(x);
}

template <class A>
A sigmoid(A x) {
  return A(1) / (A(1) + fast_exp(-x));
}

template <class A>
A silu(A x) {
  return x * sigmoid(x);
}

/// d silu / dx = s + x s (1 - s), s = sigmoid(x)
template <class A>
A silu_derivative(A x) {
  const A s = sigmoid(x);
  return s * (A(1) + x * (A(1) - s));
}

/// log(1 + e^x), exact in the tails; its derivative is sigmoid(x).
template <class A>
A softplus(A x) {
  return x > A(20) ? x : std::log1p(std::exp(x));
}

template <class To, class From>
To convert(From value) {
  if constexpr (std::is_same_v<From, bfloat16>) {
    return static_cast<To>(static_cast<float>(value));
  } else if constexpr (std::is_same_v<To, bfloat16>) {
    return bfloat16(static_cast<float>(value));
  } else {
    return static_cast<To>(value);
  }
}

}  // namespace attamba::kernels::cpu
