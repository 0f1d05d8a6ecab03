// Tensors of a scan as its kernels take them, by chunks (chunk_scan.cu) or by labels (label_scan.cu).
#pragma once

#include "kernels/cuda/arguments.h"
#include "kernels/cuda/chunk_scan_plain.h"

namespace attamba::kernels::cuda::scan {

/// `labels`: null for scans by chunks.
template <class T>
Inputs<T> make_inputs(const Tensor& zxbcdt, const ScanWeights& weights, const std::int32_t* starts, const std::int32_t* labels,
                      const ScanShape& shape) {
  return {.zxbcdt = elements_of<T>(zxbcdt),
          .starts = starts,
          .labels = labels,
          .conv = shape.conv > 0 ? weights.conv.as<float>() : nullptr,
          .a_log = weights.a_log.as<float>(),
          .d_skip = weights.d_skip.as<float>(),
          .dt_bias = optional_elements_of<float>(weights.dt_bias),
          .norm = weights.norm.as<float>()};
}

inline Sizes whole_batch(const Tensor& zxbcdt, const ScanShape& shape, double eps) {
  return make_sizes(shape, eps, zxbcdt.shape().rows());
}

inline WeightGradients make_gradients(const ScanWeights& gradients, const ScanShape& shape) {
  return {.conv = shape.conv > 0 ? gradients.conv.as<float>() : nullptr,
          .a_log = gradients.a_log.as<float>(),
          .d_skip = gradients.d_skip.as<float>(),
          .dt_bias = optional_elements_of<float>(gradients.dt_bias),
          .norm = gradients.norm.as<float>()};
}

}  // namespace attamba::kernels::cuda::scan
