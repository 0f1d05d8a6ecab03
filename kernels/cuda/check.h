// Errors of the CUDA runtime as exceptions.
#pragma once

#include <cuda_runtime_api.h>

#include "src/core/error.h"

namespace attamba::kernels::cuda {

/// Throws Error with the operation, CUDA's name for the error and its text. The error is told once: what runs next, if anything
/// does, does not find it again.
template <class... Parts>
void check(cudaError_t status, const Parts&... operation) {
  if (status != cudaSuccess) [[unlikely]] {
    cudaGetLastError();
    throw Error(concat(operation..., ": ", cudaGetErrorName(status), ", ", cudaGetErrorString(status)));
  }
}

}  // namespace attamba::kernels::cuda
