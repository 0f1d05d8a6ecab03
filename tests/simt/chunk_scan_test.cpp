// The CUDA scan on the emulator against the CPU's in float64, on the same problem.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "src/core/random.h"
#include "tests/simt/device_memory.h"
#include "tests/simt/emulator.h"

namespace attamba::simt {
namespace {

using kernels::ScanShape;
using kernels::ScanWeights;
using Vector = std::vector<double>;

struct Weights {
  Vector conv, a_log, d_skip, dt_bias, norm;
};

struct Problem {
  ScanShape shape;
  std::int64_t n = 0, rows = 0;
  std::vector<std::int32_t> starts;
  Weights weights;
  Vector zxbcdt, dout;

  std::int64_t channels() const { return shape.hidden + 2 * shape.groups * shape.state; }
};

/// Starts of rows from chunk lengths that are repeated over each sequence; no lengths: random ones, 15 on average.
std::vector<std::int32_t> make_starts(std::int64_t sequences, std::int64_t n, const std::vector<std::int64_t>& lengths,
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

/// Values that bfloat16 represents exactly, so that every compute type gets the same problem.
Vector normals(RandomStream& random, std::int64_t count, double scale, double mean = 0) {
  Vector values(static_cast<std::size_t>(count));
  for (double& value : values) {
    value = static_cast<float>(bfloat16(static_cast<float>(mean + scale * random.normal())));
  }
  return values;
}

/// `a_log`: its mean. At -1 a state is gone after some ten tokens, at -5 it outlives hundreds.
Problem make_problem(const ScanShape& shape, std::int64_t n, std::vector<std::int32_t> starts, bool bias, double a_log) {
  RandomStream random(7);
  Problem p;
  p.shape = shape;
  p.n = n;
  p.rows = static_cast<std::int64_t>(starts.size());
  p.starts = std::move(starts);
  p.weights.conv = normals(random, p.channels() * shape.conv, shape.conv > 0 ? 1 / std::sqrt(shape.conv) : 1);
  p.weights.a_log = normals(random, shape.heads, 1.0, a_log);
  p.weights.d_skip = normals(random, shape.heads, 0.1, 1.0);
  p.weights.dt_bias = bias ? normals(random, shape.heads, 0.5) : Vector();
  p.weights.norm = normals(random, shape.hidden, 0.1, 1.0);
  p.zxbcdt = normals(random, p.rows * shape.projection(), 1.0);
  p.dout = normals(random, p.rows * shape.hidden, 1.0);
  return p;
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

struct Result {
  Vector out, dzxbcdt;
  Weights gradients;
};

constexpr double kBefore = 0.5;  ///< gradients of weights start at this, to see that they are added to
constexpr double kEps = 1e-5;

/// Both directions by the kernels of `backend`.
template <class T>
Result run(const kernels::Backend& backend, Device device, const Problem& p, bool with_gradient) {
  using A = Accumulator<T>;
  const Buffer<T> zxbcdt(p.zxbcdt, {p.rows, p.shape.projection()}), dout(p.dout, {p.rows, p.shape.hidden});
  const Buffer<T> out({p.rows, p.shape.hidden}), dzxbcdt({p.rows, p.shape.projection()});
  const Buffer<std::int32_t> starts(Vector(p.starts.begin(), p.starts.end()), {p.rows});
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

kernels::Backend scans_of_cpu() {
  kernels::Backend backend{};
  backend.chunk_scan = kernels::cpu::chunk_scan;
  backend.chunk_scan_backward = kernels::cpu::chunk_scan_backward;
  backend.chunk_scan_workspace = kernels::cpu::chunk_scan_workspace;
  backend.chunk_scan_backward_workspace = kernels::cpu::chunk_scan_backward_workspace;
  return backend;
}
kernels::Backend scans_of_cuda() {
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

/// ||a - b|| / ||b||, both less `offset`.
double distance(const Vector& a, const Vector& b, double offset = 0) {
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < b.size(); ++i) {
    difference += std::pow(a[i] - b[i], 2);
    norm += std::pow(b[i] - offset, 2);
  }
  return norm == 0 ? std::sqrt(difference) : std::sqrt(difference / norm);
}

Vector columns_of(const Vector& from, std::int64_t width, std::int64_t begin, std::int64_t end) {
  Vector to;
  for (auto row = from.begin(); row != from.end(); row += width) {
    to.insert(to.end(), row + begin, row + end);
  }
  return to;
}

struct Tolerance {
  double out, dinput, dweights;
};

void expect_close(const Problem& p, const Result& got, const Result& expected, const Tolerance& tolerance) {
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

struct Case {
  const char* name;
  ScanShape shape;
  std::int64_t sequences, n;
  std::vector<std::int64_t> lengths;
  std::int64_t first = 0;  ///< length of the first chunk of a sequence; 0: as in `lengths`
  bool bias = false;
  double a_log = -1;  ///< its mean
};
void PrintTo(const Case& c, std::ostream* out) {
  *out << c.name;
}
Problem problem_of(const Case& c) {
  return make_problem(c.shape, c.n, make_starts(c.sequences, c.n, c.lengths, c.first), c.bias, c.a_log);
}
constexpr auto kNameOfCase = [](const auto& test) { return test.param.name; };

constexpr ScanShape kSmall{.hidden = 32, .state = 8, .heads = 4, .groups = 1, .conv = 4};
constexpr ScanShape kGroups{.hidden = 64, .state = 16, .heads = 4, .groups = 2, .conv = 4};
constexpr ScanShape kOdd{.hidden = 21, .state = 5, .heads = 3, .groups = 3, .conv = 3};
constexpr ScanShape kNoConv{.hidden = 32, .state = 8, .heads = 2, .groups = 1, .conv = 0};
constexpr ScanShape kOneTap{.hidden = 16, .state = 40, .heads = 1, .groups = 1, .conv = 1};
constexpr ScanShape kManyTaps{.hidden = 16, .state = 8, .heads = 2, .groups = 2, .conv = 7};
constexpr ScanShape kPaper{.hidden = 256, .state = 32, .heads = 8, .groups = 1, .conv = 4};
constexpr ScanShape kPaperLarge{.hidden = 256, .state = 128, .heads = 8, .groups = 1, .conv = 4};
constexpr ScanShape kPaperGroups{.hidden = 256, .state = 32, .heads = 8, .groups = 2, .conv = 4};

/// Kernels for every shape: float32 arithmetic, compute type only where activations are read and written.
class ChunkScanPlain : public testing::TestWithParam<Case> {};

TEST_P(ChunkScanPlain, AgreesWithTheCpu) {
  const Problem p = problem_of(GetParam());
  const Result expected = run<double>(scans_of_cpu(), Device::cpu, p, true);
  {
    SCOPED_TRACE("float32");  // as on the CPU: up to 10^4 terms of mixed sign, up to a hundred roundings of 2^-24
    expect_close(p, run_cuda<float>(p), expected, {1e-5, 1e-5, 1e-5});
  }
  {
    SCOPED_TRACE("bfloat16");  // one rounding to 8 bits, half a unit of the last of them; sums as in float32
    expect_close(p, run_cuda<bfloat16>(p), expected, {0x1p-8, 0x1p-8, 1e-5});
  }
}

INSTANTIATE_TEST_SUITE_P(
    , ChunkScanPlain,
    testing::Values(Case{"chunks1", kSmall, 2, 37, {1}}, Case{"chunks2", kSmall, 3, 50, {2}, 1, true},
                    Case{"chunks7", kGroups, 1, 99, {7}}, Case{"chunks8", kGroups, 2, 64, {8}, 0, true},
                    Case{"chunks63", kSmall, 1, 150, {63}}, Case{"chunks64", kSmall, 1, 192, {64}},
                    Case{"chunks65", kGroups, 1, 140, {65}, 0, true}, Case{"random", kSmall, 2, 130, {}, 0, true},
                    Case{"mixed", kSmall, 2, 200, {1, 70, 3, 2, 129, 33, 31}}, Case{"whole", kGroups, 2, 130, {130}, 0, true},
                    Case{"lastPieceOfOneRow", kSmall, 1, 129, {129}}, Case{"odd", kOdd, 2, 77, {9, 1, 4}, 0, true},
                    Case{"oddLong", kOdd, 2, 150, {150}, 0, true}, Case{"noConvolution", kNoConv, 2, 90, {80}, 5, true},
                    Case{"oneTap", kOneTap, 1, 100, {11, 80}}, Case{"manyTaps", kManyTaps, 2, 80, {3, 67}},
                    Case{"oneToken", kSmall, 1, 1, {1}, 0, true}),
    kNameOfCase);

/// Fused kernels: products of bfloat16 on tensor cores. On the way to `out` lie three roundings to 8 bits of half a unit of the
/// last one each (X, B, C; M; out itself), five to the gradients (X, B, C; dY; M or the scores' gradient; the gradient after
/// the convolution; the result), and sums of many terms average them.
class ChunkScanFused : public testing::TestWithParam<Case> {};
constexpr std::int64_t kLongestWalk = 192;  ///< rows of chunks that a block walks alone

TEST_P(ChunkScanFused, AgreesWithTheCpu) {
  Problem p = problem_of(GetParam());
  const Result expected = run<double>(scans_of_cpu(), Device::cpu, p, true);
  if (p.n > kLongestWalk) {  // walks are shared out, unless chunks are said to be short
    reset_counters();
    expect_close(p, run_cuda<bfloat16>(p), expected, {3 * 0x1p-9, 5 * 0x1p-9, 5 * 0x1p-9});
    EXPECT_EQ(counters("chunk_scan: pass").launches, 2);  // the backward pass makes states again
    EXPECT_EQ(counters("chunk_scan_backward: pass").launches, 1);
    p.shape.longest_chunk = 1;
  }
  reset_counters();
  const Result got = run_cuda<bfloat16>(p);
  expect_close(p, got, expected, {3 * 0x1p-9, 5 * 0x1p-9, 5 * 0x1p-9});
  EXPECT_EQ(counters("chunk_scan: pass").launches, 0);
  EXPECT_EQ(counters("chunk_scan").launches, 1);
  EXPECT_EQ(counters("chunk_scan_backward").launches, 1);
  EXPECT_EQ(total_counters().matrix_load_conflicts, 0);
}

INSTANTIATE_TEST_SUITE_P(
    , ChunkScanFused,
    testing::Values(Case{"chunks1", kPaper, 1, 37, {1}}, Case{"chunks2", kPaper, 2, 50, {2}, 1, true},
                    Case{"chunks7", kPaperGroups, 1, 99, {7}}, Case{"chunks8", kPaper, 2, 96, {8}, 0, true},
                    Case{"chunks47", kPaper, 1, 150, {47}}, Case{"chunks48", kPaper, 1, 192, {48}},
                    Case{"chunks49", kPaperGroups, 1, 140, {49}, 0, true}, Case{"random", kPaper, 2, 130, {}, 0, true},
                    Case{"mixed", kPaper, 2, 200, {1, 70, 3, 2, 129, 33, 31}},
                    Case{"whole", kPaper, 2, 130, {130}, 0, true, -5}, Case{"lastPieceOfOneRow", kPaper, 1, 97, {97}},
                    Case{"large", kPaperLarge, 1, 70, {8}, 3, true}, Case{"largeLong", kPaperLarge, 1, 150, {20, 130}},
                    Case{"oneToken", kPaper, 1, 1, {1}, 0, true},
                    Case{"wholeSharedOut", kPaperGroups, 2, 250, {250}, 0, true, -5},
                    Case{"largeSharedOut", kPaperLarge, 1, 200, {3, 197}, 0, false, -5},
                    Case{"mixedSharedOut", kPaper, 2, 400, {1, 2, 145, 30, 1, 97, 48, 33, 40}, 17, true, -5},
                    Case{"fastSharedOut", kPaper, 2, 400, {1, 2, 145, 30, 1, 97, 48, 33, 40}, 17, true}),
    kNameOfCase);

template <class T>
void expect_same_for_seeds(const Problem& p) {
  const Result first = run_cuda<T>(p, 1), second = run_cuda<T>(p, 2);
  EXPECT_EQ(first.out, second.out);
  EXPECT_EQ(first.dzxbcdt, second.dzxbcdt);
  EXPECT_EQ(first.gradients.conv, second.gradients.conv);
  EXPECT_EQ(first.gradients.a_log, second.gradients.a_log);
  EXPECT_EQ(first.gradients.d_skip, second.gradients.d_skip);
  EXPECT_EQ(first.gradients.dt_bias, second.gradients.dt_bias);
  EXPECT_EQ(first.gradients.norm, second.gradients.norm);
}

TEST(ChunkScanCuda, ResultsDoNotDependOnTheOrderOfWarpsAndBlocks) {
  expect_same_for_seeds<float>(problem_of({"", kGroups, 1, 130, {100, 5}, 0, true}));
  expect_same_for_seeds<bfloat16>(problem_of({"", kPaper, 1, 180, {110, 5, 9}, 0, true}));
  expect_same_for_seeds<bfloat16>(problem_of({"", kPaper, 1, 240, {230, 10}, 0, true}));
}

TEST(ChunkScanCuda, RangesAreSharedOutToAtMost512Blocks) {
  Problem p = problem_of({"", kPaper, 1, 512 * 32 + 70, {8}, 3, false});
  p.shape.longest_chunk = 8;
  const Result whole = run_cuda<bfloat16>(p, 0, false);
  Problem last = p;  // the last rows alone
  const std::int64_t first = 512 * 32 + 3, rows = p.rows - first;
  last.n = last.rows = rows;
  last.starts = make_starts(1, rows, {8}, 0);
  last.zxbcdt.assign(p.zxbcdt.begin() + first * p.shape.projection(), p.zxbcdt.end());
  last.dout.assign(p.dout.begin() + first * p.shape.hidden, p.dout.end());
  const Result tail = run_cuda<bfloat16>(last, 0, false);
  EXPECT_EQ(tail.out, Vector(whole.out.begin() + first * p.shape.hidden, whole.out.end()));
}

/// Bytes that threads ask for, weights and tables too, against those of activations read and written once: zxbcdt and out, or
/// zxbcdt, dout and dzxbcdt.
TEST(ChunkScanCuda, FusedKernelsMoveLittleMoreThanTheirInputsAndOutputs) {
  for (const std::int64_t first : {0, 3}) {
    Problem p = problem_of({"", kPaper, 1, 1024, {8}, first, false});
    p.shape.longest_chunk = 8;
    reset_counters();
    run_cuda<bfloat16>(p);
    const auto per_token = [&](const char* kernel) {
      const Counters c = counters(kernel);
      EXPECT_GT(c.launches, 0) << "no kernel is called " << kernel;
      return static_cast<double>(c.global_loaded + c.global_stored + c.copied_async) / static_cast<double>(p.rows);
    };
    const double inputs = 2.0 * static_cast<double>(p.shape.projection()), outputs = 2.0 * static_cast<double>(p.shape.hidden);
    RecordProperty("forward_bytes_per_token", std::to_string(per_token("chunk_scan")));
    RecordProperty("backward_bytes_per_token", std::to_string(per_token("chunk_scan_backward")));
    EXPECT_LT(per_token("chunk_scan"), 1.5 * (inputs + outputs)) << first;
    EXPECT_LT(per_token("chunk_scan_backward"), 1.5 * (2 * inputs + outputs)) << first;
  }
}

TEST(ChunkScanCuda, WindowsOfSequencesDoNotMix) {
  const ScanShape tiny{.hidden = 4, .state = 2, .heads = 2, .groups = 1, .conv = 2};
  const Problem p = problem_of({"", tiny, 2, 2100, {5, 90}, 3, false});  // a window holds one sequence
  const Result expected = run<double>(scans_of_cpu(), Device::cpu, p, true);
  expect_close(p, run_cuda<float>(p), expected, {1e-5, 1e-5, 1e-5});
}

TEST(ChunkScanCuda, DoublePrecisionIsAUsageError) {
  const TensorType type{DType::float64, {4, kSmall.projection()}};
  EXPECT_THROW(kernels::cuda::chunk_scan_workspace(type, kSmall, 4), UsageError);
  EXPECT_THROW(kernels::cuda::chunk_scan_backward_workspace(type, kSmall, 4), UsageError);
}

}  // namespace
}  // namespace attamba::simt
