#include "launch/devices.h"

#include <vector>

#include "comm/staged_communicator.h"
#include "src/core/error.h"
#include "src/core/names.h"

#ifdef ATTAMBA_HAS_CUDA
#include "kernels/cuda/connect.h"
#endif
#ifdef ATTAMBA_HAS_NCCL
#include "comm/nccl/nccl_communicator.h"
#endif

namespace attamba {

namespace {

#ifdef ATTAMBA_HAS_CUDA
/// Ranks of one host take its GPUs in turn.
int gpu_of(const Communicator& communicator) {
  const int count = kernels::cuda::device_count();
  return count > 0 ? communicator.local_rank() % count : 0;
}
#endif

void require_device(const std::string& name) {
  require_known("train.device", name, {"auto", "cpu", "cuda"});
}

/// With auto, each rank has looked at its own machine.
void require_one_kind_of_device(Device device, Communicator& communicator) {
  std::int32_t own = device == Device::cuda ? 1 : 0;
  std::vector<std::int32_t> all(static_cast<std::size_t>(communicator.size()));
  communicator.all_gather({all.data(), {DType::int32, {communicator.size()}}}, {&own, {DType::int32, {1}}});
  for (std::size_t rank = 1; rank < all.size(); ++rank) {
    require<UsageError>(all[rank] == all[0], "rank ", all[rank] > all[0] ? 0 : rank, " has no GPU that it can use, rank ",
                        all[rank] > all[0] ? rank : 0,
                        " has one: set train.device to cuda, which says what is missing there, or to cpu");
  }
}

#ifdef ATTAMBA_HAS_NCCL

std::unique_ptr<Communicator> nccl_communicator(Communicator& communicator) {
  return make_nccl_communicator(communicator, gpu_of(communicator), runtime(Device::cuda).stream());
}

#else

std::unique_ptr<Communicator> nccl_communicator(Communicator&) {
  throw UsageError(
      "this program was built without NCCL, so ranks cannot share GPU memory: build it where nccl.h is, or use "
      "train.transport = \"staged\", which goes through host memory");
}

#endif

}  // namespace

std::unique_ptr<Communicator> device_communicator(const std::string& transport, Device device, Communicator& communicator) {
  if (communicator.size() == 1) {
    return nullptr;
  }
  require_one_kind_of_device(device, communicator);
  require<UsageError>(transport != "nccl" || device == Device::cuda,
                      "train.transport is nccl, but this run computes on the CPU; use auto");
  if (device == Device::cpu) {
    return nullptr;
  }
  if (transport == "staged") {
    return std::make_unique<StagedCommunicator>(communicator);
  }
  return nccl_communicator(communicator);
}

#ifdef ATTAMBA_HAS_CUDA

Device open_device(const std::string& name, DType dtype, const Communicator& communicator, bool deterministic) {
  namespace cuda = kernels::cuda;
  require_device(name);
  if (name == "cpu" || (name == "auto" && (dtype == DType::float64 || !cuda::why_unusable().empty()))) {
    return Device::cpu;
  }
  cuda::connect(gpu_of(communicator), !deterministic);
  return Device::cuda;
}

Device kernels_to_plan_with() {
  kernels::cuda::use_kernels();
  return Device::cuda;
}

#else

Device open_device(const std::string& name, DType, const Communicator&, bool) {
  require_device(name);
  require<UsageError>(name != "cuda",
                      "this program was built without CUDA and computes on the CPU only; build it where nvcc is, or use cpu");
  return Device::cpu;
}

Device kernels_to_plan_with() {
  return Device::cpu;
}

#endif

}  // namespace attamba
