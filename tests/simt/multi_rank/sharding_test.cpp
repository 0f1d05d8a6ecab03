// Stages of the GPU's path on the emulator, one per rank, by way of host memory: the bits of one rank that keeps everything.
#include <gtest/gtest.h>

#include "comm/staged_communicator.h"
#include "tests/comm/multi_rank/world.h"
#include "tests/simt/emulated_device.h"
#include "tests/train/multi_rank/step_support.h"

namespace attamba {
namespace {

using testing_support::StepOptions;
using testing_support::SteppingRank;

class StagesOnTheEmulator : public testing::TestWithParam<int> {
 protected:
  void SetUp() override { simt::connect(); }
};
INSTANTIATE_TEST_SUITE_P(All, StagesOnTheEmulator, testing::Values(0, 1, 2, 3), testing::PrintToStringParamName());

TEST_P(StagesOnTheEmulator, DeterministicStepsAreThoseOfOneRank) {
  for (const DType dtype : {DType::float32, DType::bfloat16}) {
    StepOptions options{.dtype = dtype, .recompute = dtype == DType::float32, .micro_batches = 3, .device = Device::cuda};
    SingleProcess alone;
    StagedCommunicator staged(world());
    SteppingRank expected(options, alone);
    options.zero = GetParam();
    SteppingRank rank(options, staged);
    EXPECT_EQ(rank.programs().zero(), world().size() == 1 ? 0 : GetParam());
    for (std::int64_t step = 0; step < 3; ++step) {  // what needs no other rank is recorded in the second one
      const StepResult one = expected.step(step), many = rank.step(step);
      EXPECT_EQ(many.loss, one.loss) << name_of(dtype) << ", step " << step;
      EXPECT_EQ(many.gradient_norm, one.gradient_norm) << name_of(dtype) << ", step " << step;
    }
    EXPECT_TRUE(rank.state() == expected.state()) << name_of(dtype);
    expected.write(50, 0);
    rank.write(50, 0);
    EXPECT_EQ(rank.programs().evaluate(), expected.programs().evaluate()) << name_of(dtype);
  }
}

}  // namespace
}  // namespace attamba
