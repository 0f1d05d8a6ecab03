#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "kernels/kernels.h"
#include "tests/simt/kernel_support.h"

namespace attamba::simt {
namespace {

namespace cpu = kernels::cpu;
namespace cuda = kernels::cuda;
using kernels::AdamWParameter;
using kernels::AdamWSettings;

constexpr double kHuge = std::numeric_limits<double>::infinity();
constexpr double kLimit = 0x1p15;

DeviceTensor integers(std::initializer_list<std::int64_t> values) {
  DeviceTensor tensor(DType::int64, {static_cast<std::int64_t>(values.size())}, 0.0);
  std::copy(values.begin(), values.end(), tensor.view<std::int64_t>().begin());
  return tensor;
}

// ------------------------------------------------------------------------------------------------ losses, fixed point

TEST(UpdateOnTheEmulator, LossesAddUpAsOnTheCpu) {
  for (const std::int64_t size : {1, 33, 5003}) {
    DeviceTensor losses = DeviceTensor::random(DType::float32, {size}, 1, 4, 9);
    auto values = losses.values();
    const double wrong[] = {NAN, 0x1p31, kHuge, -kHuge, -0x1p31};
    for (std::size_t i = 0; i < std::size(wrong) && 7 * i + 7 < values.size(); ++i) {
      values[7 * i + 7] = wrong[i];
    }
    losses.set(values);
    const DeviceTensor totals = integers({123, 2}), expected = integers({123, 2});
    cuda::accumulate_loss(device_launch(), totals, losses);
    cpu::accumulate_loss({}, expected, losses);
    EXPECT_TRUE(totals.same_bits(expected)) << size;
  }
}

TEST(UpdateOnTheEmulator, FixedPointIsTheCpus) {
  for (const std::int64_t size : {1, 7, 1000, 40001}) {
    auto values = DeviceTensor::random(DType::float32, {size}, 2).values();
    for (std::size_t i = 0; i < values.size(); ++i) {  // 1e-16 (rounds to 0) up to about 3e4, halves, and what does not fit
      values[i] *= std::pow(10.0, static_cast<double>(i % 20) - 16);
      values[i] = i % 11 == 3 ? std::ldexp(static_cast<double>(i) + 0.5, -48) : values[i];
    }
    const double wrong[] = {NAN, 32769, -kHuge, 1e30, -32769, 32768, -32768};
    for (std::size_t i = 0; i < std::size(wrong) && 9 * i + 9 < values.size(); ++i) {
      values[9 * i + 9] = wrong[i];
    }
    const DeviceTensor gradient(DType::float32, {size}, values), same(DType::float32, {size}, values);
    const DeviceTensor sums(DType::int64, {size}, -1000.0), expected(DType::int64, {size}, -1000.0);
    const DeviceTensor poisoned = integers({3}), expected_poisoned = integers({3});
    cuda::add_to_fixed_point(device_launch(), sums, poisoned, gradient, kLimit);
    cpu::add_to_fixed_point({}, expected, expected_poisoned, same, kLimit);
    EXPECT_TRUE(sums.same_bits(expected)) << size;
    EXPECT_TRUE(poisoned.same_bits(expected_poisoned)) << size;
    EXPECT_TRUE(gradient.same_bits(same)) << "gradients are left 0";

    for (const std::int64_t bad : {0, 1}) {
      const DeviceTensor back(DType::float32, {size}, 1.0), expected_back(DType::float32, {size}, 1.0);
      DeviceTensor copy(DType::int64, {size}, 0.0), expected_copy(DType::int64, {size}, 0.0);
      std::copy(expected.view<std::int64_t>().begin(), expected.view<std::int64_t>().end(), copy.view<std::int64_t>().begin());
      copy.view<std::int64_t>()[0] = std::numeric_limits<std::int64_t>::max() - 1;
      std::copy(copy.view<std::int64_t>().begin(), copy.view<std::int64_t>().end(), expected_copy.view<std::int64_t>().begin());
      cuda::fixed_point_to_float(device_launch(), back, copy, integers({bad}));
      cpu::fixed_point_to_float({}, expected_back, expected_copy, integers({bad}));
      EXPECT_TRUE(within(back, expected_back, 0)) << size << ", poisoned " << bad;
      EXPECT_TRUE(copy.same_bits(expected_copy)) << "sums are left 0";
    }
  }
}

// ------------------------------------------------------------------------------------------------ norm

double square_sum_of(const std::vector<DeviceTensor>& tensors) {
  std::vector<Tensor> views(tensors.begin(), tensors.end());
  std::vector<TensorType> types;
  for (const Tensor& view : views) {
    types.push_back(view.type);
  }
  const DeviceTensor out(DType::float64, {1});
  cuda::square_sum(device_launch(cuda::square_sum_workspace(types)), out, views);
  return out.values()[0];
}

double exact_square_sum(const std::vector<DeviceTensor>& tensors) {
  long double sum = 0;
  for (const DeviceTensor& tensor : tensors) {
    for (const double value : tensor.values()) {
      sum += static_cast<long double>(value) * static_cast<long double>(value);
    }
  }
  return static_cast<double>(sum);
}

TEST(UpdateOnTheEmulator, SquaresAddUpOverAllTensors) {
  std::vector<DeviceTensor> tensors;
  for (const std::int64_t size : {0, 1, 7, 8191, 8192, 8193, 40001}) {
    tensors.push_back(DeviceTensor::random(DType::float32, {size}, 10, 1e25));  // squares overflow float32
    tensors.push_back(DeviceTensor::random(DType::bfloat16, {size}, 11, 1e25));
  }
  // A thread adds 32 terms, its warp 5 times, its block 8 times, then blocks are added.
  const double expected = exact_square_sum(tensors);
  EXPECT_NEAR(square_sum_of(tensors), expected, 100 * 0x1p-53 * expected);
  expect_same_in_any_order([&] { return DeviceTensor(DType::float64, {1}, square_sum_of(tensors)); });
  EXPECT_EQ(square_sum_of({}), 0);
  tensors.push_back(DeviceTensor(DType::float32, {3}, static_cast<double>(NAN)));
  EXPECT_TRUE(std::isnan(square_sum_of(tensors)));
}

TEST(UpdateOnTheEmulator, DigitsOfSquaresAreTheCpus) {
  std::vector<DeviceTensor> tensors;
  for (const std::int64_t size : {0, 1, 7, 8193, 40001}) {
    auto values = DeviceTensor::random(DType::float32, {size}, 12).values();
    for (std::size_t i = 0; i < values.size(); ++i) {  // from denormal to the largest that fits
      values[i] = std::ldexp(values[i], static_cast<int>(i % 170) - 155);
    }
    const double rare[] = {NAN, 65535.996, 65536, -kHuge, 0};
    for (std::size_t i = 0; i < std::size(rare) && 9 * i + 9 < values.size(); ++i) {
      values[9 * i + 9] = rare[i];
    }
    tensors.push_back(DeviceTensor(DType::float32, {size}, values));
  }
  std::vector<Tensor> views(tensors.begin(), tensors.end());
  for (std::size_t count = 0; count <= views.size(); ++count) {
    const std::span<const Tensor> some(views.data(), count);
    std::vector<TensorType> types;
    for (const Tensor& view : some) {
      types.push_back(view.type);
    }
    const DeviceTensor digits(DType::int64, {kernels::kSquareDigits}, 7.0),
        expected(DType::int64, {kernels::kSquareDigits}, 7.0);
    std::vector<std::byte> scratch(cpu::square_digits_workspace(types));
    cuda::square_digits(device_launch(cuda::square_digits_workspace(types)), digits, some);
    cpu::square_digits({.scratch = scratch}, expected, some);
    EXPECT_TRUE(digits.same_bits(expected)) << count;
    const DeviceTensor sum(DType::float64, {1}), expected_sum(DType::float64, {1});
    cuda::square_digits_to_float(device_launch(), sum, digits);
    cpu::square_digits_to_float({}, expected_sum, expected);
    EXPECT_TRUE(within(sum, expected_sum, 0)) << count;
  }
}

TEST(UpdateOnTheEmulator, ListsOfTensorsMayBeLong) {
  std::vector<DeviceTensor> tensors;
  for (std::int64_t i = 0; i < 1500; ++i) {  // more than a launch's parameters hold
    tensors.push_back(DeviceTensor(DType::float32, {1 + i % 3}, static_cast<double>(i)));
  }
  EXPECT_EQ(square_sum_of(tensors), exact_square_sum(tensors));  // integers below 2^53
}

// ------------------------------------------------------------------------------------------------ AdamW

/// Parameters with everything that AdamW touches, in one precision.
struct Parameters {
  struct One {
    DeviceTensor compute, master, moment1, moment2, gradient;
  };
  std::vector<One> all;
  DeviceTensor step, norm_squared;

  Parameters(const std::vector<std::int64_t>& sizes, DType master, DType compute, double norm) {
    std::uint32_t name = 20;
    for (const std::int64_t size : sizes) {
      const Shape shape{size};
      const auto as = [&](const DeviceTensor& t) { return DeviceTensor(master, shape, t.values()); };
      One one{.compute = {compute, shape, 7.0},
              .master = as(DeviceTensor::random(DType::float32, shape, name + 1)),
              .moment1 = as(DeviceTensor::random(DType::float32, shape, name + 2, 0.1)),
              .moment2 = as(DeviceTensor::random(DType::float32, shape, name + 3, 0.1)),
              .gradient = as(DeviceTensor::random(DType::float32, shape, name + 4))};
      std::vector<double> v = one.moment2.values();
      for (double& value : v) {
        value = static_cast<float>(value * value);
      }
      one.moment2.set(v);
      all.push_back(std::move(one));
      name += 5;
    }
    step = {DType::float64, {kernels::kStepFields}, std::vector<double>{3e-2, 0.271, 0.1426, -1, -1, 0}};
    norm_squared = {DType::float64, {1}, norm * norm};
  }

  std::vector<AdamWParameter> list() const {
    std::vector<AdamWParameter> parameters;
    for (const One& one : all) {
      // Each third parameter is read as it is, without a copy.
      const bool copied = parameters.size() % 3 != 2;
      parameters.push_back({.compute = copied ? one.compute.tensor() : Tensor{},
                            .master = one.master,
                            .moment1 = one.moment1,
                            .moment2 = one.moment2,
                            .gradient = one.gradient});
    }
    return parameters;
  }
  double field(kernels::StepField f) const { return step.values()[static_cast<std::size_t>(f)]; }
};

const AdamWSettings kSettings{.beta1 = 0.9, .beta2 = 0.95, .epsilon = 1e-8, .weight_decay = 0.1, .clip = 1};
const std::vector<std::int64_t> kSizes{1, 7, 0, 512, 8192, 8193, 20001};

// Each moment is two products and a sum, an update four more operations; the weight is at most its sum of magnitudes.
void expect_same_update(const Parameters& found, const Parameters& expected, const Parameters& before) {
  for (std::size_t p = 0; p < found.all.size(); ++p) {
    const auto& [compute, master, moment1, moment2, gradient] = found.all[p];
    const auto old = before.all[p].master.values(), m = expected.all[p].moment1.values(), v = expected.all[p].moment2.values();
    const auto old_m = before.all[p].moment1.values();
    const auto update = [&](std::size_t i) { return 0.03 * std::abs(m[i]) / 0.271 / (std::sqrt(v[i] / 0.1426) + 1e-8); };
    const auto moment_error = [&](std::size_t i) { return 8 * 0x1p-24 * (std::abs(old_m[i]) + std::abs(m[i])); };
    EXPECT_TRUE(within(moment1, m, 0, moment_error)) << p;
    EXPECT_TRUE(within(moment2, v, 8 * 0x1p-24, [](std::size_t) { return 0; })) << p;
    EXPECT_TRUE(within(master, expected.all[p].master.values(), 0, [&](std::size_t i) {
      const double cancelled = moment_error(i) / (std::abs(m[i]) + 1e-30);
      return 4 * 0x1p-24 * std::abs(old[i]) + (16 * 0x1p-24 + cancelled) * update(i);
    })) << p;
    EXPECT_TRUE(gradient.same_bits(DeviceTensor(DType::float32, gradient.shape(), 0.0))) << p;
    const bool copied = p % 3 != 2;
    const auto values = copied ? rounded(compute.tensor().dtype(), master.values()) : std::vector<double>(compute.size(), 7.0);
    EXPECT_EQ(compute.values(), values) << p;
  }
}

class AdamWOnTheEmulator : public testing::TestWithParam<DType> {};
INSTANTIATE_TEST_SUITE_P(Copies, AdamWOnTheEmulator, testing::Values(DType::float32, DType::bfloat16),
                         [](const auto& test) { return std::string(name_of(test.param)); });

TEST_P(AdamWOnTheEmulator, IsTheCpusInFloat64) {
  for (const double norm : {0.5, 4.0}) {  // below the clip, and above
    const Parameters found(kSizes, DType::float32, GetParam(), norm), before(kSizes, DType::float32, GetParam(), norm);
    const Parameters expected(kSizes, DType::float64, DType::float64, norm);
    cuda::adamw(device_launch(), found.step, found.list(), found.norm_squared, kSettings);
    cpu::adamw({}, expected.step, expected.list(), expected.norm_squared, kSettings);
    expect_same_update(found, expected, before);
    EXPECT_EQ(found.field(kernels::kStepGradientNorm), norm);
    EXPECT_EQ(found.field(kernels::kStepSkipped), 0);
    EXPECT_TRUE(found.step.same_bits(expected.step));
  }
}

TEST_P(AdamWOnTheEmulator, ANormThatIsNotFiniteSkipsTheStep) {
  for (const double norm_squared : {static_cast<double>(NAN), kHuge}) {
    const Parameters found(kSizes, DType::float32, GetParam(), 1), before(kSizes, DType::float32, GetParam(), 1);
    const DeviceTensor norm(DType::float64, {1}, norm_squared);
    cuda::adamw(device_launch(), found.step, found.list(), norm, kSettings);
    for (std::size_t p = 0; p < found.all.size(); ++p) {
      EXPECT_TRUE(found.all[p].master.same_bits(before.all[p].master));
      EXPECT_TRUE(found.all[p].moment1.same_bits(before.all[p].moment1));
      EXPECT_TRUE(found.all[p].moment2.same_bits(before.all[p].moment2));
      EXPECT_TRUE(found.all[p].compute.same_bits(before.all[p].compute));
      EXPECT_EQ(found.all[p].gradient.values(), std::vector<double>(found.all[p].gradient.size(), 0.0));
    }
    EXPECT_EQ(found.field(kernels::kStepSkipped), 1);
    EXPECT_FALSE(std::isfinite(found.field(kernels::kStepGradientNorm)));
  }
}

TEST_P(AdamWOnTheEmulator, ANormAboveTheLimitSkipsTheStepAndIsReported) {
  for (const double limit : {1.75, 2.0}) {  // below the norm, and the norm itself
    Parameters found(kSizes, DType::float32, GetParam(), 2);
    const Parameters before(kSizes, DType::float32, GetParam(), 2);
    found.step = {DType::float64, {kernels::kStepFields}, std::vector<double>{3e-2, 0.271, 0.1426, -1, -1, limit}};
    cuda::adamw(device_launch(), found.step, found.list(), found.norm_squared, kSettings);
    EXPECT_EQ(found.field(kernels::kStepSkipped), limit < 2 ? 1 : 0);
    EXPECT_EQ(found.field(kernels::kStepGradientNorm), 2);
    EXPECT_EQ(found.all[1].master.same_bits(before.all[1].master), limit < 2);
    EXPECT_EQ(found.all[1].moment2.same_bits(before.all[1].moment2), limit < 2);
    EXPECT_EQ(found.all[1].gradient.values(), std::vector<double>(found.all[1].gradient.size(), 0.0));
  }
}

TEST_P(AdamWOnTheEmulator, ManyParametersAreUpdatedInSeveralLaunches) {
  const std::vector<std::int64_t> sizes(700, 5);
  const Parameters found(sizes, DType::float32, GetParam(), 2), before(sizes, DType::float32, GetParam(), 2);
  const Parameters expected(sizes, DType::float64, DType::float64, 2);
  reset_counters();
  cuda::adamw(device_launch(), found.step, found.list(), found.norm_squared, kSettings);
  cpu::adamw({}, expected.step, expected.list(), expected.norm_squared, kSettings);
  expect_same_update(found, expected, before);
  EXPECT_TRUE(found.step.same_bits(expected.step));
  EXPECT_EQ(counters("adamw").launches, 2);
}

// 16 bytes of a parameter read, 16 written, and its copy.
TEST_P(AdamWOnTheEmulator, IsOneLaunchThatTouchesEachByteOnce) {
  const Parameters found({100000, 512, 50000}, DType::float32, GetParam(), 2);
  reset_counters();
  cuda::adamw(device_launch(), found.step, found.list(), found.norm_squared, kSettings);
  const double floor = 32 * 150512.0 + static_cast<double>(size_of(GetParam())) * 100512;
  EXPECT_EQ(counters("adamw").launches, 1);
  EXPECT_LT(bytes_of({"adamw"}), 1.001 * floor);
}

TEST(UpdateOnTheEmulator, NoParametersStillReportTheNorm) {
  const Parameters none({}, DType::float32, DType::float32, 3);
  cuda::adamw(device_launch(), none.step, none.list(), none.norm_squared, kSettings);
  EXPECT_EQ(none.field(kernels::kStepGradientNorm), 3);
  EXPECT_EQ(none.field(kernels::kStepSkipped), 0);
}

TEST(UpdateOnTheEmulator, SumsTouchEachByteOnce) {
  const std::int64_t size = 100000;
  const DeviceTensor gradient = DeviceTensor::random(DType::float32, {size}, 3), sums(DType::int64, {size}, 0.0);
  const double elements = static_cast<double>(size);
  reset_counters();
  square_sum_of({});
  const double fixed = bytes_of({"square_sum"});
  std::vector<DeviceTensor> one;
  one.push_back(DeviceTensor(DType::float32, {size}, 1.0));
  square_sum_of(one);
  EXPECT_LT(bytes_of({"square_sum"}) - fixed, 1.001 * 4 * elements);
  cuda::add_to_fixed_point(device_launch(), sums, integers({0}), gradient, kLimit);
  EXPECT_EQ(bytes_of({"add_to_fixed_point"}), 24 * elements);
  cuda::fixed_point_to_float(device_launch(), gradient, sums, integers({0}));
  EXPECT_LT(bytes_of({"fixed_point_to_float"}), 1.02 * 20 * elements);  // each thread asks whether sums are poisoned
  cuda::accumulate_loss(device_launch(), integers({0, 0}), gradient);
  EXPECT_EQ(bytes_of({"accumulate_loss"}), 4 * elements);
  const DeviceTensor digits(DType::int64, {kernels::kSquareDigits}), norm(DType::float64, {1});
  const Tensor gradients[] = {gradient};
  const TensorType types[] = {gradient.tensor().type};
  cuda::square_digits(device_launch(cuda::square_digits_workspace(types)), digits, gradients);
  EXPECT_LT(bytes_of({"square_digits"}), 1.005 * 4 * elements);
  cuda::square_digits_to_float(device_launch(), norm, digits);
  EXPECT_EQ(bytes_of({"square_digits_to_float"}), 8.0 * (kernels::kSquareDigits + 1));
}

TEST(UpdateOnTheEmulator, Float64IsRefused) {
  const DeviceTensor x(DType::float64, {4}, 1.0), sums(DType::int64, {4}, 0.0);
  EXPECT_THROW(cuda::accumulate_loss(device_launch(), integers({0, 0}), x), UsageError);
  EXPECT_THROW(cuda::add_to_fixed_point(device_launch(), sums, integers({0}), x, kLimit), UsageError);
}

}  // namespace
}  // namespace attamba::simt
