#include "kernels/cuda/connect.h"
#include "tests/gpu/side.h"

void attamba::gpu_check::connect() {
  kernels::cuda::connect(0, true);
}
