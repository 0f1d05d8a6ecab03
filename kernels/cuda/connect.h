// Makes a GPU known to the process: its runtime (src/core/device.h) and its kernels (kernels/kernels.h).
#pragma once

#include <string>

namespace attamba::kernels::cuda {

/// Why this process cannot compute on a GPU, and what to do about it; empty when it can.
std::string why_unusable();

/// Makes GPU `index` of those that CUDA shows the device `cuda` of this process. Throws UsageError with advice when there is no
/// such GPU, the driver is too old, or the GPU is of an architecture that this program was not built for.
/// With `tune` matrix products are timed when a shape first runs; without, results do not depend on timings.
void connect(int index, bool tune);

/// Makes the kernels known alone, for programs that are planned and never run: this needs no GPU.
void use_kernels();

/// Whether products may be chosen by timing them.
bool tune_products();

/// GPUs that CUDA shows (CUDA_VISIBLE_DEVICES, SLURM and containers choose these); 0 without a driver.
int device_count();

}  // namespace attamba::kernels::cuda
