#include "src/core/device.h"

#include <sys/mman.h>

#include <array>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <iomanip>
#include <sstream>

#include "src/core/error.h"
#include "src/core/parallel.h"

namespace attamba {

namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kHostAlignment = 256;
constexpr std::int64_t kCopyGrain = std::int64_t{4} << 20;

/// The CPU: memory is host memory, and what is enqueued is done at once.
class HostRuntime final : public DeviceRuntime {
 public:
  std::string description() const override { return "CPU"; }
  void* stream() override { return nullptr; }
  /// Backed by huge pages where the system grants them.
  std::byte* allocate(std::size_t bytes, const std::string& purpose) override {
    const std::size_t alignment = bytes >= kHugePage ? kHugePage : kHostAlignment;
    const std::size_t rounded = (bytes + alignment - 1) / alignment * alignment;
    auto* memory = static_cast<std::byte*>(std::aligned_alloc(alignment, rounded == 0 ? alignment : rounded));
    if (memory == nullptr) {
      throw OutOfMemory("memory", purpose, bytes, 0, 0);
    }
    if (alignment == kHugePage) {
      madvise(memory, rounded, MADV_HUGEPAGE);  // a hint: failing changes nothing but speed
    }
    std::memset(memory, 0, bytes);
    return memory;
  }
  void release(std::byte* memory) noexcept override { std::free(memory); }
  std::byte* allocate_host(std::size_t bytes, const std::string& purpose) override { return allocate(bytes, purpose); }
  void release_host(std::byte* memory) noexcept override { release(memory); }
  void copy_to_device(void* device, const void* host, std::size_t bytes) override { std::memmove(device, host, bytes); }
  void copy_to_host(void* host, const void* device, std::size_t bytes) override { std::memmove(host, device, bytes); }
  void copy_on_device(void* to, const void* from, std::size_t bytes) override {
    parallel_ranges(static_cast<std::int64_t>(bytes), kCopyGrain, [&](std::int64_t begin, std::int64_t end) {
      std::memcpy(static_cast<std::byte*>(to) + begin, static_cast<const std::byte*>(from) + begin,
                  static_cast<std::size_t>(end - begin));
    });
  }
  void clear(void* device, std::size_t bytes) override { std::memset(device, 0, bytes); }
  void wait_for_copies() override {}
  void synchronize() override {}
  double seconds_of(const std::function<void()>& body) override {
    const auto begin = std::chrono::steady_clock::now();
    body();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }
  std::unique_ptr<RecordedWork> record(const std::function<void()>&) override { return nullptr; }
};

std::unique_ptr<DeviceRuntime>& slot(Device device) {
  static std::array<std::unique_ptr<DeviceRuntime>, 2> runtimes{std::make_unique<HostRuntime>(), nullptr};
  return runtimes[static_cast<std::size_t>(device)];
}

}  // namespace

OutOfMemory::OutOfMemory(const std::string& where, const std::string& purpose, std::size_t asked, std::size_t free,
                         std::size_t total)
    : Error(concat(
          "out of ", where, ": ", in_binary_units(asked), " for ", purpose,
          total == 0 ? std::string() : concat(", but ", in_binary_units(free), " of ", in_binary_units(total), " are free"))),
      asked_(asked),
      free_(free),
      total_(total) {}

std::string in_binary_units(std::size_t bytes) {
  const bool large = bytes >= (std::size_t{1} << 30);
  std::ostringstream out;
  out << std::fixed << std::setprecision(1) << static_cast<double>(bytes) / (large ? 0x1p30 : 0x1p20)
      << (large ? " GiB" : " MiB");
  return out.str();
}

DeviceRuntime& runtime(Device device) {
  const std::unique_ptr<DeviceRuntime>& found = slot(device);
  require<UsageError>(found != nullptr, "no such device: this process computes on the CPU only");
  return *found;
}

void set_runtime(Device device, std::unique_ptr<DeviceRuntime> runtime) {
  slot(device) = std::move(runtime);
}

}  // namespace attamba
