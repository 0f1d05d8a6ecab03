// What tests of memory-bound kernels share: references in float64, comparisons element by element, runs in other orders, bytes.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "tests/simt/device_tensor.h"
#include "tests/simt/emulator.h"

namespace attamba::simt {

/// The same numbers in float64, or as they are when they are not floating-point: what the CPU's kernels compute references
/// from.
inline DeviceTensor wide(const DeviceTensor& tensor) {
  return {DType::float64, tensor.shape(), tensor.values()};
}

/// |actual - expected| <= relative |expected| + absolute(i) everywhere; NaN and infinities where they are expected.
inline ::testing::AssertionResult within(const DeviceTensor& actual, const std::vector<double>& expected, double relative,
                                         const std::function<double(std::size_t)>& absolute) {
  const std::vector<double> found = actual.values();
  for (std::size_t i = 0; i < found.size(); ++i) {
    const bool same = found[i] == expected[i] || (std::isnan(found[i]) && std::isnan(expected[i]));
    const double allowed = relative * std::abs(expected[i]) + absolute(i);
    if (!same && !(std::abs(found[i] - expected[i]) <= allowed)) {
      return ::testing::AssertionFailure() << "element " << i << " of " << actual.tensor().type << ": " << found[i]
                                           << " instead of " << expected[i] << ", allowed " << allowed;
    }
  }
  return ::testing::AssertionSuccess();
}
inline ::testing::AssertionResult within(const DeviceTensor& actual, const DeviceTensor& expected, double relative,
                                         double absolute = 0) {
  return within(actual, expected.values(), relative, [=](std::size_t) { return absolute; });
}

/// Runs `compute` (returning a DeviceTensor) with blocks and warps in several orders; every result must have the same bits.
template <class Compute>
void expect_same_in_any_order(const Compute& compute) {
  const std::uint64_t before = options().seed;
  options().seed = 1;
  const DeviceTensor expected = compute();
  for (const std::uint64_t seed : {2, 3}) {
    options().seed = seed;
    EXPECT_TRUE(expected.same_bits(compute())) << "seed " << seed;
  }
  options().seed = before;
}

/// Bytes of global memory that kernels of these names asked for since the last reset_counters.
inline double bytes_of(std::initializer_list<const char*> kernels) {
  std::int64_t bytes = 0;
  for (const char* kernel : kernels) {
    const Counters c = counters(kernel);
    EXPECT_GT(c.launches, 0) << "no kernel is called " << kernel;
    bytes += c.global_loaded + c.global_stored + c.copied_async;
  }
  return static_cast<double>(bytes);
}

}  // namespace attamba::simt
