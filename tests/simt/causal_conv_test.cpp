#include <gtest/gtest.h>

#include <vector>

#include "kernels/kernels.h"
#include "tests/simt/kernel_support.h"

namespace attamba::simt {
namespace {

namespace cpu = kernels::cpu;
namespace cuda = kernels::cuda;

struct Problem {
  DeviceTensor x, dout, weight, starts;
};
/// Chunks of 1, 2, 3, ... rows.
Problem make_problem(DType dtype, const Shape& shape, std::int64_t taps) {
  std::vector<double> rows;
  double start = 0, length = 1;
  for (std::int64_t t = 0; t < shape[0]; ++t) {
    if (static_cast<double>(t) == start + length) {
      start = static_cast<double>(t);
      length += 1;
    }
    rows.push_back(start);
  }
  return {DeviceTensor::random(dtype, shape, 1), DeviceTensor::random(dtype, shape, 2),
          DeviceTensor::random(DType::float32, {shape[1], taps}, 3), DeviceTensor(DType::int32, {shape[0]}, rows)};
}

class CausalConv : public testing::TestWithParam<DType> {};
INSTANTIATE_TEST_SUITE_P(Types, CausalConv, testing::Values(DType::float32, DType::bfloat16),
                         [](const auto& test) { return std::string(name_of(test.param)); });

TEST_P(CausalConv, AgreesWithTheCpu) {
  const DType dtype = GetParam();
  // A few roundings of float32 on the way, of terms that are no larger than a few times what they make; a sigmoid right to 1e-5
  // in bfloat16. Elements are compared in units of the root mean square of all.
  const double tolerance = dtype == DType::float32 ? 64 * 0x1p-24 : 8 * rounding(dtype);
  for (const Shape& shape : {Shape{1, 1}, Shape{70, 132}, Shape{33, 37}, Shape{96, 8}}) {
    for (const std::int64_t taps : {1, 4, 8}) {
      const Problem p = make_problem(dtype, shape, taps);
      const DeviceTensor x = wide(p.x), weight = wide(p.weight), dout = wide(p.dout);
      DeviceTensor out(dtype, shape), dx(dtype, shape), dweight(DType::float32, p.weight.shape(), 0.5);
      DeviceTensor want(DType::float64, shape), want_dx(DType::float64, shape),
          want_dweight(DType::float64, weight.shape(), 0.5);
      cuda::causal_conv_silu(device_launch(), out, p.x, p.weight, p.starts);
      cuda::causal_conv_silu_backward(
          device_launch(cuda::causal_conv_silu_backward_workspace(p.x.tensor().type, p.weight.tensor().type)), dx, dweight,
          p.dout, p.x, p.weight, p.starts);
      cpu::causal_conv_silu({}, want, x, weight, p.starts);
      cpu::causal_conv_silu_backward(
          device_launch(cpu::causal_conv_silu_backward_workspace(x.tensor().type, weight.tensor().type)), want_dx, want_dweight,
          dout, x, weight, p.starts);
      EXPECT_TRUE(close_to(out, want.values(), tolerance)) << shape << ' ' << taps;
      EXPECT_TRUE(close_to(dx, want_dx.values(), tolerance)) << shape << ' ' << taps;
      EXPECT_TRUE(close_to(dweight, want_dweight.values(), dtype == DType::float32 ? tolerance : 1e-4)) << shape << ' ' << taps;
    }
  }
}

/// Rows that taps reach beyond a strip's ends are read again: 3 of 32, backwards 6.
TEST_P(CausalConv, ReadsLittleMoreThanItsInputs) {
  const Shape shape{256, 256};
  const Problem p = make_problem(GetParam(), shape, 4);
  const double tensor = 256 * 256 * static_cast<double>(size_of(GetParam()));
  DeviceTensor out(GetParam(), shape), dweight(DType::float32, p.weight.shape(), 0.0);
  reset_counters();
  cuda::causal_conv_silu(device_launch(), out, p.x, p.weight, p.starts);
  cuda::causal_conv_silu_backward(
      device_launch(cuda::causal_conv_silu_backward_workspace(p.x.tensor().type, p.weight.tensor().type)), out, dweight, p.dout,
      p.x, p.weight, p.starts);
  EXPECT_LT(bytes_of({"causal_conv_silu"}), 1.6 * 2 * tensor);
  EXPECT_LT(bytes_of({"causal_conv_silu_backward"}), 1.6 * 3 * tensor);
  EXPECT_EQ(bytes_of({"causal_conv_silu_backward: taps"}),
            256 * 4 * (256 / 32 + 2) * 4.0);  // a sum per strip, and the gradient
}

TEST(CausalConvCuda, TheOrderOfWarpsAndBlocksDoesNotMatter) {
  const Problem p = make_problem(DType::bfloat16, {100, 132}, 4);
  expect_same_in_any_order([&] {
    DeviceTensor dx(DType::bfloat16, p.x.shape()), dweight(DType::float32, p.weight.shape(), 0.5);
    cuda::causal_conv_silu_backward(
        device_launch(cuda::causal_conv_silu_backward_workspace(p.x.tensor().type, p.weight.tensor().type)), dx, dweight,
        p.dout, p.x, p.weight, p.starts);
    return dweight;
  });
}

}  // namespace
}  // namespace attamba::simt
