// The one way in which host code starts a kernel: on the GPU under nvcc, on the emulator (tests/simt) under a host compiler.
#pragma once

#include <cstddef>
#include <type_traits>

#include "kernels/device/intrinsics.h"
#include "src/core/error.h"
#include "src/core/launch.h"

#ifndef __CUDACC__
#include <functional>
#endif

namespace attamba::kernels::cuda {

/// Blocks of a launch, and threads and dynamic shared memory of each.
struct Grid {
  std::int64_t x = 1, y = 1, z = 1;
  int threads = 128;
  std::size_t shared_bytes = 0;
};

#ifdef __CUDACC__

/// Starts kernel(args...) on the launch's stream. Throws Error with the kernel's name when CUDA refuses.
template <class... Parameters>
void launch_kernel(const char* name, void (*kernel)(Parameters...), const Launch& launch, const Grid& grid,
                   std::type_identity_t<Parameters>... args) {
  constexpr std::size_t kWithoutAsking = 48 << 10;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) {
    return;
  }
  cudaError_t status = cudaSuccess;
  if (grid.shared_bytes > kWithoutAsking) {
    status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(grid.shared_bytes));
  }
  if (status == cudaSuccess) {
    const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
    kernel<<<blocks, static_cast<unsigned>(grid.threads), grid.shared_bytes, static_cast<cudaStream_t>(launch.stream)>>>(
        args...);
    status = cudaGetLastError();
  }
  require(status == cudaSuccess, name, ": could not be started on ", grid.x, " x ", grid.y, " x ", grid.z, " blocks of ",
          grid.threads, " threads and ", grid.shared_bytes, " bytes of shared memory: ", cudaGetErrorString(status));
}

#else

/// Runs `body` once per thread of the grid (tests/simt). `kernel` is the function that it calls, `stream` as in Launch.
void emulate(const char* name, const void* kernel, void* stream, const Grid& grid, std::function<void()> body);

template <class... Parameters>
void launch_kernel(const char* name, void (*kernel)(Parameters...), const Launch& launch, const Grid& grid,
                   std::type_identity_t<Parameters>... args) {
  if (grid.x != 0 && grid.y != 0 && grid.z != 0) {
    asm("" : "+r"(kernel));  // could be any: kernels are compiled once, as functions that can be told by their address
    emulate(name, reinterpret_cast<const void*>(kernel), launch.stream, grid, [=] { kernel(args...); });
  }
}

#endif

}  // namespace attamba::kernels::cuda
