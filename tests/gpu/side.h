// One device's half of a check of kernels: tensors with numbers that both halves share, poisoned memory for what a kernel
// writes, and results as float64.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/kernels.h"
#include "src/core/device.h"
#include "src/core/storage.h"
#include "src/core/tensor.h"

namespace attamba::gpu_check {

/// Makes the GPU, or what stands for it, the device `cuda` of this process. Throws UsageError where there is none.
void connect();

/// A result, and how far it may be from the reference: ||a - b|| / ||b||, both less `before`, what the kernel added to.
/// Any single element may be off by four times that of the largest magnitude.
struct Output {
  std::string name;
  Tensor tensor;
  double float32 = 0, bfloat16 = 0;  ///< by compute type
  double before = 0;
};

/// Tensors come in the order of calls, and their numbers depend on that order alone: the same for every device and type.
class Side {
 public:
  Side(Device device, DType type) : device_(device), type_(type) {}

  Device device() const { return device_; }
  DType type() const { return type_; }
  DType sum_type() const { return accumulator_of(type_); }
  const kernels::Backend& on() const { return kernels::on(device_); }

  /// mean + deviation times normal numbers that bfloat16 holds exactly.
  Tensor numbers(const Shape& shape, double deviation = 1, double mean = 0) { return random(type_, shape, deviation, mean); }
  Tensor sums(const Shape& shape, double deviation = 1, double mean = 0) { return random(sum_type(), shape, deviation, mean); }
  Tensor constant(DType type, const Shape& shape, double value);
  Tensor integers(const std::vector<std::int32_t>& values);
  Tensor float64s(const std::vector<double>& values);
  /// Memory that is not a number until the kernel writes it.
  Tensor output(DType type, const Shape& shape);
  Tensor output(const Shape& shape) { return output(type_, shape); }
  /// Scratch is poisoned, too.
  Launch launch(std::size_t scratch = 0);

 private:
  Tensor random(DType type, const Shape& shape, double deviation, double mean);
  Tensor make(DType type, const Shape& shape, const std::vector<double>& values);
  Tensor poisoned(const TensorType& type);

  Device device_;
  DType type_;
  std::uint32_t next_ = 0;
  std::vector<Memory> memory_;
};

struct Case {
  std::string name;
  std::function<std::vector<Output>(Side&)> run;
  bool large = false;             ///< for GPUs alone: an emulator would take minutes
  bool in_float64 = true;         ///< the reference computes in float64; otherwise in the checked type, for integer results
  std::vector<DType> types = {};  ///< empty: float32 and bfloat16
};

/// kernel_cases.cpp, mixer_cases.cpp (attention, scan, recurrences)
std::vector<Case> kernel_cases();
std::vector<Case> mixer_cases();

}  // namespace attamba::gpu_check
