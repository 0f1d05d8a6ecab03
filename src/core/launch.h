// What a kernel needs to run: where, on which stream, and its scratch memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "src/core/device.h"
#include "src/core/error.h"

namespace attamba {

struct Launch {
  Device device = Device::cpu;
  void* stream = nullptr;             ///< cudaStream_t; unused on the CPU
  std::span<std::byte> scratch = {};  ///< at least what the operation asked for; kAlignment; contents undefined
};

/// Hands out consecutive pieces of a launch's scratch, each of kAlignment.
class ScratchAllocator {
 public:
  explicit ScratchAllocator(const Launch& launch) : rest_(launch.scratch) {}

  template <class T>
  T* take(std::size_t count) {
    const std::size_t bytes = aligned_bytes<T>(count);
    require(bytes <= rest_.size(), "scratch: need ", bytes, " bytes, have ", rest_.size());
    auto* piece = reinterpret_cast<T*>(rest_.data());
    rest_ = rest_.subspan(bytes);
    return piece;
  }

  /// The bytes that `take<T>(count)` uses up; sums of these are what a workspace query returns.
  template <class T>
  static constexpr std::size_t aligned_bytes(std::size_t count) {
    return align_up(count * sizeof(T));
  }

 private:
  std::span<std::byte> rest_;
};

}  // namespace attamba
