// The emulator's global memory. Kernels may touch nothing else.
#pragma once

#include <cstddef>
#include <span>

namespace attamba::simt {

/// 256-byte aligned memory between red zones, its bytes 0xff (not a number) and marked as never written. Host code may read and
/// write it directly, but has to use copy_to_device, fill or mark_written for kernels to accept what it wrote.
void* allocate(std::size_t bytes);
/// Kernels that touch it from now on are told so. Throws Error when `p` is not from allocate.
void release(void* p);

void copy_to_device(void* device, const void* host, std::size_t bytes);
/// Within device memory; the destination counts as written.
void copy_on_device(void* to, const void* from, std::size_t bytes);
void copy_from_device(void* host, const void* device, std::size_t bytes);
void fill(void* device, unsigned char value, std::size_t bytes);
/// Contents written by the host by other means.
void mark_written(void* device, std::size_t bytes);
/// As fresh from allocate: scratch memory between two uses.
void poison(void* device, std::size_t bytes);

/// Owns an allocation.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  explicit DeviceMemory(std::size_t bytes) : data_(static_cast<std::byte*>(allocate(bytes))), bytes_(bytes) {}
  DeviceMemory(DeviceMemory&& other) noexcept : data_(other.data_), bytes_(other.bytes_) {
    other.data_ = nullptr;
    other.bytes_ = 0;
  }
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    std::byte* data = data_;
    const std::size_t bytes = bytes_;
    data_ = other.data_, bytes_ = other.bytes_;
    other.data_ = data, other.bytes_ = bytes;
    return *this;
  }
  ~DeviceMemory() {
    if (data_ != nullptr) {
      release(data_);
    }
  }

  std::byte* data() const { return data_; }
  std::size_t size() const { return bytes_; }
  std::span<std::byte> span() const { return {data_, bytes_}; }

 private:
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace attamba::simt
