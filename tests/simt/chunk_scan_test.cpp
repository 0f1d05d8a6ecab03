// The CUDA scan on the emulator against the CPU's in float64, on the same problem.
#include <gtest/gtest.h>

#include "tests/simt/chunk_scan_problem.h"

namespace attamba::simt {
namespace {

using namespace chunk_scan;

/// Kernels for every shape: float32 arithmetic, compute type only where activations are read and written.
class ChunkScanPlain : public testing::TestWithParam<Case> {};

TEST_P(ChunkScanPlain, AgreesWithTheCpu) {
  const Problem p = problem_of(GetParam());
  const Result expected = run<double>(scans_of_cpu(), Device::cpu, p, true);
  {
    SCOPED_TRACE("float32");  // as on the CPU: up to 10^4 terms of mixed sign, up to a hundred roundings of 2^-24
    expect_close(p, run_cuda<float>(p), expected, {1e-5, 1e-5, 1e-5});
  }
  {
    SCOPED_TRACE("bfloat16");  // one rounding to 8 bits, half a unit of the last of them; sums as in float32
    expect_close(p, run_cuda<bfloat16>(p), expected, {0x1p-8, 0x1p-8, 1e-5});
  }
}

INSTANTIATE_TEST_SUITE_P(
    , ChunkScanPlain,
    testing::Values(Case{"chunks1", kSmall, 2, 37, {1}}, Case{"chunks2", kSmall, 3, 50, {2}, 1, true},
                    Case{"chunks7", kGroups, 1, 99, {7}}, Case{"chunks8", kGroups, 2, 64, {8}, 0, true},
                    Case{"chunks63", kSmall, 1, 150, {63}}, Case{"chunks64", kSmall, 1, 192, {64}},
                    Case{"chunks65", kGroups, 1, 140, {65}, 0, true}, Case{"random", kSmall, 2, 130, {}, 0, true},
                    Case{"mixed", kSmall, 2, 200, {1, 70, 3, 2, 129, 33, 31}}, Case{"whole", kGroups, 2, 130, {130}, 0, true},
                    Case{"lastPieceOfOneRow", kSmall, 1, 129, {129}}, Case{"odd", kOdd, 2, 77, {9, 1, 4}, 0, true},
                    Case{"oddLong", kOdd, 2, 150, {150}, 0, true}, Case{"noConvolution", kNoConv, 2, 90, {80}, 5, true},
                    Case{"oneTap", kOneTap, 1, 100, {11, 80}}, Case{"manyTaps", kManyTaps, 2, 80, {3, 67}},
                    Case{"oneToken", kSmall, 1, 1, {1}, 0, true}),
    kNameOfCase);

/// Fused kernels: products of bfloat16 on tensor cores. On the way to `out` lie three roundings to 8 bits of half a unit of the
/// last one each (X, B, C; M; out itself), five to the gradients (X, B, C; dY; M or the scores' gradient; the gradient after
/// the convolution; the result), and sums of many terms average them. Wider SSMs have one more on the way to `out`, before the
/// norm, and their scores' gradients are rounded slice by slice, which averages too.
class ChunkScanFused : public testing::TestWithParam<Case> {};

TEST_P(ChunkScanFused, AgreesWithTheCpu) {
  Problem p = problem_of(GetParam());
  const Result expected = run<double>(scans_of_cpu(), Device::cpu, p, true);
  if (p.n > kLongestWalk) {  // walks are shared out, unless chunks are said to be short
    reset_counters();
    expect_close(p, run_cuda<bfloat16>(p), expected, {3 * 0x1p-9, 5 * 0x1p-9, 5 * 0x1p-9});
    EXPECT_EQ(counters("chunk_scan: pass").launches, 2);  // the backward pass makes states again
    EXPECT_EQ(counters("chunk_scan_backward: pass").launches, 1);
  }
  p.shape.longest_chunk = 1;
  reset_counters();
  const Result got = run_cuda<bfloat16>(p);
  expect_close(p, got, expected, {3 * 0x1p-9, 5 * 0x1p-9, 5 * 0x1p-9});
  EXPECT_EQ(counters("chunk_scan: pass").launches, 0);
  EXPECT_EQ(counters("chunk_scan").launches, 1);
  EXPECT_EQ(counters("chunk_scan_backward").launches, 1);
  EXPECT_EQ(total_counters().matrix_load_conflicts, 0);
}

INSTANTIATE_TEST_SUITE_P(
    , ChunkScanFused,
    testing::Values(
        Case{"chunks1", kPaper, 1, 37, {1}}, Case{"chunks2", kPaper, 2, 50, {2}, 1, true},
        Case{"chunks7", kPaperGroups, 1, 99, {7}}, Case{"chunks8", kPaper, 2, 96, {8}, 0, true},
        Case{"chunks47", kPaper, 1, 150, {47}}, Case{"chunks48", kPaper, 1, 192, {48}},
        Case{"chunks49", kPaperGroups, 1, 140, {49}, 0, true}, Case{"random", kPaper, 2, 130, {}, 0, true},
        Case{"mixed", kPaper, 2, 200, {1, 70, 3, 2, 129, 33, 31}}, Case{"whole", kPaper, 2, 130, {130}, 0, true, -5},
        Case{"lastPieceOfOneRow", kPaper, 1, 97, {97}}, Case{"large", kPaperLarge, 1, 70, {8}, 3, true},
        Case{"largeLong", kPaperLarge, 1, 150, {20, 130}}, Case{"oneToken", kPaper, 1, 1, {1}, 0, true},
        Case{"wideChunks1", kWide, 1, 37, {1}}, Case{"wideChunks8", kWideHeads, 2, 96, {8}, 3, true},
        Case{"wideChunks64", kWideHeads, 1, 192, {64}}, Case{"wideMixed", kWide, 2, 100, {1, 70, 3, 2, 33}, 0, true},
        Case{"wideWhole", kWideHeads, 1, 150, {150}, 0, true, -5}, Case{"wideLastPieceOfOneRow", kWide, 1, 97, {97}, 0, true},
        Case{"wideStateMixed", kWideState, 1, 200, {1, 70, 3, 2, 33, 60}, 9, true},
        Case{"wideSharedOut", kWide, 1, 200, {200}, 0, true, -5}, Case{"longSharedOut", kPaper, 1, 560, {560}, 0, true, -5},
        Case{"wideHeadsMixed", kWideHeads, 1, 260, {1, 145, 30, 1, 97, 48}, 0, true, -5},
        Case{"wideLargeMixed", kWideLarge, 1, 130, {1, 70, 3, 2, 33}, 9, true},
        Case{"wideLargeWhole", kWideLarge, 1, 200, {200}, 0, true, -5},
        Case{"ownGroupsMixed", kOwnGroups, 1, 130, {1, 70, 3, 2, 33}, 9, true},
        Case{"ownGroupsWhole", kOwnGroups, 2, 200, {200}, 0, true, -5},
        Case{"wholeSharedOut", kPaperGroups, 2, 250, {250}, 0, true, -5},
        Case{"largeSharedOut", kPaperLarge, 1, 200, {3, 197}, 0, false, -5},
        Case{"mixedSharedOut", kPaper, 2, 400, {1, 2, 145, 30, 1, 97, 48, 33, 40}, 17, true, -5},
        Case{"fastSharedOut", kPaper, 2, 400, {1, 2, 145, 30, 1, 97, 48, 33, 40}, 17, true}),
    kNameOfCase);

template <class T>
void expect_same_for_seeds(const Problem& p) {
  expect_equal(run_cuda<T>(p, 1), run_cuda<T>(p, 2));
}

TEST(ChunkScanCuda, ResultsDoNotDependOnTheOrderOfWarpsAndBlocks) {
  expect_same_for_seeds<float>(problem_of({"", kGroups, 1, 130, {100, 5}, 0, true}));
  expect_same_for_seeds<bfloat16>(problem_of({"", kPaper, 1, 180, {110, 5, 9}, 0, true}));
  expect_same_for_seeds<bfloat16>(problem_of({"", kPaper, 1, 240, {230, 10}, 0, true}));
  expect_same_for_seeds<bfloat16>(problem_of({"", kWideHeads, 1, 180, {110, 5, 9}, 0, true}));
  expect_same_for_seeds<bfloat16>(problem_of({"", kOwnGroups, 1, 240, {230, 10}, 0, true}));
}

/// Four heads of 64 with N 128: rows of 1,544 bytes, of which 16 cannot be copied at a time.
TEST(ChunkScanCuda, RowsThatAreNotAlignedTakeThePlainKernels) {
  const ScanShape shape{.hidden = 256, .state = 128, .heads = 4, .groups = 1, .conv = 4};
  const Problem p = problem_of({"", shape, 1, 70, {8}, 0, true});
  const Result expected = run<double>(scans_of_cpu(), Device::cpu, p, true);
  reset_counters();
  expect_close(p, run_cuda<bfloat16>(p), expected, {0x1p-8, 0x1p-8, 1e-5});
  EXPECT_EQ(counters("chunk_scan").launches, 0);
  EXPECT_EQ(counters("chunk_scan mix").launches, 2);
}

TEST(ChunkScanCuda, RangesAreSharedOutToAtMost512Blocks) {
  Problem p = problem_of({"", kPaper, 1, 512 * 32 + 70, {8}, 3, false});
  p.shape.longest_chunk = 8;
  const Result whole = run_cuda<bfloat16>(p, 0, false);
  Problem last = p;  // the last rows alone
  const std::int64_t first = 512 * 32 + 3, rows = p.rows - first;
  last.n = last.rows = rows;
  last.table = make_starts(1, rows, {8}, 0);
  last.zxbcdt.assign(p.zxbcdt.begin() + first * p.shape.projection(), p.zxbcdt.end());
  last.dout.assign(p.dout.begin() + first * p.shape.hidden, p.dout.end());
  const Result tail = run_cuda<bfloat16>(last, 0, false);
  EXPECT_EQ(tail.out, Vector(whole.out.begin() + first * p.shape.hidden, whole.out.end()));
}

TEST(ChunkScanCuda, WindowsOfSequencesDoNotMix) {
  const ScanShape tiny{.hidden = 4, .state = 2, .heads = 4, .groups = 4, .conv = 2};
  const Problem p = problem_of({"", tiny, 2, 2100, {5, 90}, 3, false});  // a window holds one sequence
  const Result expected = run<double>(scans_of_cpu(), Device::cpu, p, true);
  expect_close(p, run_cuda<float>(p), expected, {1e-5, 1e-5, 1e-5});
}

TEST(ChunkScanCuda, DoublePrecisionIsAUsageError) {
  const TensorType type{DType::float64, {4, kSmall.projection()}};
  EXPECT_THROW(kernels::cuda::chunk_scan_workspace(type, kSmall, 4), UsageError);
  EXPECT_THROW(kernels::cuda::chunk_scan_backward_workspace(type, kSmall, 4), UsageError);
}

}  // namespace
}  // namespace attamba::simt
