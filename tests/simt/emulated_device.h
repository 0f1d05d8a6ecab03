// The emulator as the device `cuda` of a process: whole programs run through the GPU's path without a GPU.
#pragma once

namespace attamba::simt {

/// Makes the emulator's memory and stream the runtime of Device::cuda, and the kernels of kernels/cuda its backend; matrix
/// products, which cuBLASLt computes on a GPU, are the CPU's. Once per process; later calls do nothing.
void connect();

}  // namespace attamba::simt
