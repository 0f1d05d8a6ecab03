// What every backend's causal convolution asks of its arguments before it runs.
#pragma once

#include "kernels/kernels.h"

namespace attamba::kernels {

inline constexpr std::int64_t kMostConvTaps = 8;

inline void check_causal_conv(const char* operation, const Tensor& out, const Tensor& x, const Tensor& weight,
                              const Tensor& starts) {
  require(x.shape().rank() == 2 && out.type == x.type, operation, ": x ", x.type, " and out ", out.type,
          " are not of one type [T, E]");
  require(weight.dtype() == accumulator_of(x.dtype()) && weight.shape().rank() == 2 && weight.shape()[0] == x.shape().columns(),
          operation, ": weight ", weight.type, " does not fit x ", x.type);
  require(weight.shape()[1] > 0 && weight.shape()[1] <= kMostConvTaps, operation, ": ", weight.shape()[1], " taps; 1 to ",
          kMostConvTaps, " are possible");
  require(starts.dtype() == DType::int32 && starts.elements() == x.shape().rows(), operation, ": starts ", starts.type,
          " does not fit x ", x.type);
}

}  // namespace attamba::kernels
