// Chunked selective scan on the GPU (docs/model.md): what runs which shape. The fused kernels know the models' bfloat16 shapes,
// the plain ones all.
#include <type_traits>

#include "kernels/chunk_scan_checks.h"
#include "kernels/cuda/chunk_scan_arguments.h"
#include "kernels/cuda/chunk_scan_fused.h"

namespace attamba::kernels::cuda {
namespace {

using namespace scan;

/// Calls body(sizes, inputs, memory) for one window after the other; their rows begin at sizes.first.
template <class T, class Body>
void for_windows(const Launch& launch, const Tensor& zxbcdt, const ScanWeights& weights, const Tensor& starts,
                 const ScanShape& shape, double eps, std::int64_t sequence_length, bool backward, const Body& body) {
  const std::int64_t rows = zxbcdt.shape().rows(), window = window_rows(shape, rows, sequence_length);
  const Inputs<T> whole = make_inputs<T>(zxbcdt, weights, starts.as<std::int32_t>(), nullptr, shape);
  Sizes s = make_sizes(shape, eps);
  for (std::int64_t first = 0; first < rows; first += window) {
    s.first = static_cast<int>(first);
    s.rows = static_cast<int>(std::min(window, rows - first));
    ScratchAllocator scratch(launch);
    const Memory memory = make_memory(s, backward, [&](std::size_t count) { return scratch.take<float>(count); });
    Inputs<T> in = whole;
    in.zxbcdt += first * s.projection;
    in.starts += first;
    body(s, in, memory);
  }
}

}  // namespace

void chunk_scan(const Launch& launch, const Tensor& out, const Tensor& zxbcdt, const ScanWeights& weights, const Tensor& starts,
                const ScanShape& shape, double eps, std::int64_t sequence_length) {
  constexpr const char* kName = "chunk_scan";
  dispatch_compute(zxbcdt.dtype(), kName, [&]<class T>() {
    check_scan_input(kName, zxbcdt, starts, shape, sequence_length);
    check_scan_weights(kName, "weight", weights, shape, DType::float32);
    check_scan_rows(kName, "out", out, zxbcdt, shape.hidden);
    if constexpr (std::is_same_v<T, device::bf16>) {
      if (is_fused(shape)) {
        return fused_forward(launch, elements_of<T>(out), whole_batch(zxbcdt, shape, eps),
                             make_inputs<T>(zxbcdt, weights, starts.as<std::int32_t>(), nullptr, shape),
                             shares_walks(shape, sequence_length));
      }
    }
    for_windows<T>(launch, zxbcdt, weights, starts, shape, eps, sequence_length, false,
                   [&](const Sizes& s, const Inputs<T>& in, const Memory& memory) {
                     plain_forward(launch, elements_of<T>(out) + static_cast<std::int64_t>(s.first) * s.hidden, s, in, memory);
                   });
  });
}

void chunk_scan_backward(const Launch& launch, const Tensor& dzxbcdt, const ScanWeights& gradients, const Tensor& dout,
                         const Tensor& zxbcdt, const ScanWeights& weights, const Tensor& starts, const ScanShape& shape,
                         double eps, std::int64_t sequence_length) {
  constexpr const char* kName = "chunk_scan_backward";
  dispatch_compute(zxbcdt.dtype(), kName, [&]<class T>() {
    check_scan_input(kName, zxbcdt, starts, shape, sequence_length);
    check_scan_weights(kName, "weight", weights, shape, DType::float32);
    check_scan_weights(kName, "gradient of", gradients, shape, DType::float32);
    check_scan_rows(kName, "dzxbcdt", dzxbcdt, zxbcdt, shape.projection());
    check_scan_rows(kName, "dout", dout, zxbcdt, shape.hidden);
    const WeightGradients to = make_gradients(gradients, shape);
    if constexpr (std::is_same_v<T, device::bf16>) {
      if (is_fused(shape)) {
        return fused_backward(launch, elements_of<T>(dzxbcdt), to, elements_of<T>(dout), whole_batch(zxbcdt, shape, eps),
                              make_inputs<T>(zxbcdt, weights, starts.as<std::int32_t>(), nullptr, shape),
                              shares_walks(shape, sequence_length));
      }
    }
    for_windows<T>(launch, zxbcdt, weights, starts, shape, eps, sequence_length, true,
                   [&](const Sizes& s, const Inputs<T>& in, const Memory& memory) {
                     const auto first = static_cast<std::int64_t>(s.first);
                     plain_backward<T>(launch, elements_of<T>(dzxbcdt) + first * s.projection, to,
                                       elements_of<T>(dout) + first * s.hidden, s, in, memory);
                   });
  });
}

std::size_t chunk_scan_workspace(const TensorType& zxbcdt, const ScanShape& shape, std::int64_t sequence_length) {
  return dispatch_compute(zxbcdt.dtype, "chunk_scan", [&]<class T>() {
    const std::int64_t rows = zxbcdt.shape.rows();
    return std::is_same_v<T, device::bf16> && is_fused(shape)
               ? fused_workspace(shape, rows, shares_walks(shape, sequence_length))
               : plain_workspace(shape, rows, sequence_length, false);
  });
}

std::size_t chunk_scan_backward_workspace(const TensorType& zxbcdt, const ScanShape& shape, std::int64_t sequence_length) {
  return dispatch_compute(zxbcdt.dtype, "chunk_scan_backward", [&]<class T>() {
    const std::int64_t rows = zxbcdt.shape.rows();
    return std::is_same_v<T, device::bf16> && is_fused(shape)
               ? fused_backward_workspace(shape, rows, shares_walks(shape, sequence_length))
               : plain_workspace(shape, rows, sequence_length, true);
  });
}

}  // namespace attamba::kernels::cuda
