#include "tests/gpu/side.h"
#include "tests/simt/emulated_device.h"

void attamba::gpu_check::connect() {
  simt::connect();
}
