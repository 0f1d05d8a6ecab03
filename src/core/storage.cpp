#include "src/core/storage.h"

#include "src/core/error.h"

namespace attamba {

Tensor Storage::get(const std::string& name, const TensorType& type) {
  if (const auto found = tensors_.find(name); found != tensors_.end()) {
    require(found->second.type == type, "storage: ", name, " is ", found->second.type, ", asked for as ", type);
    return found->second;
  }
  const Entry entry{name, type};
  make_contiguous({&entry, 1}, name);
  return tensors_.at(name);
}

Tensor Storage::find(const std::string& name) const {
  const auto found = tensors_.find(name);
  require(found != tensors_.end(), "storage: no tensor named ", name);
  return found->second;
}

void Storage::make_contiguous(std::span<const Entry> entries, const std::string& purpose) {
  std::size_t bytes = 0;
  for (const Entry& entry : entries) {
    require(!contains(entry.name), "storage: ", entry.name, " exists already");
    bytes += align_up(entry.type.bytes());
  }
  std::byte* next = buffers_.emplace_back(device_, bytes, purpose).data();
  for (const Entry& entry : entries) {
    tensors_[entry.name] = Tensor{next, entry.type, device_};
    next += align_up(entry.type.bytes());
  }
}

Tensor Storage::mirror(const std::string& name) {
  const Tensor tensor = find(name);
  if (device_ == Device::cpu) {
    return tensor;
  }
  Mirror& mirror = mirrors_[name];
  if (!mirror.tensor) {
    mirror.memory = PinnedMemory(device_, tensor.bytes(), name);
    mirror.tensor = {mirror.memory.data(), tensor.type};
  }
  return mirror.tensor;
}

void Storage::upload(const std::string& name) {
  if (device_ != Device::cpu) {
    const Tensor tensor = find(name);
    runtime(device_).copy_to_device(tensor.data, mirror(name).data, tensor.bytes());
  }
}

void Storage::download(const std::string& name) {
  if (device_ != Device::cpu) {
    const Tensor tensor = find(name);
    runtime(device_).copy_to_host(mirror(name).data, tensor.data, tensor.bytes());
  }
}

HostCopy::HostCopy(const Tensor& tensor) : tensor_(tensor) {
  if (tensor.device != Device::cpu) {
    memory_.resize(tensor.bytes());
    tensor_ = {memory_.data(), tensor.type};
    runtime(tensor.device).copy_to_host(memory_.data(), tensor.data, tensor.bytes());
    runtime(tensor.device).synchronize();
  }
}

std::vector<double> values_on_host(const Tensor& tensor) {
  const HostCopy copy(tensor);
  return dispatch_floating(tensor.dtype(), "copy to the host", [&]<class T>() {
    std::vector<double> values;
    values.reserve(static_cast<std::size_t>(tensor.elements()));
    for (const T x : copy.tensor().span<T>()) {
      values.push_back(static_cast<double>(static_cast<Accumulator<T>>(x)));
    }
    return values;
  });
}

void copy_from_host(const Tensor& to, const Tensor& from) {
  require(to.type == from.type && from.device == Device::cpu, "copy: ", from.type, " from the host does not fit ", to.type);
  runtime(to.device).copy_to_device(to.data, from.data, to.bytes());
  runtime(to.device).wait_for_copies();
}

void clear(const Tensor& tensor) {
  runtime(tensor.device).clear(tensor.data, tensor.bytes());
}

}  // namespace attamba
