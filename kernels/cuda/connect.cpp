#include "kernels/cuda/connect.h"

#include <cuda_runtime_api.h>

#include "kernels/cuda/architectures.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/runtime.h"
#include "kernels/kernels.h"

namespace attamba::kernels::cuda {

namespace {

constexpr Backend kCuda{
#define ATTAMBA_CUDA_MEMBER(name) .name = &cuda::name,
    ATTAMBA_FOR_EACH_KERNEL(ATTAMBA_CUDA_MEMBER)
#undef ATTAMBA_CUDA_MEMBER
};

bool tuning = true;

/// Machine code built for sm_80 also runs on sm_86 and sm_89, but never on another major version; sm_90a runs on 9.0 alone.
bool has_code_for(int major, int minor) {
  for (const int built : kArchitectures) {
    if (built / 10 == major && built % 10 <= minor) {
      return true;
    }
  }
  return false;
}

std::string built_for() {
  std::string text;
  for (const int built : kArchitectures) {
    text += concat(text.empty() ? "" : ", ", "sm_", built);
  }
  return text;
}

}  // namespace

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

std::string why_unusable() {
  int count = 0, driver = 0, runtime = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  if (driver == 0) {
    return "there is no NVIDIA driver on this machine (or none in this container)";
  }
  if (status == cudaErrorInsufficientDriver) {
    return concat("the NVIDIA driver supports CUDA ", driver / 1000, '.', driver % 1000 / 10, ", this program needs ",
                  runtime / 1000, '.', runtime % 1000 / 10, ": update the driver");
  }
  if (status != cudaSuccess || count == 0) {
    return concat("CUDA shows no GPU (", cudaGetErrorString(status), "); look at nvidia-smi and CUDA_VISIBLE_DEVICES");
  }
  return "";
}

bool tune_products() {
  return tuning;
}

void connect(int index, bool tune) {
  const std::string reason = why_unusable();
  require<UsageError>(reason.empty(), "no GPU to compute on: ", reason);
  require<UsageError>(index >= 0 && index < device_count(), "GPU ", index, " does not exist: CUDA shows ", device_count());
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, index), "GPU ", index);
  require<UsageError>(has_code_for(properties.major, properties.minor), "GPU ", index, " (", properties.name, ") is sm_",
                      properties.major, properties.minor, ", this program was built for ", built_for(),
                      "; build it with -DCMAKE_CUDA_ARCHITECTURES=", properties.major, properties.minor);
  tuning = tune;
  set_runtime(Device::cuda, make_runtime(index));
  use_kernels();
}

void use_kernels() {
  set_backend(Device::cuda, kCuda);
}

}  // namespace attamba::kernels::cuda
