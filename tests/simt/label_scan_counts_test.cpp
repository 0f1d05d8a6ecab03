// Bytes and matrix instructions of the CUDA scan by labels, and many tiles.
#include <gtest/gtest.h>

#include <string>

#include "tests/simt/kernel_support.h"
#include "tests/simt/label_scan_problem.h"

namespace attamba::simt {
namespace {

using namespace chunk_scan;

/// Bytes that threads ask for, weights and tables too, per token. A state lies in memory once per tile; whoever multiplies by
/// it reads it for each of the tile's four strips. Weights are read where they are used: taps for every eight rows, the norm's
/// in each row. A large state has two slices: then the forward kernel writes out, reads and writes it, and the backward pass
/// goes through its inputs for the norm's sums and once more for the gradients.
TEST(LabelScanCounts, KernelsAskForLittleMoreThanInputsOutputsStatesAndWeights) {
  for (const ScanShape& shape : {kPaper, kPaperLarge}) {
    const Problem p = label_problem({"", shape, 1, 1024, 8});
    reset_counters();
    run_labels<bfloat16>(p);
    const double E = static_cast<double>(shape.hidden), N = static_cast<double>(shape.state), passes = N > 32 ? 2 : 1;
    const double z = 2 * E, x = 2 * static_cast<double>(p.channels()), all_x = x + (passes - 1) * 2 * E, taps = all_x;
    const double state = E * N * 4 / 64, products = 2 * 2 * 4 * N;  // products: dB and dC, in and out
    struct Kernel {
      const char* name;
      double least;
    };
    for (const auto& [name, least] :
         {Kernel{"label_scan: states", 2 * (x + x + state)},  // both passes make the states, and sum them up
          Kernel{"label_scan: pass", 2 * 2 * state},
          Kernel{"label_scan", z + x + x + (2 * passes - 1) * 2 * E + 4 * state + (passes == 1 ? 4 * E : 0)},
          Kernel{"label_scan_backward: gradients", passes * (z + 2 * E + 4 * state) + all_x + taps + state + 2 * 4 * E},
          Kernel{"label_scan_backward: pass", 2 * state},
          // Both halves' products of each slice with the state at either end, and what is added up from slice to slice. The
          // convolution's gradient reads taps for every sixteen rows.
          Kernel{"label_scan_backward", (passes + 1) * z + passes * 2 * E + all_x + 2 * x + taps + x / 2 + 2 * 4 * E +
                                            (passes - 1) * 4 * state + (4 * 4 + 2) * state +
                                            (2 * passes + passes - 1) * products},
          Kernel{"label_scan_backward: edges", (3 * 4 + 6 * 8 + 3 * 2) * x / 2 / 64}}) {
      const double asked = bytes_of({name}) / static_cast<double>(p.rows);
      const std::string which = concat(name, ", N = ", shape.state);
      RecordProperty(which, std::to_string(asked));
      EXPECT_LT(asked, 1.12 * least) << which;
    }
  }
}

/// As of FusedKernelsMultiplyWithinTheirBounds (chunk_scan_counts_test.cpp), in tiles of ten blocks of pairs. With a
/// large state Y is made once more for the norm's sums, backwards twice.
TEST(LabelScanCounts, KernelsMultiplyWithinTheirBounds) {
  struct Bound {
    ScanShape shape;
    double forward, backward;
  };
  for (const auto& [shape, most_forward, most_backward] : {Bound{kPaper, 1.06, 1.33}, Bound{kPaperLarge, 1.22, 2.1}}) {
    constexpr double kTiles = 8;
    const Problem p = label_problem({"", shape, 1, 512, 8});
    const LeastProducts least(shape, 10 * kTiles, 4 * (kTiles - 1));
    reset_counters();
    run_labels<bfloat16>(p, 0, false);
    const auto forward = static_cast<double>(total_counters().matrix_products);
    run_labels<bfloat16>(p);
    const double backward = static_cast<double>(total_counters().matrix_products) - 2 * forward;
    const std::string which = concat("N = ", shape.state);
    RecordProperty(which + ", forward", std::to_string(forward / least.forward));
    RecordProperty(which + ", backward", std::to_string(backward / least.backward));
    EXPECT_GE(forward, least.forward) << which;
    EXPECT_GE(backward, least.backward) << which;
    EXPECT_LE(forward, most_forward * least.forward) << which;
    EXPECT_LE(backward, most_backward * least.backward) << which;
  }
}

/// More tiles than 256 blocks have one of.
TEST(LabelScanCounts, ABlockMayHaveTwoTiles) {
  const Problem p = label_problem({"", kPaper, 1, 256 * kernels::kLabelBlock + 70, 7, 3});
  expect_close(p, run_labels<bfloat16>(p), run_cpu(p), {3 * 0x1p-9, 5 * 0x1p-9, 5 * 0x1p-9});
}

}  // namespace
}  // namespace attamba::simt
