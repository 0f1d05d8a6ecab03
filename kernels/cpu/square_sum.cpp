// The squared norm of all gradients: a float64 sum, or an exact one in digits (docs/numerics.md).
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/block_list.h"
#include "kernels/cpu/elementwise.h"
#include "kernels/cpu/vector_math.h"
#include "kernels/kernels.h"
#include "src/core/parallel.h"

namespace attamba::kernels::cpu {
namespace {

constexpr double kTwo32 = 0x1p32;
constexpr double kLargestSquared = 0x1p16;

template <class A>
double block_square_sum(const A* x, std::int64_t begin, std::int64_t end) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = begin; i < end; ++i) {
    const double value = convert<double>(x[i]);
    sum += value * value;
  }
  return sum;
}

double square_sum_of_digits(const std::int64_t* digits) {
  std::int64_t carry = 0;
  double sum = 0;
  for (int i = 0; i < 4; ++i) {  // products with powers of two are exact: only additions round
    const std::int64_t digit = digits[i] + carry;
    carry = i < 3 ? digit >> 32 : 0;
    sum = sum * (1 / kTwo32) + static_cast<double>(digit - (carry << 32));
  }
  return digits[4] == 0 ? sum : std::numeric_limits<double>::quiet_NaN();
}

/// Sums of doubles: at most kElementGrain digits below 2^32, so each is exact.
template <class A>
void block_square_digits(const A* x, std::int64_t begin, std::int64_t end, std::int64_t* digits) {
  static_assert(kElementGrain <= (1 << 21));
  double sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0, unfit = 0;
#pragma omp simd reduction(+ : sum0, sum1, sum2, sum3, unfit)
  for (std::int64_t i = begin; i < end; ++i) {
    const double value = convert<double>(x[i]);
    const bool fits = std::abs(value) < kLargestSquared;  // false for NaN
    double rest = fits ? value * value : 0.0;
    const double digit3 = std::floor(rest);
    rest = (rest - digit3) * kTwo32;
    const double digit2 = std::floor(rest);
    rest = (rest - digit2) * kTwo32;
    const double digit1 = std::floor(rest);
    sum0 += std::floor((rest - digit1) * kTwo32);
    sum1 += digit1;
    sum2 += digit2;
    sum3 += digit3;
    unfit += fits ? 0.0 : 1.0;
  }
  const double sums[kSquareDigits] = {sum0, sum1, sum2, sum3, unfit};
  std::transform(std::begin(sums), std::end(sums), digits, [](double sum) { return static_cast<std::int64_t>(sum); });
}

}  // namespace

std::size_t square_sum_workspace(std::span<const TensorType> tensors) {
  const BlockList blocks(tensors.size(), [&](std::size_t i) { return tensors[i].shape.elements(); });
  return ScratchAllocator::aligned_bytes<double>(static_cast<std::size_t>(blocks.count()));
}

void square_sum(const Launch& launch, const Tensor& out, std::span<const Tensor> tensors) {
  require_type(out, {DType::float64, Shape{1}}, "square_sum", "out");
  for (const Tensor& tensor : tensors) {
    dispatch_floating(tensor.dtype(), "square_sum", []<class T>() {});
  }
  const BlockList blocks(tensors.size(), [&](std::size_t i) { return tensors[i].elements(); });
  double* const partial = ScratchAllocator(launch).take<double>(static_cast<std::size_t>(blocks.count()));
  parallel_for(blocks.count(), [&](std::int64_t block) {
    const std::size_t index = blocks.tensor(block);
    const Tensor& tensor = tensors[index];
    const std::int64_t begin = blocks.begin(block, index);
    const std::int64_t end = std::min(begin + kElementGrain, tensor.elements());
    partial[block] = dispatch_floating(tensor.dtype(), "square_sum",
                                       [&]<class T>() { return block_square_sum(tensor.as<T>(), begin, end); });
  });
  double sum = 0;
  for (std::int64_t block = 0; block < blocks.count(); ++block) {
    sum += partial[block];
  }
  out.as<double>()[0] = sum;
}

std::size_t square_digits_workspace(std::span<const TensorType> tensors) {
  const BlockList blocks(tensors.size(), [&](std::size_t i) { return tensors[i].shape.elements(); });
  return ScratchAllocator::aligned_bytes<std::int64_t>(static_cast<std::size_t>(blocks.count() * kSquareDigits));
}

void square_digits(const Launch& launch, const Tensor& digits, std::span<const Tensor> tensors) {
  require_type(digits, {DType::int64, Shape{kSquareDigits}}, "square_digits", "digits");
  for (const Tensor& tensor : tensors) {
    dispatch_floating(tensor.dtype(), "square_digits", []<class T>() {});
  }
  const BlockList blocks(tensors.size(), [&](std::size_t i) { return tensors[i].elements(); });
  auto* const partial = ScratchAllocator(launch).take<std::int64_t>(static_cast<std::size_t>(blocks.count() * kSquareDigits));
  parallel_for(blocks.count(), [&](std::int64_t block) {
    const std::size_t index = blocks.tensor(block);
    const Tensor& tensor = tensors[index];
    const std::int64_t begin = blocks.begin(block, index);
    const std::int64_t end = std::min(begin + kElementGrain, tensor.elements());
    dispatch_floating(tensor.dtype(), "square_digits",
                      [&]<class T>() { block_square_digits(tensor.as<T>(), begin, end, partial + block * kSquareDigits); });
  });
  std::int64_t* const out = digits.as<std::int64_t>();
  std::fill(out, out + kSquareDigits, 0);
  for (std::int64_t i = 0; i < blocks.count() * kSquareDigits; ++i) {
    out[i % kSquareDigits] += partial[i];
  }
}

void square_digits_to_float(const Launch&, const Tensor& out, const Tensor& digits) {
  require_type(out, {DType::float64, Shape{1}}, "square_digits_to_float", "out");
  require_type(digits, {DType::int64, Shape{kSquareDigits}}, "square_digits_to_float", "digits");
  out.as<double>()[0] = square_sum_of_digits(digits.as<std::int64_t>());
}

}  // namespace attamba::kernels::cpu
