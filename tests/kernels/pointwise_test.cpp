#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "kernels/kernels.h"
#include "tests/kernels/pointwise_support.h"

namespace attamba::kernels::cpu {
namespace {

using ::testing::HasSubstr;

const std::vector<Shape> kShapes = {{1}, {3, 5}, {129, 257}};  // one element, less than a vector, several ranges

template <class T>
class Pointwise : public ::testing::Test {
 public:
  static constexpr double kUnit = rounding<T>(), kInner = rounding<Accumulator<T>>();
};
TYPED_TEST_SUITE(Pointwise, ComputeTypes);

TYPED_TEST(Pointwise, AddRoundsOnceAndWorksInPlace) {
  for (const Shape& shape : kShapes) {
    auto a = random_array<TypeParam>(shape, 1), b = random_array<TypeParam>(shape, 2, 100);
    Array<TypeParam> expected(shape), out(shape, NAN);
    for (std::size_t i = 0; i < a.size(); ++i) {
      expected[i] = from_real<TypeParam>(a.real(i) + b.real(i));
    }
    add({}, out.tensor(), a.tensor(), b.tensor());
    EXPECT_TRUE(out.same_bits(expected)) << shape;
    auto left = a, right = b;
    add({}, left.tensor(), left.tensor(), b.tensor());
    add({}, right.tensor(), a.tensor(), right.tensor());
    EXPECT_TRUE(left.same_bits(expected) && right.same_bits(expected)) << shape;
  }
}

double exact_silu(double x) {
  return x / (1 + std::exp(-x));
}

/// Gates from both tails too, where exp under- and overflows.
template <class T>
Array<T> gates(const Shape& shape) {
  auto gate = random_array<T>(shape, 3, 4);
  const double special[] = {0, -0.0, 100, -100, 1000, -1000, 1e-20, 20, -20};
  for (std::size_t i = 0; i < std::size(special) && i < gate.size(); ++i) {
    gate[gate.size() - 1 - i] = from_real<T>(special[i]);
  }
  return gate;
}

TYPED_TEST(Pointwise, SwigluMatchesFloat64) {
  for (const Shape& shape : kShapes) {
    auto gate = gates<TypeParam>(shape), up = random_array<TypeParam>(shape, 4);
    Array<TypeParam> out(shape, NAN);
    swiglu({}, out.tensor(), gate.tensor(), up.tensor());
    for (std::size_t i = 0; i < out.size(); ++i) {
      const double expected = exact_silu(gate.real(i)) * up.real(i);
      // exp, 1 + exp, the quotient and two products: below 12 roundings; the far tail ends at 1e-35 instead of 0.
      const double allowed = std::abs(expected) * (this->kUnit + 12 * this->kInner) + 1e-34;
      ASSERT_NEAR(out.real(i), expected, allowed) << "gate " << gate.real(i) << " up " << up.real(i);
    }
  }
}

TYPED_TEST(Pointwise, SwigluBackwardMatchesFiniteDifferences) {
  for (const Shape& shape : kShapes) {
    auto gate = gates<TypeParam>(shape), up = random_array<TypeParam>(shape, 4), dout = random_array<TypeParam>(shape, 5);
    Array<TypeParam> dgate(shape, NAN), dup(shape, NAN);
    swiglu_backward({}, dgate.tensor(), dup.tensor(), dout.tensor(), gate.tensor(), up.tensor());
    for (std::size_t i = 0; i < dgate.size(); ++i) {
      const double step = 1e-5, g = gate.real(i), d = dout.real(i);
      const double slope = d * up.real(i) * (exact_silu(g + step) - exact_silu(g - step)) / (2 * step);
      const double size = std::abs(d * up.real(i));  // s + silu (1 - s) cancels near its zero at -1.28
      const double difference_error = 1e-10 * (1 + std::abs(g));
      ASSERT_NEAR(dgate.real(i), slope, this->kUnit * std::abs(slope) + (16 * this->kInner + difference_error) * size)
          << "gate " << g;
      const double expected = d * exact_silu(g);
      ASSERT_NEAR(dup.real(i), expected, std::abs(expected) * (this->kUnit + 12 * this->kInner) + 1e-34) << "gate " << g;
    }
  }
}

TYPED_TEST(Pointwise, SwigluBackwardMayOverwriteGateAndUp) {
  const Shape shape{129, 257};
  auto gate = gates<TypeParam>(shape), up = random_array<TypeParam>(shape, 4), dout = random_array<TypeParam>(shape, 5);
  Array<TypeParam> dgate(shape, NAN), dup(shape, NAN);
  swiglu_backward({}, dgate.tensor(), dup.tensor(), dout.tensor(), gate.tensor(), up.tensor());
  swiglu_backward({}, gate.tensor(), up.tensor(), dout.tensor(), gate.tensor(), up.tensor());
  EXPECT_TRUE(gate.same_bits(dgate));
  EXPECT_TRUE(up.same_bits(dup));
}

TYPED_TEST(Pointwise, IgnoresTheNumberOfThreads) {
  const Shape shape{301, 257};
  auto gate = gates<TypeParam>(shape), up = random_array<TypeParam>(shape, 4), dout = random_array<TypeParam>(shape, 5);
  expect_same_for_any_thread_count([&] {
    Array<TypeParam> out(shape, NAN);
    swiglu({}, out.tensor(), gate.tensor(), up.tensor());
    return out;
  });
  expect_same_for_any_thread_count([&] {
    Array<TypeParam> dgate(shape, NAN), dup(shape, NAN);
    swiglu_backward({}, dgate.tensor(), dup.tensor(), dout.tensor(), gate.tensor(), up.tensor());
    return dgate;
  });
}

/// cos, sin, cos, sin, ... of position * theta^(-2i/d).
template <class A>
Array<A> rope_table(std::int64_t positions, std::int64_t width) {
  Array<A> table({positions, width});
  for (std::int64_t p = 0; p < positions; ++p) {
    for (std::int64_t i = 0; i < width; i += 2) {
      const double angle = static_cast<double>(p) * std::pow(10000.0, -static_cast<double>(i) / static_cast<double>(width));
      table[p * width + i] = from_real<A>(std::cos(angle));
      table[p * width + i + 1] = from_real<A>(std::sin(angle));
    }
  }
  return table;
}

Array<std::int32_t> scattered_positions(std::int64_t tokens, std::int64_t limit) {
  Array<std::int32_t> positions({tokens});
  for (std::int64_t t = 0; t < tokens; ++t) {
    positions[t] = static_cast<std::int32_t>(t * 7 % limit);
  }
  return positions;
}

TYPED_TEST(Pointwise, RopeTurnsInterleavedPairs) {
  using A = Accumulator<TypeParam>;
  const std::int64_t limit = 50;
  for (const Shape& shape : {Shape{1, 1, 2}, Shape{5, 3, 6}, Shape{211, 4, 64}}) {
    const std::int64_t heads = shape[1], width = shape[2];
    auto x = random_array<TypeParam>(shape, 6);
    auto table = rope_table<A>(limit, width);
    auto positions = scattered_positions(shape[0], limit);
    Array<TypeParam> out(shape, NAN), back(shape, NAN);
    rope({}, out.tensor(), x.tensor(), {}, table.tensor(), positions.tensor(), false);
    rope({}, back.tensor(), x.tensor(), {}, table.tensor(), positions.tensor(), true);
    for (std::size_t i = 0; i < out.size(); i += 2) {
      const std::size_t token = i / static_cast<std::size_t>(heads * width), pair = i % static_cast<std::size_t>(width);
      const double angle = positions[token] * std::pow(10000.0, -static_cast<double>(pair) / static_cast<double>(width));
      const double c = std::cos(angle), s = std::sin(angle), a = x.real(i), b = x.real(i + 1);
      const double allowed = 4 * this->kInner * (std::abs(a) + std::abs(b));
      const auto near = [&](double actual, double expected) {
        EXPECT_NEAR(actual, expected, allowed + this->kUnit * std::abs(expected)) << "element " << i << " of " << shape;
      };
      near(out.real(i), a * c - b * s);
      near(out.real(i + 1), a * s + b * c);
      near(back.real(i), a * c + b * s);
      near(back.real(i + 1), b * c - a * s);
      ASSERT_FALSE(this->HasFailure());
    }
    auto in_place = x;
    rope({}, in_place.tensor(), in_place.tensor(), {}, table.tensor(), positions.tensor(), false);
    EXPECT_TRUE(in_place.same_bits(out)) << shape;
  }
}

TYPED_TEST(Pointwise, RopeRoundsASumOnce) {
  using A = Accumulator<TypeParam>;
  const Shape shape{41, 3, 6};
  auto table = rope_table<A>(50, 6);
  auto positions = scattered_positions(shape[0], 50);
  auto x = random_array<A>(shape, 7);  // not rounded to the compute type
  auto addend = random_array<TypeParam>(shape, 8);
  Array<A> sum(shape), exact(shape, NAN);
  for (std::size_t i = 0; i < sum.size(); ++i) {
    sum[i] = from_real<A>(x.real(i) + addend.real(i));
  }
  rope({}, exact.tensor(), sum.tensor(), {}, table.tensor(), positions.tensor(), false);
  Array<TypeParam> out(shape, NAN), rounded(shape);
  rope({}, out.tensor(), x.tensor(), addend.tensor(), table.tensor(), positions.tensor(), false);
  for (std::size_t i = 0; i < rounded.size(); ++i) {
    rounded[i] = from_real<TypeParam>(exact.real(i));
  }
  EXPECT_TRUE(out.same_bits(rounded));
  rope({}, addend.tensor(), x.tensor(), addend.tensor(), table.tensor(), positions.tensor(), false);
  EXPECT_TRUE(addend.same_bits(out)) << "in the addend's memory";
}

TEST(RopeErrors, RefusesWhatItCannotRound) {
  Array<float> x({2, 1, 4}), table({3, 4}), short_addend({2, 1, 2});
  Array<double> wide({2, 1, 4});
  Array<std::int32_t> positions({2});
  EXPECT_THROW(rope({}, x.tensor(), wide.tensor(), {}, table.tensor(), positions.tensor(), false), Error);
  EXPECT_THROW(rope({}, x.tensor(), x.tensor(), wide.tensor(), table.tensor(), positions.tensor(), false), Error);
  EXPECT_THROW(rope({}, x.tensor(), x.tensor(), short_addend.tensor(), table.tensor(), positions.tensor(), false), Error);
}

TEST(RopeErrors, NamesAPositionOutsideTheTable) {
  Array<float> x({2, 1, 4}), table({3, 4});
  Array<std::int32_t> positions({2});
  for (const std::int32_t wrong : {3, -1}) {
    positions[1] = wrong;
    try {
      rope({}, x.tensor(), x.tensor(), {}, table.tensor(), positions.tensor(), false);
      FAIL() << "position " << wrong << " was accepted";
    } catch (const Error& error) {
      EXPECT_THAT(error.what(), HasSubstr(concat("position ", wrong, " is outside the table of 3")));
    }
  }
}

template <class T>
void expect_filled(double value) {
  Array<T> array({3, 11000});
  fill({}, array.tensor(), value);
  EXPECT_TRUE(array.same_bits(Array<T>({3, 11000}, value))) << name_of(kDTypeOf<T>);
}

TEST(Fill, WritesEveryElementOfEveryType) {
  for (const double value : {-3.0, 0.0, 1000.0}) {
    expect_filled<float>(value);
    expect_filled<bfloat16>(value);
    expect_filled<double>(value);
    expect_filled<std::int32_t>(value);
    expect_filled<std::int64_t>(value);
  }
  Array<bfloat16> rounded({1});
  fill({}, rounded.tensor(), 1.0 + 0x1p-8 + 0x1p-9);
  EXPECT_EQ(rounded.real(0), 1.0 + 0x1p-7);
}

TEST(PointwiseErrors, RefuseMixedTypes) {
  Array<float> a({4}), b({5});
  Array<double> c({4});
  EXPECT_THROW(add({}, a.tensor(), a.tensor(), b.tensor()), Error);
  EXPECT_THROW(add({}, a.tensor(), a.tensor(), c.tensor()), Error);
  EXPECT_THROW(swiglu({}, b.tensor(), a.tensor(), a.tensor()), Error);
  EXPECT_THROW(swiglu_backward({}, a.tensor(), a.tensor(), a.tensor(), a.tensor(), c.tensor()), Error);
}

}  // namespace
}  // namespace attamba::kernels::cpu
