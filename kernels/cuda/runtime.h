// The CUDA implementation of src/core/device.h.
#pragma once

#include <memory>

#include "src/core/device.h"

namespace attamba::kernels::cuda {

/// Makes GPU `index` the calling thread's current device. Throws Error with CUDA's message.
std::unique_ptr<DeviceRuntime> make_runtime(int index);

}  // namespace attamba::kernels::cuda
