#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

#include "kernels/kernels.h"
#include "tests/kernels/pointwise_support.h"

namespace attamba::kernels::cpu {
namespace {

constexpr double kLimit = 0x1p15;  // what fixed point holds

template <class A>
class Update : public ::testing::Test {};
TYPED_TEST_SUITE(Update, AccumulatorTypes);

// ------------------------------------------------------------------------------------------------ losses

TYPED_TEST(Update, LossesAddUpExactlyInAnyOrder) {
  auto losses = random_array<TypeParam>({5003}, 1, 4, 9);
  std::int64_t expected = 0;
  for (const TypeParam loss : losses.data) {
    expected += std::llrint(static_cast<double>(loss) * kLossOne);
  }
  Array<std::int64_t> totals({2}), backwards({2});
  accumulate_loss({}, totals.tensor(), losses.tensor());
  EXPECT_EQ(totals[0], expected);
  EXPECT_EQ(totals[1], 0);
  accumulate_loss({}, totals.tensor(), losses.tensor());
  EXPECT_EQ(totals[0], 2 * expected);
  std::reverse(losses.data.begin(), losses.data.end());
  accumulate_loss({}, backwards.tensor(), losses.tensor());
  EXPECT_EQ(backwards[0], expected);
}

TYPED_TEST(Update, LossesThatAreNotFiniteAreCountedNotAdded) {
  Array<TypeParam> losses({6}, 2);
  losses[0] = std::numeric_limits<TypeParam>::quiet_NaN();
  losses[3] = std::numeric_limits<TypeParam>::infinity();
  losses[5] = -std::numeric_limits<TypeParam>::infinity();
  Array<std::int64_t> totals({2}, 1);
  accumulate_loss({}, totals.tensor(), losses.tensor());
  EXPECT_EQ(totals[0], 1 + static_cast<std::int64_t>(6 * kLossOne));
  EXPECT_EQ(totals[1], 1 + 3);
}

// ------------------------------------------------------------------------------------------------ fixed point

TYPED_TEST(Update, FixedPointHoldsTheNearestInteger) {
  for (const std::int64_t size : {1, 7, 40001}) {
    auto gradient = random_array<TypeParam>({size}, 2);
    for (std::size_t i = 0; i < gradient.size(); ++i) {  // 1e-16 (rounds to 0) up to about 3e4, both signs
      gradient[i] = static_cast<TypeParam>(gradient.real(i) * std::pow(10.0, static_cast<double>(i % 20) - 16));
    }
    gradient[0] = static_cast<TypeParam>(-32767.99);
    Array<std::int64_t> accumulator({size}, 1000), expected({size}, 1000);
    for (std::size_t i = 0; i < gradient.size(); ++i) {
      expected[i] += std::llrint(gradient.real(i) * kGradientOne);
    }
    add_to_fixed_point({}, accumulator.tensor(), Array<std::int64_t>({1}).tensor(), gradient.tensor(), kLimit);
    EXPECT_TRUE(accumulator.same_bits(expected)) << size;
    EXPECT_TRUE(gradient.same_bits(Array<TypeParam>({size}))) << "the gradient must be left 0";
  }
}

TYPED_TEST(Update, FixedPointSumsIgnoreOrderAndGrouping) {
  const Shape shape{17001};
  const auto part = [&](std::uint32_t i) {
    return random_array<TypeParam>(shape, 100 + i, std::pow(10.0, static_cast<double>(i) - 4));
  };
  const auto sum = [&](std::initializer_list<std::uint32_t> order) {
    Array<std::int64_t> accumulator(shape);
    for (const std::uint32_t i : order) {
      auto gradient = part(i);
      add_to_fixed_point({}, accumulator.tensor(), Array<std::int64_t>({1}).tensor(), gradient.tensor(), kLimit);
    }
    return accumulator;
  };
  const auto forward = sum({0, 1, 2, 3, 4, 5, 6}), backward = sum({6, 5, 4, 3, 2, 1, 0});
  auto grouped = sum({3, 0, 6});
  const auto rest = sum({5, 1, 4, 2});
  for (std::size_t i = 0; i < grouped.size(); ++i) {
    grouped[i] += rest[i];
  }
  EXPECT_TRUE(forward.same_bits(backward));
  EXPECT_TRUE(forward.same_bits(grouped));
}

TYPED_TEST(Update, WhatFixedPointCannotHoldIsCountedAndLeftOut) {
  const double kHuge = std::numeric_limits<double>::infinity();
  const double wrong[] = {NAN, kHuge, -kHuge, 32769, -32769, 1e30, -1e30};
  const auto count = static_cast<std::int64_t>(std::size(wrong));
  const Shape shape{4 * count};  // a wrong element, then three good ones
  Array<TypeParam> gradient(shape, -3);
  for (std::size_t i = 0; i < std::size(wrong); ++i) {
    gradient[4 * i] = static_cast<TypeParam>(wrong[i]);
  }
  Array<std::int64_t> accumulator(shape, 5), poisoned({1}, 2);
  add_to_fixed_point({}, accumulator.tensor(), poisoned.tensor(), gradient.tensor(), kLimit);
  EXPECT_EQ(poisoned[0], 2 + count);
  for (std::size_t i = 0; i < accumulator.size(); ++i) {
    EXPECT_EQ(accumulator[i], i % 4 == 0 ? 5 : 5 - static_cast<std::int64_t>(3 * kGradientOne)) << i;
  }
  Array<TypeParam> edge({2}, static_cast<TypeParam>(0.75));
  edge[1] = static_cast<TypeParam>(0.5);
  Array<std::int64_t> sums({2});
  add_to_fixed_point({}, sums.tensor(), poisoned.tensor(), edge.tensor(), 0.5);
  EXPECT_EQ(poisoned[0], 3 + count) << "0.75 exceeds the limit, 0.5 does not";
  // One poisoned element anywhere spoils the step, so that the update is skipped on all ranks.
  fixed_point_to_float({}, gradient.tensor(), accumulator.tensor(), poisoned.tensor());
  for (std::size_t i = 0; i < gradient.size(); ++i) {
    EXPECT_TRUE(std::isnan(gradient[i])) << i;
    EXPECT_EQ(accumulator[i], 0) << "the accumulator must be left 0";
  }
}

TYPED_TEST(Update, FixedPointComesBackAsTheNearestFloat) {
  const Shape shape{20011};
  Array<std::int64_t> accumulator(shape);
  RandomStream random(5);
  for (std::size_t i = 0; i < accumulator.size(); ++i) {
    const auto word = static_cast<std::int64_t>((std::uint64_t{random.next()} << 32) | random.next());
    accumulator[i] = word >> (1 + i % 62);  // every magnitude, both signs
  }
  accumulator[0] = std::numeric_limits<std::int64_t>::max();
  accumulator[1] = -(std::int64_t{1} << 62);
  accumulator[2] = (std::int64_t{1} << 53) + 1;
  accumulator[3] = -1;
  const auto before = accumulator;
  Array<TypeParam> gradient(shape, NAN);
  fixed_point_to_float({}, gradient.tensor(), accumulator.tensor(), Array<std::int64_t>({1}).tensor());
  for (std::size_t i = 0; i < gradient.size(); ++i) {
    ASSERT_EQ(gradient[i], static_cast<TypeParam>(static_cast<double>(before[i]) / kGradientOne)) << before[i];
  }
  EXPECT_TRUE(accumulator.same_bits(Array<std::int64_t>(shape)));
}

// ------------------------------------------------------------------------------------------------ global norm

TEST(SquareSum, SumsAllTensorsInFloat64) {
  auto a = random_array<float>({129, 257}, 1);
  auto b = random_array<double>({1}, 2, 1000);
  auto c = random_array<bfloat16>({16385}, 3);
  Array<float> many({300001}, 0.1), none({0});
  const std::vector<Tensor> tensors = {a.tensor(), b.tensor(), none.tensor(), c.tensor(), many.tensor()};
  std::vector<TensorType> types;
  for (const Tensor& tensor : tensors) {
    types.push_back(tensor.type);
  }
  long double expected = 0;
  const auto add_squares = [&](const auto& array) {
    for (std::size_t i = 0; i < array.size(); ++i) {
      expected += static_cast<long double>(array.real(i)) * array.real(i);
    }
  };
  add_squares(a);
  add_squares(b);
  add_squares(c);
  add_squares(many);
  const auto compute = [&] {
    const Scratch scratch(square_sum_workspace(types));
    Array<double> out({1}, NAN);
    square_sum(scratch.launch(), out.tensor(), tensors);
    return out;
  };
  EXPECT_NEAR(compute()[0] / static_cast<double>(expected), 1, 1e-13);
  expect_same_for_any_thread_count(compute);
  a[7] = std::numeric_limits<float>::infinity();
  EXPECT_FALSE(std::isfinite(compute()[0]));
}

template <class T>
std::vector<std::int64_t> digits_of(const std::vector<Tensor>& tensors) {
  std::vector<TensorType> types;
  for (const Tensor& tensor : tensors) {
    types.push_back(tensor.type);
  }
  const Scratch scratch(square_digits_workspace(types));
  Array<std::int64_t> digits({kSquareDigits}, 77);
  square_digits(scratch.launch(), digits.tensor(), tensors);
  return digits.data;
}

double value_of(std::vector<std::int64_t> digits) {
  Array<double> out({1});
  square_digits_to_float({}, out.tensor(), {digits.data(), {DType::int64, {kSquareDigits}}});
  return out[0];
}

/// What fixed-point sums become: multiples of 2^-48, of all sizes up to 2^15.
template <class A>
Array<A> fixed_point_values(std::int64_t size) {
  auto values = random_array<A>({size}, 21);
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<A>(std::rint(std::ldexp(values.real(i), static_cast<int>(i % 62))) * 0x1p-48);
  }
  return values;
}

TYPED_TEST(Update, DigitsOfSquaresAreExactInAnyPartition) {
  auto values = fixed_point_values<TypeParam>(50001);
  values[3] = static_cast<TypeParam>(0x1p15);
  values[4] = static_cast<TypeParam>(-0x1p-48);
  long double expected = 0;
  for (std::size_t i = 0; i < values.size(); ++i) {
    expected += static_cast<long double>(values.real(i)) * static_cast<long double>(values.real(i));
  }
  const std::vector<std::int64_t> whole = digits_of<TypeParam>({values.tensor()});
  EXPECT_NEAR(value_of(whole) / static_cast<double>(expected), 1, 4 * 0x1p-53 + 50001 * 0x1p-64);
  for (const std::int64_t cut : {1, 17, 16384, 40000}) {
    const Tensor first{values.data.data(), {kDTypeOf<TypeParam>, {cut}}};
    const Tensor second{values.data.data() + cut, {kDTypeOf<TypeParam>, {50001 - cut}}};
    EXPECT_EQ(digits_of<TypeParam>({second, first}), whole) << cut;
    std::vector<std::int64_t> sum = digits_of<TypeParam>({first}), rest = digits_of<TypeParam>({second});
    std::transform(sum.begin(), sum.end(), rest.begin(), sum.begin(), std::plus<>());
    EXPECT_EQ(sum, whole) << cut;
  }
  const Array<TypeParam> least({1}, static_cast<TypeParam>(0x1p-48));
  EXPECT_EQ(digits_of<TypeParam>({const_cast<Array<TypeParam>&>(least).tensor()}), (std::vector<std::int64_t>{1, 0, 0, 0, 0}));
  EXPECT_EQ(value_of(digits_of<TypeParam>({const_cast<Array<TypeParam>&>(least).tensor()})), 0x1p-96);
  EXPECT_EQ(value_of(digits_of<TypeParam>({})), 0);
}

TYPED_TEST(Update, DigitsCountWhatTheyCannotHold) {
  for (const double wrong : {std::numeric_limits<double>::quiet_NaN(), -std::numeric_limits<double>::infinity(), 0x1p16}) {
    auto values = fixed_point_values<TypeParam>(300);
    values[7] = static_cast<TypeParam>(wrong);
    const auto digits = digits_of<TypeParam>({values.tensor()});
    EXPECT_EQ(digits[4], 1);
    EXPECT_TRUE(std::isnan(value_of(digits)));
  }
}

// ------------------------------------------------------------------------------------------------ AdamW

enum class Copy { kNone, kSame, kBfloat16 };

template <class A>
struct Parameter {
  Parameter(std::int64_t size, std::uint32_t name, Copy kind)
      : copy(kind),
        master(random_array<A>({size}, name, 0.1)),
        moment1({size}),
        moment2({size}),
        gradient({size}),
        same(master),
        half(as_type<bfloat16>(master)) {}

  AdamWParameter view() {
    const Tensor compute = copy == Copy::kNone ? Tensor{} : copy == Copy::kSame ? same.tensor() : half.tensor();
    return {compute, master.tensor(), moment1.tensor(), moment2.tensor(), gradient.tensor()};
  }
  bool same_state(const Parameter& other) const {
    return master.same_bits(other.master) && moment1.same_bits(other.moment1) && moment2.same_bits(other.moment2) &&
           same.same_bits(other.same) && half.same_bits(other.half);
  }

  Copy copy;
  Array<A> master, moment1, moment2, gradient, same;
  Array<bfloat16> half;
};

template <class A>
std::vector<Parameter<A>> parameters() {
  std::vector<Parameter<A>> list;
  list.emplace_back(1, 1, Copy::kNone);
  list.emplace_back(40001, 2, sizeof(A) == 4 ? Copy::kBfloat16 : Copy::kSame);
  list.emplace_back(0, 3, Copy::kSame);
  list.emplace_back(16387, 4, Copy::kSame);
  list.emplace_back(515, 5, sizeof(A) == 4 ? Copy::kBfloat16 : Copy::kNone);
  list.emplace_back(16384, 6, Copy::kNone);
  return list;
}

constexpr AdamWSettings kSettings{.beta1 = 0.9, .beta2 = 0.95, .epsilon = 1e-8, .weight_decay = 0.033, .clip = 1.0};

/// Writes fresh gradients of this scale and returns their sum of squares.
template <class A>
double new_gradients(std::vector<Parameter<A>>& list, std::uint32_t step, double scale) {
  double squares = 0;
  for (std::size_t p = 0; p < list.size(); ++p) {
    list[p].gradient =
        random_array<A>(list[p].gradient.shape, 1000 * step + static_cast<std::uint32_t>(p), scale / (1.0 + double(p)));
    for (std::size_t i = 0; i < list[p].gradient.size(); ++i) {
      squares += list[p].gradient.real(i) * list[p].gradient.real(i);
    }
  }
  return squares;
}

Array<double> step_fields(int number, double rate) {  // number counts from 1
  Array<double> step({kStepFields}, 77);
  step[kStepLearningRate] = rate;
  step[kStepBias1] = 1 - std::pow(kSettings.beta1, number);
  step[kStepBias2] = 1 - std::pow(kSettings.beta2, number);
  step[kStepNormLimit] = 0;
  return step;
}

template <class A>
void run_adamw(std::vector<Parameter<A>>& list, Array<double>& step, double norm_squared) {
  std::vector<AdamWParameter> views;
  for (Parameter<A>& parameter : list) {
    views.push_back(parameter.view());
  }
  Array<double> squares({1}, norm_squared);
  adamw({}, step.tensor(), views, squares.tensor(), kSettings);
}

/// One parameter of the textbook algorithm in float64 (Loshchilov & Hutter, with the clipping of docs/model.md).
struct Exact {
  std::vector<double> weight, moment1, moment2;

  void step(const std::vector<double>& gradient, int number, double rate, double norm) {
    const double clip = norm > 1.0 ? 1.0 / (norm + 1e-6) : 1.0;
    for (std::size_t i = 0; i < weight.size(); ++i) {
      const double g = gradient[i] * clip;
      moment1[i] = 0.9 * moment1[i] + (1 - 0.9) * g;
      moment2[i] = 0.95 * moment2[i] + (1 - 0.95) * g * g;
      const double m = moment1[i] / (1 - std::pow(0.9, number)), v = moment2[i] / (1 - std::pow(0.95, number));
      weight[i] = weight[i] - rate * 0.033 * weight[i] - rate * m / (std::sqrt(v) + 1e-8);
    }
  }
};

/// Six steps: the first at rate 0, as a warm-up begins, some with a norm above the clip and some below.
TYPED_TEST(Update, AdamWFollowsTheTextbook) {
  const double rates[] = {0, 1e-3, 3e-3, 3e-3, 2e-3, 1e-3}, scales[] = {1, 1e-3, 1e-2, 1e-4, 3, 1e-3};
  auto list = parameters<TypeParam>();
  std::vector<Exact> exact;
  for (const auto& parameter : list) {
    exact.push_back({as_type<double>(parameter.master).data, std::vector<double>(parameter.master.size()),
                     std::vector<double>(parameter.master.size())});
  }
  int clipped = 0;
  for (int s = 0; s < 6; ++s) {
    const double squares = new_gradients(list, static_cast<std::uint32_t>(s), scales[s]);
    clipped += squares > 1;
    auto step = step_fields(s + 1, rates[s]);
    for (std::size_t p = 0; p < list.size(); ++p) {
      exact[p].step(as_type<double>(list[p].gradient).data, s + 1, rates[s], std::sqrt(squares));
    }
    run_adamw(list, step, squares);
    EXPECT_EQ(step[kStepGradientNorm], std::sqrt(squares));
    EXPECT_EQ(step[kStepSkipped], 0);
  }
  ASSERT_TRUE(clipped > 1 && clipped < 6) << "the test must cover both branches";
  // Per step the update (at most a few times the rate) and the weight are each rounded a handful of times.
  const double unit = rounding<TypeParam>();
  for (std::size_t p = 0; p < list.size(); ++p) {
    for (std::size_t i = 0; i < list[p].master.size(); ++i) {
      const double weight = exact[p].weight[i];
      ASSERT_NEAR(list[p].master.real(i), weight, unit * (6 * std::abs(weight) + 1e-2 * 32)) << "parameter " << p << "[" << i;
      ASSERT_NEAR(list[p].moment1.real(i), exact[p].moment1[i], 16 * unit * (std::abs(exact[p].moment1[i]) + 0.01));
      ASSERT_NEAR(list[p].moment2.real(i), exact[p].moment2[i], 32 * unit * exact[p].moment2[i]);
    }
  }
}

TYPED_TEST(Update, AdamWLeavesCopiesRoundedAndGradientsZero) {
  auto list = parameters<TypeParam>();
  auto step = step_fields(1, 3e-3);
  const double squares = new_gradients(list, 0, 1);
  run_adamw(list, step, squares);
  for (const auto& parameter : list) {
    EXPECT_TRUE(parameter.gradient.same_bits(Array<TypeParam>(parameter.gradient.shape)));
    if (parameter.copy == Copy::kSame) {
      EXPECT_TRUE(parameter.same.same_bits(parameter.master));
    } else if (parameter.copy == Copy::kBfloat16) {
      EXPECT_TRUE(parameter.half.same_bits(as_type<bfloat16>(parameter.master)));
    }
  }
}

TYPED_TEST(Update, AdamWAtRateZeroMovesOnlyTheMoments) {
  auto list = parameters<TypeParam>();
  const auto before = list;
  auto step = step_fields(1, 0);
  run_adamw(list, step, new_gradients(list, 0, 1));
  for (std::size_t p = 0; p < list.size(); ++p) {
    EXPECT_TRUE(list[p].master.same_bits(before[p].master)) << p;
    EXPECT_TRUE(list[p].master.size() == 0 || !list[p].moment1.same_bits(before[p].moment1)) << p;
  }
}

TYPED_TEST(Update, AdamWSkipsStepsWhoseNormIsNotFinite) {
  for (const double norm_squared : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    auto list = parameters<TypeParam>();
    auto step = step_fields(1, 3e-3);
    run_adamw(list, step, new_gradients(list, 0, 1));
    const auto before = list;
    const double squares = new_gradients(list, 1, 1);
    list[1].gradient[3] = std::numeric_limits<TypeParam>::quiet_NaN();
    step = step_fields(2, 3e-3);
    run_adamw(list, step, norm_squared);
    EXPECT_EQ(step[kStepSkipped], 1);
    EXPECT_FALSE(std::isfinite(step[kStepGradientNorm]));
    for (std::size_t p = 0; p < list.size(); ++p) {
      EXPECT_TRUE(list[p].same_state(before[p])) << p;
      EXPECT_TRUE(list[p].gradient.same_bits(Array<TypeParam>(list[p].gradient.shape))) << p;
    }
    new_gradients(list, 1, 1);
    run_adamw(list, step, squares);
    EXPECT_EQ(step[kStepSkipped], 0);
    EXPECT_FALSE(list[1].same_state(before[1]));
  }
}

TYPED_TEST(Update, AdamWSkipsStepsWhoseNormIsAboveTheLimit) {
  auto list = parameters<TypeParam>();
  const auto before = list;
  const double squares = new_gradients(list, 0, 1);
  auto step = step_fields(1, 3e-3);
  step[kStepNormLimit] = std::sqrt(squares) * (1 - 1e-9);
  run_adamw(list, step, squares);
  EXPECT_EQ(step[kStepSkipped], 1);
  EXPECT_EQ(step[kStepGradientNorm], std::sqrt(squares));
  for (std::size_t p = 0; p < list.size(); ++p) {
    EXPECT_TRUE(list[p].same_state(before[p])) << p;
    EXPECT_TRUE(list[p].gradient.same_bits(Array<TypeParam>(list[p].gradient.shape))) << p;
  }
  new_gradients(list, 0, 1);
  step[kStepNormLimit] = std::sqrt(squares);
  run_adamw(list, step, squares);
  EXPECT_EQ(step[kStepSkipped], 0);
  EXPECT_FALSE(list[1].same_state(before[1]));
}

TYPED_TEST(Update, IgnoresTheNumberOfThreads) {
  expect_same_for_any_thread_count([] {
    auto list = parameters<TypeParam>();
    auto step = step_fields(1, 3e-3);
    run_adamw(list, step, new_gradients(list, 0, 1));
    return list[1].master;
  });
  expect_same_for_any_thread_count([] {
    auto gradient = random_array<TypeParam>({70001}, 8);
    Array<std::int64_t> accumulator(gradient.shape);
    add_to_fixed_point({}, accumulator.tensor(), Array<std::int64_t>({1}).tensor(), gradient.tensor(), kLimit);
    fixed_point_to_float({}, gradient.tensor(), accumulator.tensor(), Array<std::int64_t>({1}).tensor());
    return gradient;
  });
}

TEST(UpdateErrors, RefuseWrongTypes) {
  auto list = parameters<float>();
  auto step = step_fields(1, 0);
  Array<double> squares({1});
  auto view = list[1].view();
  view.moment2 = list[3].moment2.tensor();
  EXPECT_THROW(adamw({}, step.tensor(), std::span(&view, 1), squares.tensor(), kSettings), Error);
  view = list[1].view();
  view.master = list[1].half.tensor();
  EXPECT_THROW(adamw({}, step.tensor(), std::span(&view, 1), squares.tensor(), kSettings), Error);
  Array<float> gradient({3});
  Array<std::int64_t> accumulator({4});
  EXPECT_THROW(add_to_fixed_point({}, accumulator.tensor(), Array<std::int64_t>({1}).tensor(), gradient.tensor(), kLimit),
               Error);
  EXPECT_THROW(fixed_point_to_float({}, gradient.tensor(), accumulator.tensor(), Array<std::int64_t>({1}).tensor()), Error);
}

}  // namespace
}  // namespace attamba::kernels::cpu
