// What every backend's scan asks of its arguments before it runs.
#pragma once

#include "kernels/kernels.h"

namespace attamba::kernels {

inline constexpr std::int64_t kMostScanTaps = 32;

/// Throws unless zxbcdt and `table`, which has a number per row and is called `name`, fit the scan's shape. `operation` names
/// it in the message.
inline void check_scan_input(const char* operation, const Tensor& zxbcdt, const char* name, const Tensor& table,
                             const ScanShape& shape) {
  require(shape.hidden > 0 && shape.heads > 0 && shape.hidden % shape.heads == 0, operation, ": hidden ", shape.hidden,
          " is not a multiple of heads ", shape.heads);
  require(shape.state > 0 && shape.groups > 0 && shape.heads % shape.groups == 0, operation, ": state ", shape.state,
          " must be positive and groups ", shape.groups, " divide heads ", shape.heads);
  require(shape.conv >= 0 && shape.conv <= kMostScanTaps, operation, ": convolution of ", shape.conv, " taps, at most ",
          kMostScanTaps, " are possible");
  require(zxbcdt.shape().columns() == shape.projection(), operation, ": zxbcdt ", zxbcdt.type, " does not have ",
          shape.projection(), " columns");
  require(table.dtype() == DType::int32 && table.elements() == zxbcdt.shape().rows(), operation, ": ", name, " ", table.type,
          " does not fit zxbcdt ", zxbcdt.type);
}

inline void check_scan_input(const char* operation, const Tensor& zxbcdt, const Tensor& starts, const ScanShape& shape,
                             std::int64_t sequence_length) {
  check_scan_input(operation, zxbcdt, "starts", starts, shape);
  require(sequence_length > 0, operation, ": sequence length ", sequence_length);
}

/// Throws unless weights (or their gradients; `role` says which) of accumulator type `type` fit the scan's shape.
inline void check_scan_weights(const char* operation, const char* role, const ScanWeights& weights, const ScanShape& shape,
                               DType type) {
  const auto check = [&](const char* name, const Tensor& tensor, std::int64_t elements) {
    require(tensor.dtype() == type && tensor.elements() == elements, operation, ": ", role, " ", name, " is ", tensor.type,
            ", expected ", elements, " elements of ", name_of(type));
  };
  if (shape.conv > 0) {
    check("conv", weights.conv, (shape.hidden + 2 * shape.groups * shape.state) * shape.conv);
  }
  check("a_log", weights.a_log, shape.heads);
  check("d_skip", weights.d_skip, shape.heads);
  if (weights.dt_bias) {
    check("dt_bias", weights.dt_bias, shape.heads);
  }
  check("norm", weights.norm, shape.hidden);
}

/// Throws unless `tensor` is of the scan's compute type and has `columns` per row of zxbcdt.
inline void check_scan_rows(const char* operation, const char* name, const Tensor& tensor, const Tensor& zxbcdt,
                            std::int64_t columns) {
  require(tensor.dtype() == zxbcdt.dtype() && tensor.elements() == zxbcdt.shape().rows() * columns, operation, ": ", name, " ",
          tensor.type, " does not fit zxbcdt ", zxbcdt.type);
}

}  // namespace attamba::kernels
