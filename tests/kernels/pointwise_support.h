// Arrays, random values and comparisons for the tests of memory-bound kernels.
#pragma once

#include <gtest/gtest.h>
#include <omp.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>

#include "src/core/launch.h"
#include "src/core/random.h"
#include "src/core/tensor.h"

namespace attamba::kernels::cpu {

inline double to_real(double value) {
  return value;
}
inline double to_real(bfloat16 value) {
  return static_cast<double>(static_cast<float>(value));
}

template <class T>
T from_real(double value) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    return bfloat16(static_cast<float>(value));
  } else {
    return static_cast<T>(value);
  }
}

/// Owns the elements that a tensor views; copying it copies them.
template <class T>
struct Array {
  Array() = default;
  explicit Array(const Shape& extents, double value = 0)
      : shape(extents), data(static_cast<std::size_t>(extents.elements()), from_real<T>(value)) {}

  Tensor tensor() { return {data.data(), {kDTypeOf<T>, shape}}; }
  std::size_t size() const { return data.size(); }
  T& operator[](std::size_t i) { return data[i]; }
  const T& operator[](std::size_t i) const { return data[i]; }
  double real(std::size_t i) const { return to_real(data[i]); }
  bool same_bits(const Array& other) const {
    return size() == other.size() && (data.empty() || std::memcmp(data.data(), other.data.data(), size() * sizeof(T)) == 0);
  }

  Shape shape;
  std::vector<T> data;
};

template <class T>
Array<T> random_array(const Shape& shape, std::uint32_t name, double scale = 1, double mean = 0) {
  Array<T> array(shape);
  RandomStream random(20240229, name);
  for (T& element : array.data) {
    element = from_real<T>(mean + scale * random.normal());
  }
  return array;
}

/// The same numbers in another type.
template <class To, class From>
Array<To> as_type(const Array<From>& from) {
  Array<To> to(from.shape);
  for (std::size_t i = 0; i < from.size(); ++i) {
    to[i] = from_real<To>(from.real(i));
  }
  return to;
}

/// Half the distance between 1 and the next number of T: the relative error of one rounding.
template <class T>
constexpr double rounding() {
  return std::is_same_v<T, double> ? 0x1p-53 : std::is_same_v<T, float> ? 0x1p-24 : 0x1p-8;
}

/// Scratch of exactly the size asked for, 64-byte aligned, filled with what must not be taken for zeros.
class Scratch {
 public:
  explicit Scratch(std::size_t bytes) : bytes_(bytes), data_(new (std::align_val_t{64}) std::byte[bytes]) {
    std::memset(data_, 0xff, bytes);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { ::operator delete[](data_, std::align_val_t{64}); }
  Launch launch() const { return {.scratch = {data_, bytes_}}; }

 private:
  std::size_t bytes_;
  std::byte* data_;
};

/// Runs `compute` (returning an Array) with 1, 2 and 3 threads; every result must have the same bits.
template <class Compute>
void expect_same_for_any_thread_count(const Compute& compute) {
  const int before = omp_get_max_threads();
  omp_set_num_threads(1);
  const auto expected = compute();
  for (const int threads : {2, 3}) {
    omp_set_num_threads(threads);
    EXPECT_TRUE(expected.same_bits(compute())) << threads << " threads";
  }
  omp_set_num_threads(before);
}

using ComputeTypes = ::testing::Types<float, bfloat16, double>;
using AccumulatorTypes = ::testing::Types<float, double>;

}  // namespace attamba::kernels::cpu
