// Activation functions in float32, for results that are rounded to T. All keep NaN and saturate where the CPU's do.
#pragma once

#include <type_traits>

#include "kernels/device/intrinsics.h"

namespace attamba::device {

/// 1 / (1 + e^-x). For bfloat16 results in the special function unit's arithmetic, right to about 1e-5: a hundredth of their
/// rounding.
template <class T>
ATTAMBA_DEVICE float sigmoid(float x) {
  if constexpr (std::is_same_v<T, bf16>) {
    constexpr float kLog2E = 1.442695040888963f;
    const float power = x < -80.0f ? 80.0f : -x;  // 1 + e^80 has a normal reciprocal
    return reciprocal_fast(1.0f + exp2_fast(power * kLog2E));
  } else {
    const float power = x < -87.0f ? 87.0f : -x;
    return 1.0f / (1.0f + device::exp(power));
  }
}

}  // namespace attamba::device
