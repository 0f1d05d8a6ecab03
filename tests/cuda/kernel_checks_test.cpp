// The checks themselves, on kernels that break them.
#include "tests/cuda/kernel_checks.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <sstream>

namespace attamba {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

/// As for __launch_bounds__(256, 2): a block's 8 warps, two on each quarter of the registers, may use 128 each.
CompiledKernel sound() {
  return {.name = "scale", .architecture = 86, .threads = 256, .registers = 128, .most_registers = 128};
}

TEST(KernelNames, OfBothCompilersAreEqual) {
  const auto mangled = [](const std::string& unnamed_namespace, const std::string& width) {
    return "_ZN7attamba7kernels4cuda" + unnamed_namespace + "7look_upINS_6device4bf16ELi" + width + "EEEvPT_PKS6_PKi";
  };
  EXPECT_EQ(kernel_name(mangled("12_GLOBAL__N_1", "8")), "look_up<bf16, 8>");
  EXPECT_EQ(kernel_name(mangled("45_GLOBAL__N__7be2ab4f_12_embedding_cu_ccf83d4b", "8")), "look_up<bf16, 8>");
  EXPECT_EQ(kernel_name(mangled("12_GLOBAL__N_1", "1")), "look_up<bf16, 1>");
}

TEST(KernelRegisters, AreGivenToWarpsInUnitsOfAQuarterOfTheMultiprocessor) {
  EXPECT_EQ(blocks_by_registers(256, 128), 2);
  EXPECT_EQ(blocks_by_registers(256, 129), 1);
  EXPECT_EQ(blocks_by_registers(192, 168), 2);  // 12 warps, 3 on each quarter
  EXPECT_EQ(blocks_by_registers(192, 169), 1);
  EXPECT_EQ(blocks_by_registers(1024, 65), 0);
}

TEST(KernelResources, WithinTheirBudgetsAreNotMentioned) {
  EXPECT_THAT(resource_complaints({sound()}), IsEmpty());
}

TEST(KernelResources, BeyondABudgetAreNamedWithArchitectureFigureAndBudget) {
  CompiledKernel unbounded = sound(), registers = sound(), local = sound(), shared = sound();
  unbounded.threads = 0;
  registers.registers = 130;
  local.local_bytes = 16;
  shared.shared_bytes = (48 << 10) + 16;
  EXPECT_THAT(resource_complaints({unbounded}), ElementsAre(HasSubstr("scale for sm_86: no launch bounds")));
  EXPECT_THAT(resource_complaints({registers}),
              ElementsAre("scale for sm_86: 130 registers x 256 threads of the launch bounds, which promise 2 blocks per "
                          "multiprocessor: at most 128 registers"));
  EXPECT_THAT(resource_complaints({local}), ElementsAre("scale for sm_86: 16 bytes of local memory per thread, of 0"));
  EXPECT_THAT(resource_complaints({shared}), ElementsAre(HasSubstr("49168 bytes of static shared memory, of 49152")));
}

std::vector<simt::LaunchRecord> records(const std::string& text) {
  std::istringstream in(text);
  std::vector<simt::LaunchRecord> all;
  for (simt::LaunchRecord record; in >> record;) {
    all.push_back(record);
  }
  return all;
}

TEST(KernelCoverage, CountsLaunchesAndShapes) {
  const auto coverage = coverage_of(records("scale 4 1 1 256 0 7\nscale 4 1 1 256 0 1\nscale 4 1 1 128 64 1\n"));
  ASSERT_TRUE(coverage.contains("scale"));
  EXPECT_EQ(coverage.at("scale").launches, 9);
  EXPECT_EQ(coverage.at("scale").shapes, 2);
}

TEST(KernelCoverage, NamesInstancesThatNothingLaunched) {
  CompiledKernel other = sound();
  other.name = "other";
  EXPECT_THAT(never_launched({sound(), other, other}, coverage_of(records("scale 1 1 1 32 0 1\n"))), ElementsAre("other"));
}

TEST(KernelLaunches, StayWithinTheLaunchBounds) {
  const auto complaints = [](const std::string& launched, std::vector<CompiledKernel> kernels) {
    return check_launches(kernels, coverage_of(records(launched))).complaints;
  };
  CompiledKernel large = sound();
  large.architecture = 90;
  EXPECT_THAT(complaints("scale 1 1 1 256 50176 1\n", {sound()}), IsEmpty());  // twice 49 KiB and 1 of the system's: 100 KiB
  EXPECT_THAT(complaints("scale 1 1 1 256 50177 1\n", {sound()}), ElementsAre(HasSubstr("no architecture has shared memory")));
  EXPECT_THAT(complaints("scale 1 1 1 256 50177 1\n", {sound(), large}), IsEmpty());
  EXPECT_THAT(complaints("scale 1 1 1 256 101376 1\n", {sound(), large}), IsEmpty());
  EXPECT_THAT(complaints("scale 1 1 1 256 101377 1\n", {sound(), large}),
              ElementsAre("scale for sm_86: needs 102401 bytes of shared memory, the system's 1 KiB among them, which a "
                          "multiprocessor does not have"));
  EXPECT_THAT(complaints("scale 1 1 1 288 0 1\n", {sound()}),
              ElementsAre("scale for sm_86: launched with 288 threads, of the launch bounds' 256"));
}

}  // namespace
}  // namespace attamba
