// The CUDA scan with labels on the emulator against the CPU's in float64, on the same problem.
#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "kernels/kernels.h"
#include "tests/simt/kernel_support.h"

namespace attamba::simt {
namespace {

namespace cpu = kernels::cpu;
namespace cuda = kernels::cuda;
using kernels::ScanShape;
using kernels::ScanWeights;

constexpr double kEps = 1e-5, kBefore = 0.5;

struct Weights {
  DeviceTensor conv, a_log, d_skip, dt_bias, norm;

  /// As kernels take them.
  ScanWeights tensors(const ScanShape& shape) const {
    return {
        .conv = shape.conv > 0 ? conv.tensor() : Tensor{}, .a_log = a_log, .d_skip = d_skip, .dt_bias = dt_bias, .norm = norm};
  }
  std::vector<const DeviceTensor*> all(const ScanShape& shape) const {
    std::vector<const DeviceTensor*> tensors{&a_log, &d_skip, &dt_bias, &norm};
    if (shape.conv > 0) {
      tensors.push_back(&conv);
    }
    return tensors;
  }
};

/// All elements kBefore, to see that gradients are added to.
Weights gradients_before(DType dtype, const Weights& like) {
  const auto fresh = [&](const DeviceTensor& tensor) { return DeviceTensor(dtype, tensor.shape(), kBefore); };
  return {fresh(like.conv), fresh(like.a_log), fresh(like.d_skip), fresh(like.dt_bias), fresh(like.norm)};
}

struct Problem {
  ScanShape shape;
  DeviceTensor zxbcdt, dout, labels;
  Weights weights;
};

struct Case {
  const char* name;
  ScanShape shape;
  std::int64_t sequences, n, size, first = 0;
};
void PrintTo(const Case& c, std::ostream* out) {
  *out << c.name;
}

/// Labels are positions in chunks of `size` rows, the first of each sequence of `first` (0: as the others).
Problem make_problem(DType dtype, const Case& c) {
  const std::int64_t rows = c.sequences * c.n, channels = c.shape.hidden + 2 * c.shape.groups * c.shape.state;
  std::vector<double> labels;
  for (std::int64_t t = 0; t < rows; ++t) {
    const std::int64_t position = t % c.n;
    labels.push_back(static_cast<double>(position < c.first ? position : (position - c.first) % c.size));
  }
  const std::int64_t taps = std::max<std::int64_t>(1, c.shape.conv);
  return {c.shape, DeviceTensor::random(dtype, {rows, c.shape.projection()}, 1),
          DeviceTensor::random(dtype, {rows, c.shape.hidden}, 2), DeviceTensor(DType::int32, {rows}, labels),
          Weights{DeviceTensor::random(DType::float32, {channels, taps}, 3, 0.5),
                  DeviceTensor::random(DType::float32, {c.shape.heads}, 4, 1, -2),
                  DeviceTensor::random(DType::float32, {c.shape.heads}, 5, 0.1, 1),
                  DeviceTensor::random(DType::float32, {c.shape.heads}, 6, 0.5),
                  DeviceTensor::random(DType::float32, {c.shape.hidden}, 7, 0.1, 1)}};
}

struct Result {
  DeviceTensor out, dzxbcdt;
  Weights gradients;
};

Result run_cuda(const Problem& p) {
  const TensorType type = p.zxbcdt.tensor().type;
  Result r{DeviceTensor(type.dtype, p.dout.shape()), DeviceTensor(type.dtype, type.shape),
           gradients_before(DType::float32, p.weights)};
  const ScanWeights weights = p.weights.tensors(p.shape);
  cuda::label_scan(device_launch(cuda::label_scan_workspace(type, p.shape)), r.out, p.zxbcdt, weights, p.labels, p.shape, kEps);
  cuda::label_scan_backward(device_launch(cuda::label_scan_backward_workspace(type, p.shape)), r.dzxbcdt,
                            r.gradients.tensors(p.shape), p.dout, p.zxbcdt, weights, p.labels, p.shape, kEps);
  return r;
}

Result run_cpu(const Problem& p) {
  const DeviceTensor zxbcdt = wide(p.zxbcdt), dout = wide(p.dout);
  const Weights& w = p.weights;
  const Weights wide_weights{wide(w.conv), wide(w.a_log), wide(w.d_skip), wide(w.dt_bias), wide(w.norm)};
  const TensorType type = zxbcdt.tensor().type;
  Result r{DeviceTensor(DType::float64, p.dout.shape()), DeviceTensor(DType::float64, type.shape),
           gradients_before(DType::float64, w)};
  const ScanWeights weights = wide_weights.tensors(p.shape);
  cpu::label_scan(device_launch(cpu::label_scan_workspace(type, p.shape)), r.out, zxbcdt, weights, p.labels, p.shape, kEps);
  cpu::label_scan_backward(device_launch(cpu::label_scan_backward_workspace(type, p.shape)), r.dzxbcdt,
                           r.gradients.tensors(p.shape), dout, zxbcdt, weights, p.labels, p.shape, kEps);
  return r;
}

constexpr ScanShape kSmall{.hidden = 32, .state = 8, .heads = 4, .groups = 1, .conv = 4};
constexpr ScanShape kGroups{.hidden = 64, .state = 16, .heads = 4, .groups = 2, .conv = 4};
constexpr ScanShape kOdd{.hidden = 21, .state = 5, .heads = 3, .groups = 3, .conv = 3};
constexpr ScanShape kNoConv{.hidden = 32, .state = 8, .heads = 2, .groups = 1, .conv = 0};
constexpr ScanShape kPaper{.hidden = 256, .state = 32, .heads = 8, .groups = 1, .conv = 4};

class LabelScanCuda : public testing::TestWithParam<Case> {};

TEST_P(LabelScanCuda, AgreesWithTheCpu) {
  for (const DType dtype : {DType::float32, DType::bfloat16}) {
    SCOPED_TRACE(name_of(dtype));
    const Problem p = make_problem(dtype, GetParam());
    const Result got = run_cuda(p), expected = run_cpu(p);
    // Up to 10^4 terms of mixed sign that are about 1, up to a few hundred roundings of 2^-24; what is of the compute type is
    // rounded once more.
    const double sums = 512 * 0x1p-24, once = dtype == DType::float32 ? 0 : rounding(dtype);
    EXPECT_TRUE(within(got.out, expected.out, once, sums));
    EXPECT_TRUE(within(got.dzxbcdt, expected.dzxbcdt, once, sums));
    const auto gradients = got.gradients.all(p.shape), wanted = expected.gradients.all(p.shape);
    for (std::size_t i = 0; i < gradients.size(); ++i) {
      EXPECT_TRUE(close_to(*gradients[i], wanted[i]->values(), sums)) << i;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(, LabelScanCuda,
                         testing::Values(Case{"chunks1", kSmall, 1, 130, 1}, Case{"chunks4", kGroups, 2, 128, 4},
                                         Case{"chunks7", kSmall, 2, 99, 7, 3}, Case{"chunks8", kPaper, 1, 150, 8},
                                         Case{"chunks8Shifted", kSmall, 3, 70, 8, 5}, Case{"chunks64", kSmall, 1, 200, 64},
                                         Case{"tapsReachTheChunkBefore", kSmall, 1, 80, 2}, Case{"odd", kOdd, 3, 77, 3, 1},
                                         Case{"noConvolution", kNoConv, 1, 90, 5}, Case{"oneToken", kSmall, 1, 1, 4}),
                         [](const auto& test) { return test.param.name; });

TEST(LabelScanCudaOrder, OfWarpsAndBlocksDoesNotMatter) {
  const Problem p = make_problem(DType::bfloat16, {"", kGroups, 2, 90, 3});
  expect_same_in_any_order([&] { return run_cuda(p).dzxbcdt; });
  expect_same_in_any_order([&] { return run_cuda(p).gradients.a_log; });
}

/// The kernels are those of the plain scan; one more writes the start of the chunk that all rows are.
TEST(LabelScanCudaCounts, StartsAreWrittenOncePerPass) {
  const Problem p = make_problem(DType::float32, {"", kSmall, 1, 130, 4});
  reset_counters();
  run_cuda(p);
  EXPECT_EQ(bytes_of({"label_scan one_chunk"}), 2 * 130 * 4);
}

TEST(LabelScanCudaErrors, DoublePrecisionIsAUsageError) {
  const TensorType type{DType::float64, {4, kSmall.projection()}};
  EXPECT_THROW(cuda::label_scan_workspace(type, kSmall), UsageError);
  EXPECT_THROW(cuda::label_scan_backward_workspace(type, kSmall), UsageError);
}

}  // namespace
}  // namespace attamba::simt
