// Tensors in the emulator's memory, launches with scratch, and comparisons: what tests of kernels are made of.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <span>
#include <vector>

#include "src/core/launch.h"
#include "src/core/tensor.h"
#include "tests/simt/device_memory.h"

namespace attamba::simt {

/// Owns device memory of exactly a tensor's size. Values travel as float64 and are rounded to the element type. Fresh tensors
/// are never written: kernels that read them are told so.
class DeviceTensor {
 public:
  DeviceTensor() = default;
  DeviceTensor(DType dtype, const Shape& shape) : type_{dtype, shape}, memory_(type_.bytes()) {}
  DeviceTensor(DType dtype, const Shape& shape, std::span<const double> values) : DeviceTensor(dtype, shape) { set(values); }
  DeviceTensor(DType dtype, const Shape& shape, std::span<const float> values)
      : DeviceTensor(dtype, shape, std::vector<double>(values.begin(), values.end())) {}
  /// All elements the same.
  DeviceTensor(DType dtype, const Shape& shape, double value)
      : DeviceTensor(dtype, shape, std::vector<double>(static_cast<std::size_t>(shape.elements()), value)) {}
  /// mean + deviation times standard normal numbers, named by `name`.
  static DeviceTensor random(DType dtype, const Shape& shape, std::uint32_t name, double deviation = 1, double mean = 0);

  Tensor tensor() const { return {memory_.data(), type_}; }
  operator Tensor() const { return tensor(); }  // NOLINT(google-explicit-constructor): kernels take tensors
  const Shape& shape() const { return type_.shape; }
  std::size_t size() const { return static_cast<std::size_t>(type_.shape.elements()); }

  void set(std::span<const double> values);
  std::vector<double> values() const;
  /// As the host sees the memory: for integers and for comparing bits.
  template <class T>
  std::span<T> view() const {
    return tensor().span<T>();
  }
  bool same_bits(const DeviceTensor& other) const;
  /// As fresh: no kernel may read it before one has written it.
  void poison() { simt::poison(memory_.data(), memory_.size()); }

 private:
  TensorType type_;
  DeviceMemory memory_;
};

/// A launch on the emulated device, with scratch that is never written and ends where it should.
class DeviceLaunch {
 public:
  explicit DeviceLaunch(std::size_t scratch_bytes, void* stream = nullptr) : scratch_(scratch_bytes), stream_(stream) {}
  Launch launch() const { return {.device = Device::cuda, .stream = stream_, .scratch = scratch_.span()}; }
  operator Launch() const { return launch(); }  // NOLINT(google-explicit-constructor): kernels take launches

 private:
  DeviceMemory scratch_;
  void* stream_;
};
inline DeviceLaunch device_launch(std::size_t scratch_bytes = 0) {
  return DeviceLaunch(scratch_bytes);
}

/// The largest |actual - expected|, in units of the root mean square of expected (of 1 where that is 0), and where it is.
/// Infinite where either is not finite and they are not the same.
struct Difference {
  double worst = 0;
  std::size_t index = 0;
  double actual = 0, expected = 0, norm = 0;
};
Difference difference(std::span<const double> actual, std::span<const double> expected);

/// EXPECT_TRUE(close_to(out, expected, 0x1p-8));
::testing::AssertionResult close_to(const DeviceTensor& actual, std::span<const double> expected, double tolerance);

/// One rounding to nearest, relative to the value: 2^-24 for float32, 2^-8 for bfloat16, 2^-53 for float64.
double rounding(DType dtype);
/// The values, each rounded to the type.
std::vector<double> rounded(DType dtype, std::vector<double> values);

}  // namespace attamba::simt
