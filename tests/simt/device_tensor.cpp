#include "tests/simt/device_tensor.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "src/core/random.h"

namespace attamba::simt {

namespace {

/// body(T) with the element type's C++ type.
template <class Body>
void dispatch(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::float32:
      return body(float{});
    case DType::bfloat16:
      return body(bfloat16{});
    case DType::float64:
      return body(double{});
    case DType::int32:
      return body(std::int32_t{});
    case DType::int64:
      return body(std::int64_t{});
  }
}

template <class T>
T from_real(double value) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    return bfloat16(static_cast<float>(value));
  } else {
    return static_cast<T>(value);
  }
}

template <class T>
double to_real(T value) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    return static_cast<double>(static_cast<float>(value));
  } else {
    return static_cast<double>(value);
  }
}

std::string place(const Shape& shape, std::size_t index) {
  std::string text = "]";
  for (int i = static_cast<int>(shape.rank()) - 1; i >= 0; --i) {
    const auto extent = static_cast<std::size_t>(shape[i]);
    text = concat(i > 0 ? ", " : "[", index % extent, text);
    index /= extent;
  }
  return text;
}

}  // namespace

DeviceTensor DeviceTensor::random(DType dtype, const Shape& shape, std::uint32_t name, double deviation, double mean) {
  std::vector<double> values(static_cast<std::size_t>(shape.elements()));
  RandomStream random(20240229, name);
  for (double& value : values) {
    value = mean + deviation * random.normal();
  }
  return {dtype, shape, values};
}

void DeviceTensor::set(std::span<const double> values) {
  require(values.size() == size(), "DeviceTensor: ", values.size(), " values for ", type_);
  dispatch(type_.dtype, [&](auto example) {
    using T = decltype(example);
    const auto to = view<T>();
    for (std::size_t i = 0; i < values.size(); ++i) {
      to[i] = from_real<T>(values[i]);
    }
  });
  mark_written(memory_.data(), memory_.size());
}

std::vector<double> DeviceTensor::values() const {
  std::vector<double> values(size());
  dispatch(type_.dtype, [&](auto example) {
    const auto from = view<decltype(example)>();
    for (std::size_t i = 0; i < values.size(); ++i) {
      values[i] = to_real(from[i]);
    }
  });
  return values;
}

bool DeviceTensor::same_bits(const DeviceTensor& other) const {
  return type_ == other.type_ &&
         (memory_.size() == 0 || std::memcmp(memory_.data(), other.memory_.data(), memory_.size()) == 0);
}

Difference difference(std::span<const double> actual, std::span<const double> expected) {
  require(actual.size() == expected.size(), "difference: ", actual.size(), " values for ", expected.size());
  Difference result;
  double squares = 0;
  for (const double value : expected) {
    squares += std::isfinite(value) ? value * value : 0;
  }
  result.norm = squares > 0 ? std::sqrt(squares / static_cast<double>(expected.size())) : 1;
  result.worst = -1;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    double error = std::abs(actual[i] - expected[i]) / result.norm;
    if (!std::isfinite(error)) {
      const bool same = actual[i] == expected[i] || (std::isnan(actual[i]) && std::isnan(expected[i]));
      error = same ? 0 : std::numeric_limits<double>::infinity();
    }
    if (error > result.worst) {
      result.worst = error, result.index = i, result.actual = actual[i], result.expected = expected[i];
    }
  }
  result.worst = std::max(result.worst, 0.0);
  return result;
}

::testing::AssertionResult close_to(const DeviceTensor& actual, std::span<const double> expected, double tolerance) {
  const Difference worst = difference(actual.values(), expected);
  auto result = worst.worst <= tolerance ? ::testing::AssertionSuccess() : ::testing::AssertionFailure();
  return result << "worst at " << place(actual.shape(), worst.index) << " of " << actual.shape() << ": " << worst.actual
                << " instead of " << worst.expected << ", off by " << worst.worst << " of the root mean square " << worst.norm
                << ", allowed " << tolerance;
}

double rounding(DType dtype) {
  switch (dtype) {
    case DType::bfloat16:
      return 0x1p-8;
    case DType::float64:
      return 0x1p-53;
    default:
      return 0x1p-24;
  }
}

std::vector<double> rounded(DType dtype, std::vector<double> values) {
  dispatch(dtype, [&](auto example) {
    for (double& value : values) {
      value = to_real(from_real<decltype(example)>(value));
    }
  });
  return values;
}

}  // namespace attamba::simt
