// Which device a command computes on.
#pragma once

#include <memory>
#include <string>

#include "comm/communicator.h"
#include "src/core/device.h"
#include "src/core/dtype.h"

namespace attamba {

/// `name` is auto, cpu or cuda; auto is a GPU where there is a usable one that computes in `dtype`. Sets the device up: ranks
/// of one host take its GPUs in turn. `deterministic`: results must not depend on timings. Throws UsageError with advice when
/// cuda was asked for in vain.
Device open_device(const std::string& name, DType dtype, const Communicator& communicator, bool deterministic = false);

/// The device whose kernels `attamba plan` asks how much scratch they need: the GPU's where this program has them, whether or
/// not there is a GPU.
Device kernels_to_plan_with();

/// What ranks that train on `device` talk through: the communicator itself where it can reach the device's memory (this returns
/// nothing then), otherwise one made around it, which it must outlive. `transport` is auto, nccl or staged (train.transport).
/// All ranks call it. Throws UsageError with advice when NCCL cannot serve these ranks, or only some of them have a GPU.
std::unique_ptr<Communicator> device_communicator(const std::string& transport, Device device, Communicator& communicator);

}  // namespace attamba
