#include "tests/simt/emulated_device.h"

#include <algorithm>
#include <chrono>
#include <exception>
#include <memory>

#include "kernels/kernels.h"
#include "src/core/device.h"
#include "tests/simt/device_memory.h"
#include "tests/simt/emulated_stream.h"

namespace attamba::simt {

namespace {

class Recorded final : public RecordedWork {
 public:
  Recorded(EmulatedGraph graph, EmulatedStream& stream)
      : graph_(std::make_shared<const EmulatedGraph>(std::move(graph))), stream_(stream) {}
  void launch() override {
    stream_.run([graph = graph_] { graph->launch(); });
  }

 private:
  std::shared_ptr<const EmulatedGraph> graph_;
  EmulatedStream& stream_;
};

class Runtime final : public DeviceRuntime {
 public:
  std::string description() const override { return "emulated GPU"; }
  void* stream() override { return &stream_; }
  std::byte* allocate(std::size_t bytes, const std::string&) override {
    void* memory = simt::allocate(bytes);
    simt::fill(memory, 0, bytes);
    return static_cast<std::byte*>(memory);
  }
  void release(std::byte* memory) noexcept override {
    drain();
    simt::release(memory);
  }
  std::byte* allocate_host(std::size_t bytes, const std::string&) override {
    auto memory = std::make_unique<std::byte[]>(std::max<std::size_t>(bytes, 1));
    return memory.release();
  }
  void release_host(std::byte* memory) noexcept override {
    drain();
    delete[] memory;
  }
  void copy_to_device(void* device, const void* host, std::size_t bytes) override {
    stream_.copy_to_device(device, host, bytes);
  }
  void copy_to_host(void* host, const void* device, std::size_t bytes) override {
    stream_.copy_from_device(host, device, bytes);
  }
  void copy_on_device(void* to, const void* from, std::size_t bytes) override { stream_.copy_on_device(to, from, bytes); }
  void clear(void* device, std::size_t bytes) override { stream_.fill(device, 0, bytes); }
  void wait_for_copies() override { stream_.finish_copies(); }
  void synchronize() override { stream_.finish(); }
  double seconds_of(const std::function<void()>& body) override {
    stream_.finish();
    const auto begin = std::chrono::steady_clock::now();
    body();
    stream_.finish();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }
  std::unique_ptr<RecordedWork> record(const std::function<void()>& body) override {
    stream_.begin_capture();
    try {
      body();
    } catch (...) {
      stream_.end_capture();
      throw;
    }
    return std::make_unique<Recorded>(stream_.end_capture(), stream_);
  }

 private:
  /// Before memory goes; of errors somebody who waited has heard, or nobody wants to.
  void drain() noexcept {
    try {
      stream_.finish();
    } catch (const std::exception&) {
    }
  }

  EmulatedStream stream_;
};

constexpr kernels::Backend kEmulated{
#define ATTAMBA_CUDA_MEMBER(name) .name = &kernels::cuda::name,
    ATTAMBA_FOR_EACH_KERNEL(ATTAMBA_CUDA_MEMBER)
#undef ATTAMBA_CUDA_MEMBER
};

}  // namespace

void connect() {
  [[maybe_unused]] static const bool done = [] {
    set_runtime(Device::cuda, std::make_unique<Runtime>());
    kernels::set_backend(Device::cuda, kEmulated);
    return true;
  }();
}

}  // namespace attamba::simt
