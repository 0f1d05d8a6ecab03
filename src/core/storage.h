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

/// Named tensors with lasting addresses: parameters, gradients, optimizer state, inputs. Programs that name the same tensor
/// share its memory. Fresh memory is zero.
class Storage {
 public:
  explicit Storage(Device device = Device::cpu) : device_(device) {}

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
  Device device() const { return device_; }

  /// Host memory that stands for a tensor which the host writes or reads now and then: the tensor itself on the CPU, otherwise
  /// memory of the same size that `upload` copies from and `download` copies to. Both are enqueued (DeviceRuntime).
  Tensor mirror(const std::string& name);
  void upload(const std::string& name);
  void download(const std::string& name);

 private:
  struct Mirror {
    PinnedMemory memory;
    Tensor tensor;
  };

  Device device_;
  std::map<std::string, Tensor> tensors_;
  std::vector<Memory> buffers_;
  std::map<std::string, Mirror> mirrors_;
};

/// What a tensor holds, for the host: the tensor itself on the CPU, otherwise a copy made when this is constructed, after
/// everything enqueued before.
class HostCopy {
 public:
  explicit HostCopy(const Tensor& tensor);
  const Tensor& tensor() const { return tensor_; }

 private:
  std::vector<std::byte> memory_;
  Tensor tensor_;
};

/// The elements of a floating-point tensor of any device.
std::vector<double> values_on_host(const Tensor& tensor);

/// Fills a tensor of any device from host memory of the same type; when it returns `from` may be written again.
void copy_from_host(const Tensor& to, const Tensor& from);
/// Sets every byte to 0.
void clear(const Tensor& tensor);

}  // namespace attamba
