// Problems of the scan by labels.
#pragma once

#include "tests/simt/chunk_scan_problem.h"

namespace attamba::simt::chunk_scan {

namespace cpu = kernels::cpu;
namespace cuda = kernels::cuda;

/// The scans by labels as scans by chunks: a problem's table has labels, and how long sequences are does not matter.
template <auto kScan, auto kBackward, auto kWorkspace, auto kBackwardWorkspace>
kernels::Backend by_labels() {
  kernels::Backend backend{};
  backend.chunk_scan = [](const Launch& launch, const Tensor& out, const Tensor& zxbcdt, const ScanWeights& weights,
                          const Tensor& labels, const ScanShape& shape, double eps,
                          std::int64_t) { kScan(launch, out, zxbcdt, weights, labels, shape, eps); };
  backend.chunk_scan_backward = [](const Launch& launch, const Tensor& dzxbcdt, const ScanWeights& gradients,
                                   const Tensor& dout, const Tensor& zxbcdt, const ScanWeights& weights, const Tensor& labels,
                                   const ScanShape& shape, double eps, std::int64_t) {
    kBackward(launch, dzxbcdt, gradients, dout, zxbcdt, weights, labels, shape, eps);
  };
  backend.chunk_scan_workspace = [](const TensorType& zxbcdt, const ScanShape& shape, std::int64_t) {
    return kWorkspace(zxbcdt, shape);
  };
  backend.chunk_scan_backward_workspace = [](const TensorType& zxbcdt, const ScanShape& shape, std::int64_t) {
    return kBackwardWorkspace(zxbcdt, shape);
  };
  return backend;
}
inline Result run_cpu(const Problem& p) {
  return run<double>(
      by_labels<cpu::label_scan, cpu::label_scan_backward, cpu::label_scan_workspace, cpu::label_scan_backward_workspace>(),
      Device::cpu, p, true);
}
template <class T>
Result run_labels(const Problem& p, std::uint64_t seed = 0, bool with_gradient = true) {
  options().seed = seed;
  return run<T>(
      by_labels<cuda::label_scan, cuda::label_scan_backward, cuda::label_scan_workspace, cuda::label_scan_backward_workspace>(),
      Device::cuda, p, with_gradient);
}

struct LabelCase {
  const char* name;
  ScanShape shape;
  std::int64_t sequences, n, size, first = 0;
  bool bias = true;
  double a_log = -1;
};
inline void PrintTo(const LabelCase& c, std::ostream* out) {
  *out << c.name;
}

/// Labels are positions in chunks of `size` rows, the first of each sequence of `first` (0: as the others); without `size` any
/// of -2 .. 2, which come as they like.
inline Problem label_problem(const LabelCase& c) {
  RandomStream random(13);
  std::vector<std::int32_t> labels;
  for (std::int64_t t = 0; t < c.sequences * c.n; ++t) {
    const std::int64_t position = t % c.n;
    if (c.size == 0) {
      labels.push_back(static_cast<std::int32_t>(std::clamp(random.normal(), -2.0, 2.0)));
    } else {
      labels.push_back(static_cast<std::int32_t>(position < c.first ? position : (position - c.first) % c.size));
    }
  }
  return kernels::make_problem(c.shape, c.n, labels, c.bias, kSeed, c.a_log);
}

}  // namespace attamba::simt::chunk_scan
