#include <gtest/gtest.h>

#include <cmath>

#include "kernels/kernels.h"
#include "tests/simt/kernel_support.h"

namespace attamba::simt {
namespace {

namespace cpu = kernels::cpu;
namespace cuda = kernels::cuda;

constexpr double kEps = 1e-5;
/// Additions that a sum over a row of at most 9001 elements goes through (20 of a thread, 5 of its warp, 16 of its block), and
/// the few operations around it.
constexpr double kRowError = 50 * 0x1p-24;

class RmsNorm : public testing::TestWithParam<DType> {
 protected:
  DType dtype() const { return GetParam(); }
  double output_rounding() const { return dtype() == DType::float32 ? 0 : rounding(dtype()); }
  DeviceTensor random(const Shape& shape, std::uint32_t name, double deviation = 1) const {
    return DeviceTensor::random(dtype(), shape, name, deviation);
  }
  static DeviceTensor weights(std::int64_t columns) { return DeviceTensor::random(DType::float32, {columns}, 1, 0.3, 1); }
  static std::vector<Shape> shapes() {
    std::vector<Shape> all;
    for (const std::int64_t columns : {1, 7, 512, 1000, 4096}) {
      for (const std::int64_t rows : {1, 33, 200}) {
        all.push_back({rows, columns});
      }
    }
    all.insert(all.end(), {{33, 513}, {9, 2049}, {3, 8200}, {3, 9001}, {17, 8208}, {2, 3, 64}, {4200, 16}});
    return all;
  }
};
INSTANTIATE_TEST_SUITE_P(Types, RmsNorm, testing::Values(DType::float32, DType::bfloat16),
                         [](const auto& test) { return std::string(name_of(test.param)); });

TEST_P(RmsNorm, IsTheDefinition) {
  for (const Shape& shape : shapes()) {
    const DeviceTensor x = random(shape, 2, 3), weight = weights(shape.columns());
    DeviceTensor out(dtype(), shape), expected(DType::float64, shape);
    cuda::rms_norm(device_launch(), out, x, weight, kEps);
    cpu::rms_norm({}, expected, wide(x), wide(weight), kEps);
    EXPECT_TRUE(within(out, expected, kRowError + output_rounding())) << shape;
  }
}

TEST_P(RmsNorm, ASumIsRoundedAndThenNormed) {
  for (const Shape& shape : shapes()) {
    const DeviceTensor a = random(shape, 3), b = random(shape, 4), weight = weights(shape.columns());
    DeviceTensor sum(dtype(), shape), out(dtype(), shape), expected_sum(dtype(), shape), expected(DType::float64, shape);
    cuda::add_rms_norm(device_launch(), sum, out, a, b, weight, kEps);
    cpu::add({}, expected_sum, a, b);
    cpu::rms_norm({}, expected, wide(expected_sum), wide(weight), kEps);
    EXPECT_TRUE(sum.same_bits(expected_sum)) << shape;
    EXPECT_TRUE(within(out, expected, kRowError + output_rounding())) << shape;
  }
}

/// What the backward's results are made of, element by element, without cancellation: errors are fractions of these.
struct Magnitudes {
  std::vector<double> dx, dweight;

  Magnitudes(const DeviceTensor& dout, const DeviceTensor& x, const DeviceTensor& weight, std::vector<double> more)
      : dx(x.size()), dweight(weight.size()) {
    const auto g = dout.values(), v = x.values(), w = weight.values();
    more.resize(v.size());
    const std::size_t columns = w.size();
    for (std::size_t row = 0; row < v.size(); row += columns) {
      double squares = 0, products = 0;
      for (std::size_t i = 0; i < columns; ++i) {
        squares += v[row + i] * v[row + i];
        products += std::abs(v[row + i] * g[row + i] * w[i]);
      }
      const double scale = 1 / std::sqrt(squares / static_cast<double>(columns) + kEps);
      for (std::size_t i = 0; i < columns; ++i) {
        dx[row + i] = std::abs(g[row + i] * w[i]) * scale +
                      std::abs(v[row + i]) * products * scale * scale * scale / static_cast<double>(columns) +
                      std::abs(more[row + i]);
        dweight[i] += std::abs(g[row + i] * v[row + i]) * scale;
      }
    }
  }
};

TEST_P(RmsNorm, BackwardIsTheDerivativeAndAddsUpDweight) {
  for (const Shape& shape : shapes()) {
    for (const bool with_addend : {false, true}) {
      const DeviceTensor x = random(shape, 5, 3), dout = random(shape, 6), weight = weights(shape.columns());
      const DeviceTensor addend = with_addend ? random(shape, 7) : DeviceTensor();
      DeviceTensor dx(dtype(), shape), dweight(DType::float32, weight.shape(), 0.5);
      DeviceTensor wide_dx(DType::float64, shape), wide_dweight(DType::float64, weight.shape(), 0.5);
      cuda::rms_norm_backward(device_launch(cuda::rms_norm_backward_workspace(x.tensor().type)), dx, dweight, dout, x, weight,
                              with_addend ? addend.tensor() : Tensor{}, kEps);
      const DeviceTensor wide_x = wide(x), wide_addend = with_addend ? wide(addend) : DeviceTensor();
      cpu::rms_norm_backward(device_launch(cpu::rms_norm_backward_workspace(wide_x.tensor().type)), wide_dx, wide_dweight,
                             wide(dout), wide_x, wide(weight), with_addend ? wide_addend.tensor() : Tensor{}, kEps);
      const Magnitudes magnitudes(dout, x, weight, with_addend ? addend.values() : std::vector<double>());
      EXPECT_TRUE(within(dx, wide_dx.values(), output_rounding(), [&](std::size_t i) {
        return 2 * kRowError * magnitudes.dx[i];
      })) << shape;
      const double rows = static_cast<double>(shape.rows());
      EXPECT_TRUE(within(dweight, wide_dweight.values(), 0x1p-24, [&](std::size_t i) {
        return (kRowError + rows * 0x1p-24) * magnitudes.dweight[i];
      })) << shape;
    }
  }
}

TEST_P(RmsNorm, BackwardMayWriteOverItsInputs) {
  for (const std::int64_t columns : {64, 1001, 4096, 8200}) {
    const Shape shape{20, columns};
    const DeviceTensor x = random(shape, 8), dout = random(shape, 9), addend = random(shape, 10), weight = weights(columns);
    const auto run = [&](const DeviceTensor& dx, const DeviceTensor& gradient, const DeviceTensor& add) {
      const DeviceTensor dweight(DType::float32, {columns}, 0.0);
      cuda::rms_norm_backward(device_launch(cuda::rms_norm_backward_workspace(x.tensor().type)), dx, dweight, gradient, x,
                              weight, add, kEps);
    };
    DeviceTensor expected(dtype(), shape), over_dout(dtype(), shape, dout.values()),
        over_addend(dtype(), shape, addend.values());
    run(expected, dout, addend);
    run(over_dout, over_dout, addend);
    run(over_addend, dout, over_addend);
    EXPECT_TRUE(over_dout.same_bits(expected)) << columns;
    EXPECT_TRUE(over_addend.same_bits(expected)) << columns;
  }
}

TEST_P(RmsNorm, DweightDoesNotDependOnTheOrderOfBlocks) {
  for (const std::int64_t columns : {48, 600, 8200}) {
    const Shape shape{100, columns};
    const DeviceTensor x = random(shape, 11), dout = random(shape, 12), weight = weights(columns);
    expect_same_in_any_order([&] {
      DeviceTensor dx(dtype(), shape), dweight(DType::float32, {columns}, 0.0);
      cuda::rms_norm_backward(device_launch(cuda::rms_norm_backward_workspace(x.tensor().type)), dx, dweight, dout, x, weight,
                              {}, kEps);
      return dweight;
    });
  }
}

TEST_P(RmsNorm, WhatIsNotANumberStaysInItsRow) {
  const Shape shape{3, 40};
  DeviceTensor x = random(shape, 13);
  std::vector<double> values = x.values();
  values[45] = NAN;
  x.set(values);
  DeviceTensor out(dtype(), shape);
  cuda::rms_norm(device_launch(), out, x, weights(40), kEps);
  values = out.values();
  for (std::size_t i = 0; i < values.size(); ++i) {
    EXPECT_EQ(std::isnan(values[i]), i / 40 == 1) << i;
  }
}

TEST_P(RmsNorm, NoRowsLeaveDweight) {
  const DeviceTensor x(dtype(), {0, 8}), dweight(DType::float32, {8}, 2.0);
  cuda::rms_norm_backward(device_launch(), x, dweight, x, x, weights(8), {}, kEps);
  EXPECT_EQ(dweight.values(), std::vector<double>(8, 2.0));
}

// At the paper's micro-batch of 16 x 1024 tokens: activations once, weights once for four rows, and a row of partial sums for
// 32 rows.
TEST_P(RmsNorm, ReadsAndWritesLittleMoreThanItsActivations) {
  const Shape shape{16384, 128};
  const double activation = 16384 * 128 * static_cast<double>(size_of(dtype()));
  const DeviceTensor x = random(shape, 14), weight = weights(128), dweight(DType::float32, {128}, 0.0);
  const DeviceTensor out(dtype(), shape), sum(dtype(), shape);
  reset_counters();
  cuda::rms_norm(device_launch(), out, x, weight, kEps);
  EXPECT_LT(bytes_of({"rms_norm"}), 1.26 * 2 * activation);
  cuda::add_rms_norm(device_launch(), sum, out, x, x, weight, kEps);
  EXPECT_LT(bytes_of({"add_rms_norm"}), 1.13 * 4 * activation);
  cuda::rms_norm_backward(device_launch(cuda::rms_norm_backward_workspace(x.tensor().type)), out, dweight, sum, x, weight, x,
                          kEps);
  EXPECT_LT(bytes_of({"rms_norm_backward"}), 1.17 * 4 * activation);
}

}  // namespace
}  // namespace attamba::simt
