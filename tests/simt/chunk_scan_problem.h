// Cases of the scan, what a backend's kernels make of them, and comparisons.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <ostream>
#include <string>
#include <vector>

#include "tests/kernels/scan_problem.h"
#include "tests/simt/device_memory.h"
#include "tests/simt/emulator.h"

namespace attamba::simt::chunk_scan {

using kernels::expect_equal;
using kernels::Problem;
using kernels::Result;
using kernels::ScanShape;
using kernels::ScanWeights;
using kernels::Vector;
using kernels::Weights;

/// Starts of rows from chunk lengths that are repeated over each sequence; no lengths: random ones, 15 on average.
inline std::vector<std::int32_t> make_starts(std::int64_t sequences, std::int64_t n, const std::vector<std::int64_t>& lengths,
                                             std::int64_t first_length) {
  RandomStream random(11);
  std::vector<std::int32_t> starts;
  for (std::int64_t s = 0; s < sequences; ++s) {
    std::size_t next = 0;
    for (std::int64_t t = 0; t < n;) {
      std::int64_t length = 1;
      if (lengths.empty()) {
        length += static_cast<std::int64_t>(std::abs(random.normal()) * 18);
      } else {
        length = t == 0 && first_length > 0 ? first_length : lengths[next++ % lengths.size()];
      }
      for (std::int64_t end = std::min(n, t + length), begin = t; t < end; ++t) {
        starts.push_back(static_cast<std::int32_t>(s * n + begin));
      }
    }
  }
  return starts;
}

template <class T>
T to_element(double value) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    return bfloat16(static_cast<float>(value));
  } else {
    return static_cast<T>(value);
  }
}
template <class T>
double from_element(T value) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    return static_cast<float>(value);
  } else {
    return static_cast<double>(value);
  }
}

/// A tensor in the emulator's memory, which the CPU's kernels may use too.
template <class T>
struct Buffer {
  DeviceMemory memory;
  Tensor tensor;

  Buffer(const Vector& from, const Shape& shape) : Buffer(shape) {
    std::vector<T> values;
    for (const double value : from) {
      values.push_back(to_element<T>(value));
    }
    copy_to_device(memory.data(), values.data(), memory.size());
  }
  /// Not written yet.
  explicit Buffer(const Shape& shape)
      : memory(static_cast<std::size_t>(shape.elements()) * sizeof(T)), tensor{memory.data(), {kDTypeOf<T>, shape}} {
    if (shape.elements() == 0) {
      tensor.data = nullptr;
    }
  }
  Vector get() const {
    Vector to;
    for (const T value : tensor.span<T>()) {
      to.push_back(from_element(value));
    }
    return to;
  }
};

template <class A>
struct WeightBuffers {
  Buffer<A> conv, a_log, d_skip, dt_bias, norm;
  WeightBuffers(const Weights& w, const Problem& p)
      : conv(w.conv, {p.channels(), p.shape.conv}),
        a_log(w.a_log, {p.shape.heads}),
        d_skip(w.d_skip, {p.shape.heads}),
        dt_bias(w.dt_bias, {static_cast<std::int64_t>(w.dt_bias.size())}),
        norm(w.norm, {p.shape.hidden}) {}
  ScanWeights tensors() const { return {conv.tensor, a_log.tensor, d_skip.tensor, dt_bias.tensor, norm.tensor}; }
  Weights get() const { return {conv.get(), a_log.get(), d_skip.get(), dt_bias.get(), norm.get()}; }
};

constexpr std::uint64_t kSeed = 7;
constexpr double kBefore = 0.5;  ///< gradients of weights start at this, to see that they are added to
constexpr double kEps = 1e-5;

/// Both directions by the kernels of `backend`.
template <class T>
Result run(const kernels::Backend& backend, Device device, const Problem& p, bool with_gradient) {
  using A = Accumulator<T>;
  const Buffer<T> zxbcdt(p.zxbcdt, {p.rows, p.shape.projection()}), dout(p.dout, {p.rows, p.shape.hidden});
  const Buffer<T> out({p.rows, p.shape.hidden}), dzxbcdt({p.rows, p.shape.projection()});
  const Buffer<std::int32_t> starts(Vector(p.table.begin(), p.table.end()), {p.rows});
  const WeightBuffers<A> weights(p.weights, p);
  Weights before = p.weights;
  for (Vector* v : {&before.conv, &before.a_log, &before.d_skip, &before.dt_bias, &before.norm}) {
    std::fill(v->begin(), v->end(), kBefore);
  }
  const WeightBuffers<A> gradients(before, p);
  const DeviceMemory forward(backend.chunk_scan_workspace(zxbcdt.tensor.type, p.shape, p.n));
  backend.chunk_scan({.device = device, .scratch = forward.span()}, out.tensor, zxbcdt.tensor, weights.tensors(), starts.tensor,
                     p.shape, kEps, p.n);
  if (!with_gradient) {
    return {out.get(), {}, {}};
  }
  const DeviceMemory backward(backend.chunk_scan_backward_workspace(zxbcdt.tensor.type, p.shape, p.n));
  backend.chunk_scan_backward({.device = device, .scratch = backward.span()}, dzxbcdt.tensor, gradients.tensors(), dout.tensor,
                              zxbcdt.tensor, weights.tensors(), starts.tensor, p.shape, kEps, p.n);
  return {out.get(), dzxbcdt.get(), gradients.get()};
}

inline kernels::Backend scans_of_cpu() {
  kernels::Backend backend{};
  backend.chunk_scan = kernels::cpu::chunk_scan;
  backend.chunk_scan_backward = kernels::cpu::chunk_scan_backward;
  backend.chunk_scan_workspace = kernels::cpu::chunk_scan_workspace;
  backend.chunk_scan_backward_workspace = kernels::cpu::chunk_scan_backward_workspace;
  return backend;
}
inline kernels::Backend scans_of_cuda() {
  kernels::Backend backend{};
  backend.chunk_scan = kernels::cuda::chunk_scan;
  backend.chunk_scan_backward = kernels::cuda::chunk_scan_backward;
  backend.chunk_scan_workspace = kernels::cuda::chunk_scan_workspace;
  backend.chunk_scan_backward_workspace = kernels::cuda::chunk_scan_backward_workspace;
  return backend;
}

template <class T>
Result run_cuda(const Problem& p, std::uint64_t seed = 0, bool with_gradient = true) {
  options().seed = seed;
  return run<T>(scans_of_cuda(), Device::cuda, p, with_gradient);
}

struct Case {
  const char* name;
  ScanShape shape;
  std::int64_t sequences, n;
  std::vector<std::int64_t> lengths;
  std::int64_t first = 0;  ///< length of the first chunk of a sequence; 0: as in `lengths`
  bool bias = false;
  double a_log = -1;  ///< its mean
};
inline void PrintTo(const Case& c, std::ostream* out) {
  *out << c.name;
}
inline Problem problem_of(const Case& c) {
  return kernels::make_problem(c.shape, c.n, make_starts(c.sequences, c.n, c.lengths, c.first), c.bias, kSeed, c.a_log);
}
constexpr auto kNameOfCase = [](const auto& test) { return test.param.name; };

/// ||a - b|| / ||b||, both less `offset`.
inline double distance(const Vector& a, const Vector& b, double offset = 0) {
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < b.size(); ++i) {
    difference += std::pow(a[i] - b[i], 2);
    norm += std::pow(b[i] - offset, 2);
  }
  return norm == 0 ? std::sqrt(difference) : std::sqrt(difference / norm);
}

inline Vector columns_of(const Vector& from, std::int64_t width, std::int64_t begin, std::int64_t end) {
  Vector to;
  for (auto row = from.begin(); row != from.end(); row += width) {
    to.insert(to.end(), row + begin, row + end);
  }
  return to;
}

/// Most of that distance: of out, of parts of dzxbcdt, of gradients of weights.
struct Tolerance {
  double out, dinput, dweights;
};

inline void expect_close(const Problem& p, const Result& got, const Result& expected, const Tolerance& tolerance) {
  EXPECT_LT(distance(got.out, expected.out), tolerance.out) << "out";
  const std::int64_t E = p.shape.hidden, GN = p.shape.groups * p.shape.state, width = p.shape.projection();
  const std::int64_t edges[] = {0, E, 2 * E, 2 * E + GN, 2 * E + 2 * GN, width};
  const char* names[] = {"dz", "dX", "dB", "dC", "ddt"};
  for (int i = 0; i < 5; ++i) {
    EXPECT_LT(distance(columns_of(got.dzxbcdt, width, edges[i], edges[i + 1]),
                       columns_of(expected.dzxbcdt, width, edges[i], edges[i + 1])),
              tolerance.dinput)
        << names[i];
  }
  EXPECT_LT(distance(got.gradients.conv, expected.gradients.conv, kBefore), tolerance.dweights) << "dconv";
  EXPECT_LT(distance(got.gradients.a_log, expected.gradients.a_log, kBefore), tolerance.dweights) << "dA_log";
  EXPECT_LT(distance(got.gradients.d_skip, expected.gradients.d_skip, kBefore), tolerance.dweights) << "dD";
  EXPECT_LT(distance(got.gradients.dt_bias, expected.gradients.dt_bias, kBefore), tolerance.dweights) << "ddt_bias";
  EXPECT_LT(distance(got.gradients.norm, expected.gradients.norm, kBefore), tolerance.dweights) << "dnorm";
}

/// Matrix instructions, of 16 x 8 x 16 products each, that the scan needs. `pairs`: blocks of 16 x 16 rows with pairs that
/// share a chunk. `crossings`: strips of 16 rows of tiles that a chunk leaves for the next tile, or enters from it, which are
/// as many.
struct LeastProducts {
  double forward, backward;

  /// Of each pair C B^T for every group and M X for all heads; backwards these again, dY X^T, M^T dY, and of the scores'
  /// gradient dB and dC. Of each crossing the state that the strip adds and what it takes from one, C S; backwards these again,
  /// and the products that make dX, dB, dC and the state's gradient: all of them E by N per row.
  LeastProducts(const ScanShape& s, double pairs, double crossings) {
    const double scores = static_cast<double>(s.groups * s.state) / 8, rows = static_cast<double>(s.hidden) / 8;
    const double state = static_cast<double>(s.hidden * s.state) / 128;
    forward = pairs * (scores + rows) + 2 * crossings * state;
    backward = pairs * (3 * scores + 3 * rows) + 6 * crossings * state;
  }
};

constexpr std::int64_t kLongestWalk = 192;  ///< rows of chunks that a block walks alone

constexpr ScanShape kSmall{.hidden = 32, .state = 8, .heads = 4, .groups = 1, .conv = 4};
constexpr ScanShape kGroups{.hidden = 64, .state = 16, .heads = 4, .groups = 2, .conv = 4};
constexpr ScanShape kOdd{.hidden = 21, .state = 5, .heads = 3, .groups = 3, .conv = 3};
constexpr ScanShape kNoConv{.hidden = 32, .state = 8, .heads = 2, .groups = 1, .conv = 0};
constexpr ScanShape kOneTap{.hidden = 16, .state = 40, .heads = 1, .groups = 1, .conv = 1};
constexpr ScanShape kManyTaps{.hidden = 16, .state = 8, .heads = 2, .groups = 2, .conv = 7};
constexpr ScanShape kPaper{.hidden = 256, .state = 32, .heads = 8, .groups = 1, .conv = 4};
constexpr ScanShape kPaperLarge{.hidden = 256, .state = 128, .heads = 8, .groups = 1, .conv = 4};
constexpr ScanShape kPaperGroups{.hidden = 256, .state = 32, .heads = 8, .groups = 2, .conv = 4};
constexpr ScanShape kWide{.hidden = 768, .state = 32, .heads = 24, .groups = 1, .conv = 4};
constexpr ScanShape kWideState{.hidden = 512, .state = 64, .heads = 8, .groups = 1, .conv = 4};
constexpr ScanShape kWideLarge{.hidden = 512, .state = 128, .heads = 8, .groups = 1, .conv = 4};
constexpr ScanShape kOwnGroups{.hidden = 512, .state = 128, .heads = 8, .groups = 8, .conv = 4};
constexpr ScanShape kWideHeads{.hidden = 1024, .state = 32, .heads = 16, .groups = 1, .conv = 4};

}  // namespace attamba::simt::chunk_scan
