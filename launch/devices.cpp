#include "launch/devices.h"

#include "src/core/error.h"

#ifdef ATTAMBA_HAS_CUDA
#include "kernels/cuda/connect.h"
#endif

namespace attamba {

#ifdef ATTAMBA_HAS_CUDA

Device open_device(const std::string& name, DType dtype, const Communicator& communicator, bool deterministic) {
  namespace cuda = kernels::cuda;
  if (name == "cpu" || (name == "auto" && (dtype == DType::float64 || !cuda::why_unusable().empty()))) {
    return Device::cpu;
  }
  const int count = cuda::device_count();
  cuda::connect(count > 0 ? communicator.local_rank() % count : 0, !deterministic);
  return Device::cuda;
}

#else

Device open_device(const std::string& name, DType, const Communicator&, bool) {
  require<UsageError>(name != "cuda",
                      "this program was built without CUDA and computes on the CPU only; build it where nvcc is, or use cpu");
  return Device::cpu;
}

#endif

}  // namespace attamba
