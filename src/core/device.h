// Where programs run: the CPU, or a device with memory and a queue of work of its own. One runtime per device and process.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

namespace attamba {

enum class Device : std::uint8_t { cpu, cuda };

/// Work that was recorded once and is started as one, over the same addresses (a CUDA graph).
class RecordedWork {
 public:
  virtual ~RecordedWork() = default;
  /// Enqueues it.
  virtual void launch() = 0;
};

/// What a device offers besides kernels. Copies and `clear` are enqueued behind everything enqueued before, and return at once;
/// errors of enqueued work surface at the next `synchronize`, as Error with the device's message.
class DeviceRuntime {
 public:
  virtual ~DeviceRuntime() = default;

  /// For logs: "NVIDIA H200, 139.8 GiB, sm_90, driver 13.0".
  virtual std::string description() const = 0;
  /// The queue that kernels go to (Launch::stream).
  virtual void* stream() = 0;
  /// Zeroed memory of the device, at least 256-byte aligned. Throws Error with the sizes when there is no such memory;
  /// `purpose` says what it was for.
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
