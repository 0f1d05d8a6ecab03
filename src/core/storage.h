// Memory that outlives a step. Nothing else in the program allocates tensors.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "src/core/tensor.h"

namespace attamba {

/// Zeroed, 64-byte aligned host memory, backed by huge pages where the system grants them. Freed with the object.
class HostBuffer {
 public:
  HostBuffer() = default;
  /// Throws Error with the size when the system has no such memory.
  explicit HostBuffer(std::size_t bytes, const std::string& purpose);
  std::byte* data() const { return memory_.get(); }
  std::size_t size() const { return size_; }

 private:
  struct Free {
    void operator()(std::byte* memory) const;
  };
  std::unique_ptr<std::byte, Free> memory_;
  std::size_t size_ = 0;
};

/// Named tensors with lasting addresses: parameters, gradients, optimizer state, inputs. Programs that name the same tensor
/// share its memory. Fresh memory is zero.
class Storage {
 public:
  struct Entry {
    std::string name;
    TensorType type;
  };

  /// The tensor of that name, made if missing. Throws Error when it exists with another type.
  Tensor get(const std::string& name, const TensorType& type);
  /// The tensor of that name; throws Error when there is none.
  Tensor find(const std::string& name) const;
  bool contains(const std::string& name) const { return tensors_.count(name) != 0; }
  /// Makes all of these at once, packed next to each other in this order, so that a range of them is one piece of memory
  /// (every tensor starts at a 64-byte boundary).
  void make_contiguous(std::span<const Entry> entries, const std::string& purpose);
  const std::map<std::string, Tensor>& tensors() const { return tensors_; }

 private:
  std::map<std::string, Tensor> tensors_;
  std::vector<HostBuffer> buffers_;
};

constexpr std::size_t kAlignment = 64;
constexpr std::size_t align_up(std::size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

}  // namespace attamba
