// Shapes and tensors: typed views of memory that somebody else owns. Always contiguous, row-major.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <ostream>
#include <span>

#include "src/core/device.h"
#include "src/core/dtype.h"
#include "src/core/error.h"

namespace attamba {

/// Up to four dimensions. The last one is contiguous; `rows()` is the product of all others.
class Shape {
 public:
  static constexpr std::size_t kMaxRank = 4;

  Shape() = default;
  Shape(std::initializer_list<std::int64_t> extents) : Shape(std::span(extents.begin(), extents.size())) {}
  explicit Shape(std::span<const std::int64_t> extents) : rank_(extents.size()) {
    require(extents.size() <= kMaxRank, "shape: at most ", kMaxRank, " dimensions, got ", extents.size());
    for (std::size_t i = 0; i < rank_; ++i) {
      require(extents[i] >= 0, "shape: negative extent ", extents[i]);
      extents_[i] = extents[i];
    }
  }

  std::size_t rank() const { return rank_; }
  /// Negative indices count from the end.
  std::int64_t operator[](int i) const { return extents_[i < 0 ? rank_ + i : i]; }
  std::int64_t elements() const {
    std::int64_t product = 1;
    for (std::size_t i = 0; i < rank_; ++i) {
      product *= extents_[i];
    }
    return product;
  }
  std::int64_t columns() const { return rank_ == 0 ? 1 : extents_[rank_ - 1]; }
  std::int64_t rows() const { return columns() == 0 ? 0 : elements() / columns(); }

  friend bool operator==(const Shape& a, const Shape& b) {
    return a.rank_ == b.rank_ && std::equal(a.begin(), a.end(), b.begin());
  }
  const std::int64_t* begin() const { return extents_.data(); }
  const std::int64_t* end() const { return extents_.data() + rank_; }

 private:
  std::array<std::int64_t, kMaxRank> extents_{};
  std::size_t rank_ = 0;
};

inline std::ostream& operator<<(std::ostream& out, const Shape& shape) {
  out << '[';
  for (const auto* extent = shape.begin(); extent != shape.end(); ++extent) {
    out << (extent == shape.begin() ? "" : ", ") << *extent;
  }
  return out << ']';
}

/// What is known of a tensor before it has memory.
struct TensorType {
  DType dtype = DType::float32;
  Shape shape;

  std::size_t bytes() const { return static_cast<std::size_t>(shape.elements()) * size_of(dtype); }
  friend bool operator==(const TensorType&, const TensorType&) = default;
};

inline std::ostream& operator<<(std::ostream& out, const TensorType& type) {
  return out << name_of(type.dtype) << type.shape;
}

/// A typed view. Copying it copies the view, never the data; a default-made one is empty ("no tensor here").
struct Tensor {
  void* data = nullptr;
  TensorType type;
  Device device = Device::cpu;  ///< where the memory is; the host reads and writes that of the CPU only

  const Shape& shape() const { return type.shape; }
  DType dtype() const { return type.dtype; }
  std::int64_t elements() const { return type.shape.elements(); }
  std::size_t bytes() const { return type.bytes(); }
  explicit operator bool() const { return data != nullptr; }

  template <class T>
  T* as() const {
    require(type.dtype == kDTypeOf<T>, "tensor: asked for ", name_of(kDTypeOf<T>), ", holds ", type);
    return static_cast<T*>(data);
  }
  /// The elements, for the host.
  template <class T>
  std::span<T> span() const {
    require(device == Device::cpu, "tensor: ", type, " is not in host memory");
    return {as<T>(), static_cast<std::size_t>(elements())};
  }
};

/// The elements of `type` from element `first` of a tensor on.
inline Tensor part_of(const Tensor& whole, const TensorType& type, std::int64_t first) {
  require(whole.dtype() == type.dtype && first >= 0 && first + type.shape.elements() <= whole.elements(), "tensor: ", type,
          " from element ", first, " is not part of ", whole.type);
  return {static_cast<std::byte*>(whole.data) + static_cast<std::size_t>(first) * size_of(type.dtype), type, whole.device};
}

}  // namespace attamba
