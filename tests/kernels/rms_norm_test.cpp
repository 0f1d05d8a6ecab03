#include <gtest/gtest.h>

#include <cmath>

#include "kernels/kernels.h"
#include "tests/kernels/pointwise_support.h"

namespace attamba::kernels::cpu {
namespace {

constexpr double kEps = 1e-5;
const std::vector<Shape> kShapes = {{1, 1}, {3, 7}, {2, 4, 64}, {37, 515}, {1100, 33}};

/// RMSNorm in float64.
template <class T, class A>
std::vector<double> reference(const Array<T>& x, const Array<A>& weight) {
  const auto columns = static_cast<std::size_t>(x.shape.columns());
  std::vector<double> out(x.size());
  for (std::size_t row = 0; row < x.size(); row += columns) {
    double squares = 0;
    for (std::size_t i = 0; i < columns; ++i) {
      squares += x.real(row + i) * x.real(row + i);
    }
    const double scale = 1 / std::sqrt(squares / static_cast<double>(columns) + kEps);
    for (std::size_t i = 0; i < columns; ++i) {
      out[row + i] = x.real(row + i) * scale * weight.real(i);
    }
  }
  return out;
}

/// One rounding to T of a value that was computed in the accumulator type with about 16 of its own roundings: had squares been
/// summed or the sum been kept in bfloat16, the error would be twice as large and more.
template <class T>
double tolerance(double value) {
  return std::abs(value) * (rounding<T>() + 16 * rounding<Accumulator<T>>());
}

template <class T>
void expect_close(const Array<T>& actual, const std::vector<double>& expected) {
  for (std::size_t i = 0; i < expected.size(); ++i) {
    ASSERT_NEAR(actual.real(i), expected[i], tolerance<T>(expected[i])) << "element " << i << " of " << actual.shape;
  }
}

template <class T>
class RmsNorm : public ::testing::Test {
 public:
  using A = Accumulator<T>;
  static Array<A> weights(std::int64_t columns) { return random_array<A>({columns}, 1, 0.3, 1); }
};
TYPED_TEST_SUITE(RmsNorm, ComputeTypes);

TYPED_TEST(RmsNorm, MatchesFloat64) {
  for (const Shape& shape : kShapes) {
    auto x = random_array<TypeParam>(shape, 2, 3);
    auto weight = this->weights(shape.columns());
    Array<TypeParam> out(shape, NAN);
    rms_norm({}, out.tensor(), x.tensor(), weight.tensor(), kEps);
    expect_close(out, reference(x, weight));
  }
}

TYPED_TEST(RmsNorm, EpsKeepsZeroRowsFinite) {
  Array<TypeParam> x({2, 5}), out({2, 5}, NAN);
  auto weight = this->weights(5);
  for (std::size_t i = 5; i < 10; ++i) {
    x[i] = from_real<TypeParam>(1e-3);  // mean square 1e-6: eps decides
  }
  rms_norm({}, out.tensor(), x.tensor(), weight.tensor(), kEps);
  expect_close(out, reference(x, weight));
}

TYPED_TEST(RmsNorm, NormalisesTheRoundedSum) {
  for (const Shape& shape : kShapes) {
    auto a = random_array<TypeParam>(shape, 3, 2), b = random_array<TypeParam>(shape, 4, 2);
    auto weight = this->weights(shape.columns());
    Array<TypeParam> sum(shape, NAN), out(shape, NAN);
    add_rms_norm({}, sum.tensor(), out.tensor(), a.tensor(), b.tensor(), weight.tensor(), kEps);
    for (std::size_t i = 0; i < sum.size(); ++i) {
      ASSERT_EQ(sum.real(i), to_real(from_real<TypeParam>(a.real(i) + b.real(i)))) << i;
    }
    expect_close(out, reference(sum, weight));
    // The residual stream may be updated in place.
    Array<TypeParam> again(shape, NAN), in_place = a;
    add_rms_norm({}, in_place.tensor(), again.tensor(), in_place.tensor(), b.tensor(), weight.tensor(), kEps);
    EXPECT_TRUE(in_place.same_bits(sum) && again.same_bits(out));
  }
}

struct Gradients {
  Array<double> dx, dweight;
};

/// Central differences of sum(dout * reference(x, weight)).
Gradients finite_differences(Array<double> x, Array<double> weight, const Array<double>& dout) {
  const auto loss = [&] {
    const std::vector<double> out = reference(x, weight);
    double sum = 0;
    for (std::size_t i = 0; i < out.size(); ++i) {
      sum += dout[i] * out[i];
    }
    return sum;
  };
  const auto slope = [&](double& element) {
    const double middle = element, step = 1e-5;
    element = middle + step;
    const double above = loss();
    element = middle - step;
    const double below = loss();
    element = middle;
    return (above - below) / (2 * step);
  };
  Gradients result{Array<double>(x.shape), Array<double>(weight.shape)};
  for (std::size_t i = 0; i < x.size(); ++i) {
    result.dx[i] = slope(x[i]);
  }
  for (std::size_t i = 0; i < weight.size(); ++i) {
    result.dweight[i] = slope(weight[i]);
  }
  return result;
}

TEST(RmsNormBackward, MatchesFiniteDifferences) {
  const Shape shape{19, 11};  // more rows than one partial sum of dweight covers
  auto x = random_array<double>(shape, 5), dout = random_array<double>(shape, 6), addend = random_array<double>(shape, 7);
  auto weight = random_array<double>({11}, 8, 0.3, 1);
  const Gradients expected = finite_differences(x, weight, dout);
  for (const bool with_addend : {false, true}) {
    Array<double> dx(shape, NAN), dweight({11}, 10);
    const Scratch scratch(rms_norm_backward_workspace(x.tensor().type));
    rms_norm_backward(scratch.launch(), dx.tensor(), dweight.tensor(), dout.tensor(), x.tensor(), weight.tensor(),
                      with_addend ? addend.tensor() : Tensor{}, kEps);
    for (std::size_t i = 0; i < dx.size(); ++i) {
      EXPECT_NEAR(dx[i], expected.dx[i] + (with_addend ? addend[i] : 0), 1e-7) << i;
    }
    for (std::size_t i = 0; i < dweight.size(); ++i) {
      EXPECT_NEAR(dweight[i], 10 + expected.dweight[i], 1e-7) << i;
    }
  }
}

template <class T>
struct BackwardCase {
  using A = Accumulator<T>;
  explicit BackwardCase(const Shape& shape)
      : x(random_array<T>(shape, 5, 2)),
        dout(random_array<T>(shape, 6)),
        addend(random_array<T>(shape, 7)),
        weight(random_array<A>({shape.columns()}, 8, 0.3, 1)),
        dx(shape, NAN),
        dweight(random_array<A>({shape.columns()}, 9)) {}

  void run(const Tensor& dx_memory, const Tensor& dout_memory, const Tensor& addend_memory) {
    const Scratch scratch(rms_norm_backward_workspace(x.tensor().type));
    rms_norm_backward(scratch.launch(), dx_memory, dweight.tensor(), dout_memory, x.tensor(), weight.tensor(), addend_memory,
                      kEps);
  }

  Array<T> x, dout, addend;
  Array<A> weight;
  Array<T> dx;
  Array<A> dweight;
};

TYPED_TEST(RmsNorm, BackwardMatchesFloat64) {
  for (const Shape& shape : {Shape{1, 1}, Shape{37, 515}, Shape{1100, 33}, Shape{9001, 3}}) {
    BackwardCase<TypeParam> test(shape);
    BackwardCase<double> exact(shape);
    exact.x = as_type<double>(test.x);
    exact.dout = as_type<double>(test.dout);
    exact.addend = as_type<double>(test.addend);
    exact.weight = as_type<double>(test.weight);
    exact.dweight = as_type<double>(test.dweight);
    exact.run(exact.dx.tensor(), exact.dout.tensor(), exact.addend.tensor());
    test.run(test.dx.tensor(), test.dout.tensor(), test.addend.tensor());
    const double unit = rounding<Accumulator<TypeParam>>();
    for (std::size_t i = 0; i < test.dx.size(); ++i) {  // terms of size about 1 cancel before the last rounding
      const double allowed = rounding<TypeParam>() * std::abs(exact.dx[i]) + 64 * unit;
      ASSERT_NEAR(test.dx.real(i), exact.dx[i], allowed) << i << " of " << shape;
    }
    for (std::size_t i = 0; i < test.dweight.size(); ++i) {  // a sum of `rows` terms of size about 1
      ASSERT_NEAR(test.dweight.real(i), exact.dweight[i], 16 * unit * (8 + std::sqrt(shape.rows()))) << i << " of " << shape;
    }
  }
}

TYPED_TEST(RmsNorm, BackwardMayOverwriteItsInputs) {
  const Shape shape{41, 129};
  BackwardCase<TypeParam> apart(shape), over_dout(shape), over_addend(shape);
  apart.run(apart.dx.tensor(), apart.dout.tensor(), apart.addend.tensor());
  over_dout.run(over_dout.dout.tensor(), over_dout.dout.tensor(), over_dout.addend.tensor());
  over_addend.run(over_addend.addend.tensor(), over_addend.dout.tensor(), over_addend.addend.tensor());
  EXPECT_TRUE(apart.dx.same_bits(over_dout.dout) && apart.dweight.same_bits(over_dout.dweight));
  EXPECT_TRUE(apart.dx.same_bits(over_addend.addend) && apart.dweight.same_bits(over_addend.dweight));
}

TYPED_TEST(RmsNorm, BackwardIgnoresTheNumberOfThreads) {
  expect_same_for_any_thread_count([] {
    BackwardCase<TypeParam> test({5003, 33});
    test.run(test.dx.tensor(), test.dout.tensor(), test.addend.tensor());
    return test.dweight;
  });
}

TEST(RmsNormBackward, ScratchIsBoundedForAnyBatch) {
  const std::size_t small = rms_norm_backward_workspace({DType::bfloat16, {1 << 14, 512}});
  EXPECT_EQ(small, rms_norm_backward_workspace({DType::bfloat16, {1 << 24, 512}}));
  EXPECT_LE(small, std::size_t{1} << 20);
}

TEST(RmsNormErrors, NameTheArgumentAndBothTypes) {
  Array<float> x({2, 4}), out({2, 4}), weight({3});
  try {
    rms_norm({}, out.tensor(), x.tensor(), weight.tensor(), kEps);
    FAIL() << "a weight of the wrong width was accepted";
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "rms_norm: weight is float32[3], expected float32[4]");
  }
}

}  // namespace
}  // namespace attamba::kernels::cpu
