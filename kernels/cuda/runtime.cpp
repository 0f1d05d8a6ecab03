#include "kernels/cuda/runtime.h"

#include <cuda_runtime_api.h>
#include <nvtx3/nvToolsExt.h>

#include <algorithm>

#include "kernels/cuda/check.h"

namespace attamba::kernels::cuda {

namespace {

/// A CUDA graph.
class Graph final : public RecordedWork {
 public:
  Graph(cudaGraph_t graph, cudaStream_t stream) : stream_(stream) {
    const cudaError_t status = cudaGraphInstantiate(&executable_, graph, cudaGraphInstantiateFlagUseNodePriority);
    cudaGraphDestroy(graph);
    check(status, "CUDA graph");
  }
  ~Graph() override { cudaGraphExecDestroy(executable_); }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  void launch() override { check(cudaGraphLaunch(executable_, stream_), "CUDA graph"); }

 private:
  cudaGraphExec_t executable_ = nullptr;
  cudaStream_t stream_;
};

/// One that measures time.
struct Event {
  Event() { check(cudaEventCreate(&event), "CUDA event"); }
  ~Event() { cudaEventDestroy(event); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  cudaEvent_t event = nullptr;
};

class Runtime final : public DeviceRuntime {
 public:
  explicit Runtime(int index) : index_(index) {
    check(cudaSetDevice(index), "GPU ", index);
    check(cudaGetDeviceProperties(&properties_, index), "GPU ", index);
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "CUDA stream");
    check(cudaEventCreateWithFlags(&copied_, cudaEventDisableTiming), "CUDA event");
  }
  // What CUDA holds is left to the end of the process, which may already have unloaded CUDA when this is destroyed.

  std::string description() const override {
    int driver = 0;
    cudaDriverGetVersion(&driver);
    return concat(properties_.name, ", ", in_binary_units(properties_.totalGlobalMem), ", sm_", properties_.major,
                  properties_.minor, ", driver ", driver / 1000, '.', driver % 1000 / 10);
  }
  void* stream() override { return stream_; }

  std::byte* allocate(std::size_t bytes, const std::string& purpose) override {
    void* memory = nullptr;
    const cudaError_t status = cudaMalloc(&memory, bytes == 0 ? 256 : bytes);
    if (status != cudaSuccess) {
      cudaGetLastError();
      std::size_t free = 0, total = 0;
      cudaMemGetInfo(&free, &total);
      throw OutOfMemory("GPU memory", purpose, bytes, free, total);
    }
    clear(memory, bytes);
    return static_cast<std::byte*>(memory);
  }
  void release(std::byte* memory) noexcept override { cudaFree(memory); }
  std::byte* allocate_host(std::size_t bytes, const std::string& purpose) override {
    void* memory = nullptr;
    check(cudaMallocHost(&memory, bytes == 0 ? 64 : bytes), "page-locked memory of ", bytes, " bytes for ", purpose);
    std::fill_n(static_cast<std::byte*>(memory), bytes, std::byte{0});
    return static_cast<std::byte*>(memory);
  }
  void release_host(std::byte* memory) noexcept override { cudaFreeHost(memory); }

  void copy_to_device(void* device, const void* host, std::size_t bytes) override {
    if (bytes == 0) {
      return;
    }
    check(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream_), "copy of ", bytes, " bytes to the GPU");
    check(cudaEventRecord(copied_, stream_), "CUDA event");
  }
  void copy_to_host(void* host, const void* device, std::size_t bytes) override {
    if (bytes == 0) {
      return;
    }
    check(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream_), "copy of ", bytes, " bytes from the GPU");
  }
  void copy_on_device(void* to, const void* from, std::size_t bytes) override {
    if (bytes == 0) {
      return;
    }
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream_), "copy of ", bytes, " bytes on the GPU");
  }
  void clear(void* device, std::size_t bytes) override {
    if (bytes == 0) {
      return;
    }
    check(cudaMemsetAsync(device, 0, bytes, stream_), "clearing ", bytes, " bytes on the GPU");
  }
  void wait_for_copies() override { check(cudaEventSynchronize(copied_), "copies to the GPU"); }
  void synchronize() override { check(cudaStreamSynchronize(stream_), "work on GPU ", index_); }

  double seconds_of(const std::function<void()>& body) override {
    const Event begin, end;  // of this call: `body` may ask for times too
    check(cudaEventRecord(begin.event, stream_), "CUDA event");
    body();
    check(cudaEventRecord(end.event, stream_), "CUDA event");
    check(cudaEventSynchronize(end.event), "work on GPU ", index_);
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin.event, end.event), "CUDA event");
    return milliseconds * 1e-3;
  }

  std::unique_ptr<RecordedWork> record(const std::function<void()>& body) override {
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "CUDA graph capture");
    cudaGraph_t graph = nullptr;
    try {
      body();
    } catch (...) {
      cudaStreamEndCapture(stream_, &graph);
      cudaGraphDestroy(graph);
      cudaGetLastError();
      throw;
    }
    check(cudaStreamEndCapture(stream_, &graph), "CUDA graph capture");
    return std::make_unique<Graph>(graph, stream_);
  }

  void begin_range(const char* name) override { nvtxRangePushA(name); }
  void end_range() override { nvtxRangePop(); }

 private:
  int index_;
  cudaDeviceProp properties_{};
  cudaStream_t stream_ = nullptr;
  cudaEvent_t copied_ = nullptr;
};

}  // namespace

std::unique_ptr<DeviceRuntime> make_runtime(int index) {
  return std::make_unique<Runtime>(index);
}

}  // namespace attamba::kernels::cuda
