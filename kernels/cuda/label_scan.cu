// The scan of the released code on the GPU: the fused kernels (chunk_scan_fused.h) for the shapes that they know, and otherwise
// those for every shape (chunk_scan_plain.h), over one chunk, the whole batch, with labels. kernels/cpu/label_scan.cpp has the
// equations.
#include <type_traits>

#include "kernels/chunk_scan_checks.h"
#include "kernels/cuda/chunk_scan_arguments.h"
#include "kernels/cuda/chunk_scan_fused.h"
#include "kernels/cuda/launch_kernel.h"

namespace attamba::kernels::cuda {
namespace {

using namespace scan;

static_assert(kTile == kLabelBlock, "a tile hands on the state of its last row's label");

constexpr int kThreads = 256;

/// One chunk begins at row 0.
ATTAMBA_KERNEL(kThreads, 1) one_chunk(std::int32_t* starts, int rows) {
  const int t = device::block_x() * kThreads + device::thread_index();
  if (t < rows) {
    device::store(starts + t, 0);
  }
}

/// The plain kernels' pass: calls body(sizes, inputs, memory), of the whole batch.
template <class T, class Body>
void with_batch(const Launch& launch, const Tensor& zxbcdt, const ScanWeights& weights, const Tensor& labels,
                const ScanShape& shape, double eps, bool backward, const Body& body) {
  const Sizes s = whole_batch(zxbcdt, shape, eps);
  ScratchAllocator scratch(launch);
  auto* const starts = scratch.take<std::int32_t>(static_cast<std::size_t>(s.rows));
  const Memory memory = make_memory(s, backward, [&](std::size_t count) { return scratch.take<float>(count); });
  launch_kernel("label_scan one_chunk", one_chunk, launch, {.x = ceil_div(s.rows, kThreads), .threads = kThreads}, starts,
                s.rows);
  body(s, make_inputs<T>(zxbcdt, weights, starts, labels.as<std::int32_t>(), shape), memory);
}

std::size_t workspace(const char* operation, const TensorType& zxbcdt, const ScanShape& shape, bool backward) {
  return dispatch_compute(zxbcdt.dtype, operation, [&]<class T>() {
    const std::int64_t rows = zxbcdt.shape.rows();
    if (std::is_same_v<T, device::bf16> && is_fused_by_label(shape)) {
      return backward ? fused_label_backward_workspace(shape, rows) : fused_label_workspace(shape, rows);
    }
    return ScratchAllocator::aligned_bytes<std::int32_t>(static_cast<std::size_t>(rows)) +
           plain_workspace(shape, rows, rows, backward);
  });
}

}  // namespace

void label_scan(const Launch& launch, const Tensor& out, const Tensor& zxbcdt, const ScanWeights& weights, const Tensor& labels,
                const ScanShape& shape, double eps) {
  constexpr const char* kName = "label_scan";
  dispatch_compute(zxbcdt.dtype(), kName, [&]<class T>() {
    check_scan_input(kName, zxbcdt, "labels", labels, shape);
    check_scan_weights(kName, "weight", weights, shape, DType::float32);
    check_scan_rows(kName, "out", out, zxbcdt, shape.hidden);
    if constexpr (std::is_same_v<T, device::bf16>) {
      if (is_fused_by_label(shape)) {
        return fused_label_forward(launch, elements_of<T>(out), whole_batch(zxbcdt, shape, eps),
                                   make_inputs<T>(zxbcdt, weights, nullptr, labels.as<std::int32_t>(), shape));
      }
    }
    with_batch<T>(launch, zxbcdt, weights, labels, shape, eps, false,
                  [&](const Sizes& s, const Inputs<T>& in, const Memory& memory) {
                    plain_forward<T>(launch, elements_of<T>(out), s, in, memory);
                  });
  });
}

void label_scan_backward(const Launch& launch, const Tensor& dzxbcdt, const ScanWeights& gradients, const Tensor& dout,
                         const Tensor& zxbcdt, const ScanWeights& weights, const Tensor& labels, const ScanShape& shape,
                         double eps) {
  constexpr const char* kName = "label_scan_backward";
  dispatch_compute(zxbcdt.dtype(), kName, [&]<class T>() {
    check_scan_input(kName, zxbcdt, "labels", labels, shape);
    check_scan_weights(kName, "weight", weights, shape, DType::float32);
    check_scan_weights(kName, "gradient of", gradients, shape, DType::float32);
    check_scan_rows(kName, "dzxbcdt", dzxbcdt, zxbcdt, shape.projection());
    check_scan_rows(kName, "dout", dout, zxbcdt, shape.hidden);
    const WeightGradients to = make_gradients(gradients, shape);
    if constexpr (std::is_same_v<T, device::bf16>) {
      if (is_fused_by_label(shape)) {
        return fused_label_backward(launch, elements_of<T>(dzxbcdt), to, elements_of<T>(dout), whole_batch(zxbcdt, shape, eps),
                                    make_inputs<T>(zxbcdt, weights, nullptr, labels.as<std::int32_t>(), shape));
      }
    }
    with_batch<T>(launch, zxbcdt, weights, labels, shape, eps, true,
                  [&](const Sizes& s, const Inputs<T>& in, const Memory& memory) {
                    plain_backward<T>(launch, elements_of<T>(dzxbcdt), to, elements_of<T>(dout), s, in, memory);
                  });
  });
}

std::size_t label_scan_workspace(const TensorType& zxbcdt, const ScanShape& shape) {
  return workspace("label_scan", zxbcdt, shape, false);
}

std::size_t label_scan_backward_workspace(const TensorType& zxbcdt, const ScanShape& shape) {
  return workspace("label_scan_backward", zxbcdt, shape, true);
}

}  // namespace attamba::kernels::cuda
