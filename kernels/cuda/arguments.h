// What the host sides of kernels share: checks of arguments, element types as kernels see them, sizes of grids.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string_view>
#include <type_traits>

#include "kernels/device/intrinsics.h"
#include "src/core/error.h"
#include "src/core/tensor.h"

namespace attamba::kernels::cuda {

inline void require_type(const Tensor& tensor, const TensorType& expected, std::string_view operation, std::string_view name) {
  require(tensor.type == expected, operation, ": ", name, " is ", tensor.type, ", expected ", expected);
}

/// Calls `body.template operator()<T>()` with a compute type's element type as kernels see it.
template <class Body>
decltype(auto) dispatch_compute(DType type, std::string_view operation, Body&& body) {
  switch (type) {
    case DType::float32:
      return body.template operator()<float>();
    case DType::bfloat16:
      return body.template operator()<device::bf16>();
    case DType::float64:
      throw UsageError(concat(operation, ": GPUs compute in float32 or bfloat16; float64 is for checks on the CPU"));
    default:
      throw Error(concat(operation, ": expected a floating-point tensor, got ", name_of(type)));
  }
}

/// Refuses what is not float32.
inline void require_float32(const Tensor& tensor, std::string_view operation) {
  dispatch_compute(tensor.dtype(), operation, [&]<class T>() {});
  require(tensor.dtype() == DType::float32, operation, ": expected a float32 tensor, got ", tensor.type);
}

/// A tensor's elements as kernels see them.
template <class T>
T* elements_of(const Tensor& tensor) {
  if constexpr (std::is_same_v<T, device::bf16>) {
    return reinterpret_cast<T*>(tensor.as<bfloat16>());
  } else {
    return tensor.as<T>();
  }
}

/// The same for a tensor that may be empty: null then.
template <class T>
T* optional_elements_of(const Tensor& tensor) {
  return tensor ? elements_of<T>(tensor) : nullptr;
}

inline bool aligned_16(std::initializer_list<const void*> addresses) {
  return std::all_of(addresses.begin(), addresses.end(),
                     [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; });
}

/// Rows of `columns` elements of T are aligned to 16 bytes wherever the tensors begin so.
template <class T>
bool packed_rows(std::int64_t columns, std::initializer_list<const void*> addresses) {
  return columns * static_cast<std::int64_t>(sizeof(T)) % 16 == 0 && aligned_16(addresses);
}

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace attamba::kernels::cuda
