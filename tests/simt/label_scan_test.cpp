// The CUDA scan with labels on the emulator against the CPU's in float64, on the same problem.
#include <gtest/gtest.h>

#include "tests/simt/kernel_support.h"
#include "tests/simt/label_scan_problem.h"

namespace attamba::simt {
namespace {

using namespace chunk_scan;

class LabelScanPlain : public testing::TestWithParam<LabelCase> {};

TEST_P(LabelScanPlain, AgreesWithTheCpu) {
  const Problem p = label_problem(GetParam());
  const Result expected = run_cpu(p);
  {
    SCOPED_TRACE("float32");  // up to 10^4 terms of mixed sign, up to a hundred roundings of 2^-24
    expect_close(p, run_labels<float>(p), expected, {1e-5, 1e-5, 1e-5});
  }
  {
    SCOPED_TRACE("bfloat16");  // one rounding to 8 bits, half a unit of the last of them; sums as in float32
    reset_counters();
    expect_close(p, run_labels<bfloat16>(p), expected, {0x1p-8, 0x1p-8, 1e-5});
    EXPECT_EQ(counters("label_scan one_chunk").launches, 2);
  }
}

constexpr ScanShape kTwoGroups = kPaperGroups;  // for labels, the fused kernels know one group

INSTANTIATE_TEST_SUITE_P(, LabelScanPlain,
                         testing::Values(LabelCase{"chunks1", kSmall, 1, 130, 1}, LabelCase{"chunks4", kGroups, 2, 128, 4},
                                         LabelCase{"chunks7", kSmall, 2, 99, 7, 3}, LabelCase{"chunks8", kTwoGroups, 1, 150, 8},
                                         LabelCase{"chunks8Shifted", kSmall, 3, 70, 8, 5},
                                         LabelCase{"chunks64", kSmall, 1, 200, 64}, LabelCase{"any", kSmall, 1, 200, 0},
                                         LabelCase{"tapsReachTheChunkBefore", kSmall, 1, 80, 2},
                                         LabelCase{"odd", kOdd, 3, 77, 3, 1}, LabelCase{"noConvolution", kNoConv, 1, 90, 5},
                                         LabelCase{"oneToken", kSmall, 1, 1, 4}),
                         kNameOfCase);

/// As ChunkScanFused (chunk_scan_test.cpp) in tiles of 64 rows, each of which may hand on a state.
class LabelScanFused : public testing::TestWithParam<LabelCase> {};

TEST_P(LabelScanFused, AgreesWithTheCpu) {
  const Problem p = label_problem(GetParam());
  const Result expected = run_cpu(p);
  reset_counters();
  expect_close(p, run_labels<bfloat16>(p), expected, {3 * 0x1p-9, 5 * 0x1p-9, 5 * 0x1p-9});
  EXPECT_EQ(counters("label_scan").launches, 1);
  EXPECT_EQ(counters("label_scan_backward").launches, 1);
  EXPECT_EQ(total_counters().matrix_load_conflicts, 0);
}

INSTANTIATE_TEST_SUITE_P(
    , LabelScanFused,
    testing::Values(LabelCase{"chunks1", kPaper, 1, 130, 1, 0, true, -5}, LabelCase{"chunks2", kPaper, 2, 97, 2, 1},
                    LabelCase{"chunks7", kPaper, 1, 300, 7, 0, false, -5}, LabelCase{"chunks8", kPaper, 2, 256, 8, 0, true, -5},
                    LabelCase{"chunks8Fast", kPaper, 1, 200, 8, 5}, LabelCase{"chunks8Long", kPaper, 2, 320, 8, 0, true, -5},
                    LabelCase{"chunks37", kPaper, 1, 150, 37, 0, true, -5},
                    LabelCase{"chunks64", kPaper, 1, 200, 64, 0, true, -5},
                    LabelCase{"chunks100", kPaper, 1, 330, 100, 0, true, -5}, LabelCase{"any", kPaper, 2, 150, 0, 0, true, -5},
                    LabelCase{"anyFast", kPaper, 1, 131, 0}, LabelCase{"lastTileOfTwoRows", kPaper, 1, 66, 1, 0, true, -5},
                    LabelCase{"oneToken", kPaper, 1, 1, 4}, LabelCase{"large", kPaperLarge, 1, 200, 8, 0, true, -5},
                    LabelCase{"largeAny", kPaperLarge, 1, 150, 0, 0, false, -5}),
    kNameOfCase);

TEST(LabelScanCuda, ResultsDoNotDependOnTheOrderOfWarpsAndBlocks) {
  const auto expect_same = [](const Problem& p, const auto& run_of) { expect_equal(run_of(p, 1), run_of(p, 2)); };
  const auto bf16 = [](const Problem& p, std::uint64_t seed) { return run_labels<bfloat16>(p, seed); };
  expect_same(label_problem({"", kGroups, 2, 90, 3}), bf16);
  expect_same(label_problem({"", kPaper, 1, 150, 0, 0, true, -5}), bf16);
  expect_same(label_problem({"", kPaperLarge, 1, 100, 0, 0, true, -5}), bf16);
}

/// The plain kernels are those of the scan by chunks; one more writes the start of the chunk that all rows are.
TEST(LabelScanCuda, StartsAreWrittenOncePerPlainPass) {
  reset_counters();
  run_labels<float>(label_problem({"", kSmall, 1, 130, 4}));
  EXPECT_EQ(bytes_of({"label_scan one_chunk"}), 2 * 130 * 4);
}

TEST(LabelScanCuda, DoublePrecisionIsAUsageError) {
  const TensorType type{DType::float64, {4, kSmall.projection()}};
  EXPECT_THROW(cuda::label_scan_workspace(type, kSmall), UsageError);
  EXPECT_THROW(cuda::label_scan_backward_workspace(type, kSmall), UsageError);
}

}  // namespace
}  // namespace attamba::simt
