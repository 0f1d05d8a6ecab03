// Where programs run: the CPU, or a device with memory and a queue of work of its own. One runtime per device and process.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "src/core/error.h"

namespace attamba {

/// Of memory that programs and kernels are given, in bytes: what cuBLASLt asks of its workspace, and assumes of matrices.
constexpr std::size_t kAlignment = 256;
constexpr std::size_t align_up(std::size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

enum class Device : std::uint8_t { cpu, cuda };

/// Work that was recorded once and is started as one, over the same addresses (a CUDA graph).
class RecordedWork {
 public:
  virtual ~RecordedWork() = default;
  /// Enqueues it.
  virtual void launch() = 0;
};

/// A device has no room for what it was asked for. Whoever knows what else is kept there, and how it could be less, adds that.
class OutOfMemory : public Error {
 public:
  /// `where`: "GPU memory"; `free` and `total` are 0 where nobody knows them.
  OutOfMemory(const std::string& where, const std::string& purpose, std::size_t asked, std::size_t free, std::size_t total);
  OutOfMemory(const OutOfMemory& error, const std::string& advice)
      : Error(concat(error.what(), advice)), free_(error.free_), total_(error.total_) {}

  std::size_t free() const { return free_; }
  std::size_t total() const { return total_; }

 private:
  std::size_t free_, total_;
};

/// "1.5 GiB", "340.2 MiB"
std::string in_binary_units(std::size_t bytes);

/// What a device offers besides kernels. Copies and `clear` are enqueued behind everything enqueued before, and return at once;
/// errors of enqueued work surface at the next `synchronize`, as Error with the device's message.
class DeviceRuntime {
 public:
  virtual ~DeviceRuntime() = default;

  /// For logs: "NVIDIA H200, 139.8 GiB, sm_90, driver 13.0".
  virtual std::string description() const = 0;
  /// The queue that kernels go to (Launch::stream).
  virtual void* stream() = 0;
  /// Zeroed memory of the device, at least 256-byte aligned. Throws OutOfMemory when there is no such memory; `purpose` says
  /// what it was for.
  virtual std::byte* allocate(std::size_t bytes, const std::string& purpose) = 0;
  virtual void release(std::byte* memory) noexcept = 0;
  /// Zeroed host memory that the device copies from and to while the host goes on.
  virtual std::byte* allocate_host(std::size_t bytes, const std::string& purpose) = 0;
  virtual void release_host(std::byte* memory) noexcept = 0;
  virtual void copy_to_device(void* device, const void* host, std::size_t bytes) = 0;
  virtual void copy_to_host(void* host, const void* device, std::size_t bytes) = 0;
  virtual void copy_on_device(void* to, const void* from, std::size_t bytes) = 0;
  virtual void clear(void* device, std::size_t bytes) = 0;
  /// Returns when all copies to the device have read their host memory, which may then be written again.
  virtual void wait_for_copies() = 0;
  /// Returns when everything enqueued is done.
  virtual void synchronize() = 0;
  /// Seconds that the work takes which `body` enqueues, by the device's own clock; waits for it.
  virtual double seconds_of(const std::function<void()>& body) = 0;
  /// Records the work that `body` enqueues without running it. Empty where that gains nothing: then call `body` each time.
  virtual std::unique_ptr<RecordedWork> record(const std::function<void()>& body) = 0;
  /// What a profiler shows this thread's work under, until the matching end. Ranges nest, and cost nothing without a profiler.
  virtual void begin_range(const char* /*name*/) {}
  virtual void end_range() {}
};

/// A range that ends with its scope.
class [[nodiscard]] NamedRange {
 public:
  NamedRange(DeviceRuntime& device, const char* name) : device_(device) { device_.begin_range(name); }
  ~NamedRange() { device_.end_range(); }
  NamedRange(const NamedRange&) = delete;
  NamedRange& operator=(const NamedRange&) = delete;

 private:
  DeviceRuntime& device_;
};

/// The runtime of a device; throws UsageError when this process has none.
DeviceRuntime& runtime(Device device);
/// Makes a device known. Called once, before anything uses it.
void set_runtime(Device device, std::unique_ptr<DeviceRuntime> runtime);

/// Zeroed memory of a device, freed with the object.
class Memory {
 public:
  Memory() = default;
  Memory(Device device, std::size_t bytes, const std::string& purpose)
      : memory_(runtime(device).allocate(bytes, purpose), Free(device)), size_(bytes) {}
  std::byte* data() const { return memory_.get(); }
  std::size_t size() const { return size_; }

 private:
  struct Free {
    Free() : device(Device::cpu) {}
    explicit Free(Device of) : device(of) {}
    void operator()(std::byte* memory) const { runtime(device).release(memory); }
    Device device;
  };
  std::unique_ptr<std::byte, Free> memory_;
  std::size_t size_ = 0;
};

/// Zeroed host memory for copies from and to a device, freed with the object.
class PinnedMemory {
 public:
  PinnedMemory() = default;
  PinnedMemory(Device device, std::size_t bytes, const std::string& purpose)
      : memory_(runtime(device).allocate_host(bytes, purpose), Free(device)) {}
  std::byte* data() const { return memory_.get(); }

 private:
  struct Free {
    Free() : device(Device::cpu) {}
    explicit Free(Device of) : device(of) {}
    void operator()(std::byte* memory) const { runtime(device).release_host(memory); }
    Device device;
  };
  std::unique_ptr<std::byte, Free> memory_;
};

}  // namespace attamba
