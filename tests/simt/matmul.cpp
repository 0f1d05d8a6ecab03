// Stands in for the GPU's matrix library: products by the CPU's kernel over emulated device memory, in the stream's order.
#include <memory>
#include <new>

#include "kernels/kernels.h"
#include "tests/simt/device_memory.h"
#include "tests/simt/emulated_stream.h"

namespace attamba::kernels::cuda {

namespace {

constexpr std::size_t kWorkspace = 4096;  ///< of no use but to tell who forgets to ask for it

Tensor on_host(Tensor tensor) {
  tensor.device = Device::cpu;
  return tensor;
}

void multiply(const Tensor& out, const Tensor& a, const Tensor& b, bool transpose_a, bool transpose_b, const Tensor& addend) {
  struct Release {
    void operator()(std::byte* p) const { ::operator delete[](p, std::align_val_t{64}); }
  };
  const std::size_t bytes = cpu::matmul_workspace(out.type, a.type, b.type, transpose_a, transpose_b);
  const std::unique_ptr<std::byte, Release> scratch(new (std::align_val_t{64}) std::byte[bytes]);
  cpu::matmul({.scratch = {scratch.get(), bytes}}, on_host(out), on_host(a), on_host(b), transpose_a, transpose_b,
              on_host(addend));
  simt::mark_written(out.data, out.bytes());
}

}  // namespace

void matmul(const Launch& launch, const Tensor& out, const Tensor& a, const Tensor& b, bool transpose_a, bool transpose_b,
            const Tensor& addend) {
  require<UsageError>(a.dtype() != DType::float64, "matmul: the GPU multiplies float32 and bfloat16, not float64");
  require(launch.scratch.size() >= kWorkspace, "matmul: ", launch.scratch.size(), " bytes of scratch, need ", kWorkspace);
  require(reinterpret_cast<std::uintptr_t>(launch.scratch.data()) % kAlignment == 0, "matmul: scratch is not aligned by ",
          kAlignment, " bytes");
  simt::run_on(static_cast<simt::EmulatedStream*>(launch.stream), [=, scratch = launch.scratch.data()] {
    simt::poison(scratch, kWorkspace);
    multiply(out, a, b, transpose_a, transpose_b, addend);
  });
}

std::size_t matmul_workspace(const TensorType&, const TensorType&, const TensorType&, bool, bool) {
  return kWorkspace;
}

double measure_matmul_peak(DType dtype, double seconds) {
  return cpu::measure_matmul_peak(dtype, seconds);
}

const char* matmul_library(DType) {
  return "the CPU's, emulating a GPU's";
}

}  // namespace attamba::kernels::cuda
