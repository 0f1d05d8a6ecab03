#include "tests/simt/emulator.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

#include "kernels/cuda/launch_kernel.h"
#include "kernels/device/block.h"
#include "tests/simt/device_memory.h"

namespace attamba::simt {
namespace {

using namespace attamba::device;

ATTAMBA_KERNEL(256, 1) block_sums_kernel(float* out, const float* x, int n) {
  float* partials = SharedMemory().take<float>(block_threads() / kWarp);
  const int i = block_x() * block_threads() + thread_index();
  const float sum = block_sum(i < n ? load(x + i) : 0, partials);
  if (thread_index() == 0) {
    store(out + block_x(), sum);
  }
}

TEST(Emulator, SumsBlocks) {
  constexpr int kBlocks = 1024, kThreads = 256, kCount = kBlocks * kThreads;
  DeviceMemory x(kCount * sizeof(float)), out(kBlocks * sizeof(float));
  std::vector<float> values(kCount);
  for (int i = 0; i < kCount; ++i) {
    values[static_cast<std::size_t>(i)] = static_cast<float>(i % 7);
  }
  copy_to_device(x.data(), values.data(), x.size());
  kernels::cuda::launch_kernel("block_sums", block_sums_kernel, {}, {.x = kBlocks, .threads = kThreads, .shared_bytes = 32},
                               reinterpret_cast<float*>(out.data()), reinterpret_cast<const float*>(x.data()), kCount);
  std::vector<float> sums(kBlocks);
  copy_from_device(sums.data(), out.data(), out.size());
  for (int b = 0; b < kBlocks; ++b) {
    float expected = 0;
    for (int i = b * kThreads; i < (b + 1) * kThreads; ++i) {
      expected += static_cast<float>(i % 7);
    }
    ASSERT_EQ(sums[static_cast<std::size_t>(b)], expected) << "block " << b;
  }
}

}  // namespace
}  // namespace attamba::simt
