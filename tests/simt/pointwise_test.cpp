#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "kernels/kernels.h"
#include "tests/simt/kernel_support.h"

namespace attamba::simt {
namespace {

namespace cpu = kernels::cpu;
namespace cuda = kernels::cuda;

constexpr double kHuge = std::numeric_limits<double>::infinity();
const std::vector<Shape> kShapes{{1}, {7}, {33, 512}, {3, 1000}, {5, 1001}};

class Pointwise : public testing::TestWithParam<DType> {
 protected:
  DType dtype() const { return GetParam(); }
  DeviceTensor random(const Shape& shape, std::uint32_t name, double deviation = 1) const {
    return DeviceTensor::random(dtype(), shape, name, deviation);
  }
};
INSTANTIATE_TEST_SUITE_P(Types, Pointwise, testing::Values(DType::float32, DType::bfloat16),
                         [](const auto& test) { return std::string(name_of(test.param)); });

/// Gates whose sigmoid is near 0, 1 and in between, and what is no number.
void put_extremes(DeviceTensor& gate) {
  std::vector<double> values = gate.values();
  const double extremes[] = {100, -100, 30, -30, 1e4, -1e4, 0, NAN};
  for (std::size_t i = 0; i < std::size(extremes) && 5 * i < values.size(); ++i) {
    values[5 * i] = extremes[i];
  }
  gate.set(values);
}

TEST_P(Pointwise, AddIsTheCpus) {
  for (const Shape& shape : kShapes) {
    const DeviceTensor a = random(shape, 1), b = random(shape, 2);
    DeviceTensor out(dtype(), shape), expected(dtype(), shape);
    cuda::add(device_launch(), out, a, b);
    cpu::add({}, expected, a, b);
    EXPECT_TRUE(out.same_bits(expected)) << shape;
    cuda::add(device_launch(), a, a, b);
    EXPECT_TRUE(a.same_bits(expected)) << shape << " in place";
  }
}

// float32: three roundings and a sigmoid right to 3 units in the last place. bfloat16: the result's rounding, and a sigmoid
// right to 1e-5.
TEST_P(Pointwise, SwigluIsSiluTimesUp) {
  const double relative = dtype() == DType::float32 ? 8 * 0x1p-24 : rounding(dtype()) + 1e-5;
  for (const Shape& shape : kShapes) {
    DeviceTensor gate = random(shape, 3, 3);
    const DeviceTensor up = random(shape, 4);
    put_extremes(gate);
    DeviceTensor out(dtype(), shape), expected(DType::float64, shape);
    cuda::swiglu(device_launch(), out, gate, up);
    cpu::swiglu({}, expected, wide(gate), wide(up));
    // What underflows in float32 is 0 or next to it.
    EXPECT_TRUE(within(out, expected, relative, 1e-30)) << shape;
  }
}

// The derivative is a difference of products of gate and sigmoid: an error of the latter counts |gate| times.
TEST_P(Pointwise, SwigluBackwardIsItsDerivative) {
  const double sigmoid = dtype() == DType::float32 ? 4 * 0x1p-24 : 1e-5;
  const double relative = dtype() == DType::float32 ? 8 * 0x1p-24 : rounding(dtype()) + 2e-5;
  for (const Shape& shape : kShapes) {
    DeviceTensor gate = random(shape, 5, 3);
    const DeviceTensor up = random(shape, 6), dout = random(shape, 7);
    put_extremes(gate);
    DeviceTensor dgate(dtype(), shape), dup(dtype(), shape), wide_dgate(DType::float64, shape), wide_dup(DType::float64, shape);
    cuda::swiglu_backward(device_launch(), dgate, dup, dout, gate, up);
    cpu::swiglu_backward({}, wide_dgate, wide_dup, wide(dout), wide(gate), wide(up));
    const auto g = gate.values(), u = up.values(), d = dout.values();
    EXPECT_TRUE(within(dup, wide_dup, relative, 1e-30)) << shape;
    EXPECT_TRUE(within(dgate, wide_dgate.values(), relative, [&](std::size_t i) {
      return sigmoid * std::abs(d[i] * u[i]) * (2 + 2 * std::abs(g[i]));
    })) << shape;
    DeviceTensor in_place_gate(dtype(), shape, g), in_place_up(dtype(), shape, u);
    cuda::swiglu_backward(device_launch(), in_place_gate, in_place_up, dout, in_place_gate, in_place_up);
    EXPECT_TRUE(in_place_gate.same_bits(dgate) && in_place_up.same_bits(dup)) << shape << " in place";
  }
}

TEST_P(Pointwise, TensorsNeedNotBeAligned) {
  const Shape shape{77};
  const DeviceTensor a = random({80}, 8), b = random({80}, 9);
  DeviceTensor out(dtype(), {80}, 5.0), expected(dtype(), {80}, 5.0);
  const auto view = [&](const DeviceTensor& t, std::size_t offset) {
    return Tensor{static_cast<std::byte*>(t.tensor().data) + offset * size_of(dtype()), {dtype(), shape}};
  };
  cuda::add(device_launch(), view(out, 1), view(a, 3), view(b, 2));
  cpu::add({}, view(expected, 1), view(a, 3), view(b, 2));
  EXPECT_TRUE(out.same_bits(expected));
  cuda::fill(device_launch(), view(out, 3), 0.75);
  cpu::fill({}, view(expected, 3), 0.75);
  EXPECT_TRUE(out.same_bits(expected));
}

/// cos, sin, cos, sin, ... of some angles for each of `positions` places.
DeviceTensor rope_table(std::int64_t positions, std::int64_t width) {
  std::vector<double> angles(static_cast<std::size_t>(positions * width));
  for (std::size_t i = 0; i < angles.size(); i += 2) {
    angles[i] = std::cos(0.37 * static_cast<double>(i));
    angles[i + 1] = std::sin(0.37 * static_cast<double>(i));
  }
  return {DType::float32, {positions, width}, angles};
}

// A pair is turned by two products and a sum, after the addend's: four roundings of what is no longer than the pair.
TEST_P(Pointwise, RopeTurnsPairsOfSums) {
  const std::int64_t tokens = 33, positions = 40;
  std::vector<double> where;
  for (std::int64_t t = 0; t < tokens; ++t) {
    where.push_back(static_cast<double>(7 * t % positions));
  }
  const DeviceTensor places(DType::int32, {tokens}, where);
  for (const std::int64_t heads : {1, 3, 8}) {
    for (const std::int64_t width : {2, 6, 64, 520, 1034}) {
      const Shape shape{tokens, heads, width};
      const DeviceTensor table = rope_table(positions, width), addend = random(shape, 11);
      for (const DType from : {dtype(), DType::float32}) {
        for (const bool added : {false, true}) {
          for (const bool inverse : {false, true}) {
            const DeviceTensor x = DeviceTensor::random(from, shape, 10), wide_addend = wide(addend);
            DeviceTensor out(dtype(), shape), expected(DType::float64, shape);
            cuda::rope(device_launch(), out, x, added ? addend.tensor() : Tensor{}, table, places, inverse);
            cpu::rope({}, expected, wide(x), added ? wide_addend.tensor() : Tensor{}, wide(table), places, inverse);
            const auto values = x.values(), more = addend.values();
            const auto error = [&](std::size_t i) {
              const std::size_t even = i / 2 * 2, odd = even + 1;
              const double sum = added ? std::hypot(more[even], more[odd]) : 0;
              return (added ? 4 : 3) * 0x1p-24 * (std::hypot(values[even], values[odd]) + sum);
            };
            const double relative = dtype() == DType::float32 ? 0 : rounding(dtype());
            EXPECT_TRUE(within(out, expected.values(), relative, error))
                << shape << " of " << name_of(from) << (added ? ", added" : "") << (inverse ? ", back" : "");
            const DeviceTensor in_place(dtype(), shape, more);
            cuda::rope(device_launch(), in_place, x, added ? in_place.tensor() : Tensor{}, table, places, inverse);
            EXPECT_TRUE(in_place.same_bits(out)) << shape << " over the addend";
          }
        }
      }
      const DeviceTensor x = random(shape, 10);
      DeviceTensor out(dtype(), shape);
      cuda::rope(device_launch(), out, x, {}, table, places, false);
      cuda::rope(device_launch(), x, x, {}, table, places, false);
      EXPECT_TRUE(x.same_bits(out)) << shape << " in place";
    }
  }
}

TEST_P(Pointwise, APositionOutsideTheTableShows) {
  const DeviceTensor x = random({3, 2, 8}, 11), table(DType::float32, {4, 8}, 0.5);
  DeviceTensor places(DType::int32, {3}), out(dtype(), {3, 2, 8});
  places.set(std::vector<double>{-1, 3, 4});
  cuda::rope(device_launch(), out, x, {}, table, places, false);
  const auto values = out.values();
  for (std::size_t i = 0; i < values.size(); ++i) {
    EXPECT_EQ(std::isnan(values[i]), i / 16 != 1) << i;
  }
}

TEST_P(Pointwise, ReadsAndWritesEachByteOnce) {
  const Shape shape{16, 1024};
  const double elements = 16 * 1024, bytes = elements * static_cast<double>(size_of(dtype()));
  const DeviceTensor a = random(shape, 12), b = random(shape, 13), c = random(shape, 14);
  reset_counters();
  cuda::add(device_launch(), DeviceTensor(dtype(), shape), a, b);
  cuda::swiglu(device_launch(), DeviceTensor(dtype(), shape), a, b);
  cuda::swiglu_backward(device_launch(), DeviceTensor(dtype(), shape), DeviceTensor(dtype(), shape), a, b, c);
  cuda::fill(device_launch(), DeviceTensor(dtype(), shape), 1);
  EXPECT_EQ(bytes_of({"add"}), 3 * bytes);
  EXPECT_EQ(bytes_of({"swiglu"}), 3 * bytes);
  EXPECT_EQ(bytes_of({"swiglu_backward"}), 5 * bytes);
  EXPECT_EQ(bytes_of({"fill"}), bytes);
  // The table's row is read once for all heads, and its position once by each thread.
  const Shape heads{32, 8, 64};
  const DeviceTensor x = random(heads, 15), table(DType::float32, {4, 64}, 0.5), places(DType::int32, {32}, 1.0);
  cuda::rope(device_launch(), x, x, {}, table, places, false);
  EXPECT_LT(bytes_of({"rope"}), 1.03 * (2 * elements * static_cast<double>(size_of(dtype())) + 32 * 64 * 4.0));
}

TEST(PointwiseOnTheEmulator, FillFillsEveryType) {
  for (const DType dtype : {DType::float32, DType::bfloat16, DType::float64, DType::int32, DType::int64}) {
    for (const std::int64_t size : {1, 3, 1000, 5003}) {
      for (const double value : {0.0, -3.0, 1.0 / 3}) {
        DeviceTensor out(dtype, {size}), expected(dtype, {size});
        cuda::fill(device_launch(), out, value);
        cpu::fill({}, expected, value);
        EXPECT_TRUE(out.same_bits(expected)) << out.tensor().type << " = " << value;
      }
    }
  }
}

TEST(PointwiseOnTheEmulator, Float64IsRefused) {
  const DeviceTensor x(DType::float64, {4}, 1.0);
  EXPECT_THROW(cuda::add(device_launch(), x, x, x), UsageError);
}

TEST(PointwiseOnTheEmulator, InfiniteGatesAreTheCpus) {
  const DeviceTensor gate(DType::float32, {2}, std::vector<double>{kHuge, -kHuge}), up(DType::float32, {2}, 1.0);
  DeviceTensor out(DType::float32, {2}), expected(DType::float32, {2});
  cuda::swiglu(device_launch(), out, gate, up);
  cpu::swiglu({}, expected, gate, up);
  EXPECT_EQ(out.values(), expected.values());
}

}  // namespace
}  // namespace attamba::simt
