// Which device a command computes on.
#pragma once

#include <string>

#include "comm/communicator.h"
#include "src/core/device.h"
#include "src/core/dtype.h"

namespace attamba {

/// `name` is auto, cpu or cuda; auto is a GPU where there is a usable one that computes in `dtype`. Sets the device up: ranks
/// of one host take its GPUs in turn. `deterministic`: results must not depend on timings. Throws UsageError with advice when
/// cuda was asked for in vain.
Device open_device(const std::string& name, DType dtype, const Communicator& communicator, bool deterministic = false);

}  // namespace attamba
