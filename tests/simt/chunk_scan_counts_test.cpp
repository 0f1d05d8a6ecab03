// Bytes and matrix instructions of the CUDA scan, against the least that it needs.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "tests/simt/chunk_scan_problem.h"
#include "tests/simt/kernel_support.h"

namespace attamba::simt {
namespace {

using namespace chunk_scan;

/// Of 256 columns, or 128 with a large state.
double slices_of(const ScanShape& shape) {
  const bool whole = shape.hidden == 256 && shape.heads == 8;
  return whole ? 1 : static_cast<double>(shape.hidden) / (shape.state > 64 ? 128 : 256);
}

/// Bytes that threads ask for, weights and tables too, against those of activations read and written once: zxbcdt and out, or
/// zxbcdt, dout and dzxbcdt.
TEST(ChunkScanCounts, FusedKernelsMoveLittleMoreThanTheirInputsAndOutputs) {
  for (const std::int64_t first : {0, 3}) {
    Problem p = problem_of({"", kPaper, 1, 1024, {8}, first, false});
    p.shape.longest_chunk = 8;
    reset_counters();
    run_cuda<bfloat16>(p);
    const auto per_token = [&](const char* kernel) { return bytes_of({kernel}) / static_cast<double>(p.rows); };
    const double inputs = 2.0 * static_cast<double>(p.shape.projection()), outputs = 2.0 * static_cast<double>(p.shape.hidden);
    RecordProperty("forward_bytes_per_token", std::to_string(per_token("chunk_scan")));
    RecordProperty("backward_bytes_per_token", std::to_string(per_token("chunk_scan_backward")));
    EXPECT_LT(per_token("chunk_scan"), 1.5 * (inputs + outputs)) << first;
    EXPECT_LT(per_token("chunk_scan_backward"), 1.5 * (2 * inputs + outputs)) << first;
  }
}

/// Slice by slice, out is written, then read and written once more by the norm, and the backward pass reads its inputs twice,
/// for the norm's sums and for the gradients; each tile of 48 rows loads the slices' weights. What slices of one group add to
/// dB and dC passes from one to the next in float32. On top come the three rows before every eight that the convolution reads
/// again.
TEST(ChunkScanCounts, WideScansAskForTheirInputsOnceOrTwice) {
  for (const ScanShape& shape : {kWide, kWideHeads, kWideState, kWideLarge, kOwnGroups}) {
    Problem p = problem_of({"", shape, 1, 480, {8}, 0, false});
    p.shape.longest_chunk = 8;
    reset_counters();
    run_cuda<bfloat16>(p);
    const auto per_token = [&](const char* kernel) { return bytes_of({kernel}) / static_cast<double>(p.rows); };
    const double E = static_cast<double>(shape.hidden), inputs = 2.0 * static_cast<double>(shape.projection());
    const double weights = 4.0 * (4 + 1) * E / 48;
    const double passed = shape.groups > 1 ? 0 : (slices_of(shape) - 1) * 2 * 2 * 4 * static_cast<double>(shape.state);
    const std::string width = concat("E = ", shape.hidden, ", N = ", shape.state, ", G = ", shape.groups);
    RecordProperty("forward_bytes_per_token, " + width, std::to_string(per_token("chunk_scan")));
    RecordProperty("backward_bytes_per_token, " + width, std::to_string(per_token("chunk_scan_backward")));
    EXPECT_LT(per_token("chunk_scan"), 1.2 * (inputs + 3 * 2 * E + weights)) << width;
    EXPECT_LT(per_token("chunk_scan_backward"), 1.5 * (3 * inputs + 2 * 2 * E + 2 * weights + passed)) << width;
  }
}

/// A tile of 48 rows has six blocks of pairs where one chunk fills it. Halves of the heads make their group's scores each for
/// themselves, backwards twice, and their halves of dB and dC: with one group, and more so with large states, that is what
/// comes on top. Wide scans do so for each slice, and make Y twice on their way back. Where walks are shared out, Y is made
/// once more for the states' gradients.
TEST(ChunkScanCounts, FusedKernelsMultiplyWithinTheirBounds) {
  struct Work {
    const char* name;
    std::int64_t n, chunk;
    double pairs, crossings;
  };
  struct Bound {
    ScanShape shape;
    double forward, walk_forward;                     ///< of chunks of 8, of walks
    double backward, walk_backward, shared_backward;  ///< of chunks of 8, of a walk, of a shared one
  };
  for (const Bound& bound : {Bound{kPaper, 1.12, 1.05, 1.19, 1.08, 1.3}, Bound{kPaperGroups, 1, 1, 1.07, 1.04, 1.25},
                             Bound{kPaperLarge, 1.34, 1.07, 1.56, 1.12, 1.31}, Bound{kWide, 1.2, 1.09, 1.68, 1.38, 1.83},
                             Bound{kWideHeads, 1.22, 1.09, 1.7, 1.39, 1.84}, Bound{kWideState, 1.34, 1.1, 1.93, 1.38, 1.8},
                             Bound{kWideLarge, 2.4, 1.25, 3.74, 1.61, 2.08}, Bound{kOwnGroups, 1, 1, 1.56, 1.3, 1.69}}) {
    const ScanShape& shape = bound.shape;
    for (const auto& [name, n, chunk, pairs, crossings] :
         {Work{"chunks of 8", 96, 8, 6, 0}, Work{"one walk", 192, 192, 4 * 6, 3 * 3},
          Work{"shared out", 240, 240, 5 * 6, 4 * 3}}) {
      const Problem p = problem_of({"", shape, 1, n, {chunk}});
      const LeastProducts least(shape, pairs, crossings);
      reset_counters();
      run_cuda<bfloat16>(p, 0, false);
      const auto forward = static_cast<double>(total_counters().matrix_products);
      run_cuda<bfloat16>(p);
      const double backward = static_cast<double>(total_counters().matrix_products) - 2 * forward;
      const std::string which = concat(name, ", E = ", shape.hidden, ", N = ", shape.state, ", G = ", shape.groups);
      RecordProperty(which + ", forward", std::to_string(forward / least.forward));
      RecordProperty(which + ", backward", std::to_string(backward / least.backward));
      EXPECT_GE(forward, least.forward) << which;
      EXPECT_GE(backward, least.backward) << which;
      const double most_forward = crossings == 0 ? bound.forward : bound.walk_forward;
      const double most_backward = crossings == 0     ? bound.backward
                                   : n > kLongestWalk ? bound.shared_backward
                                                      : bound.walk_backward;
      EXPECT_LE(forward, most_forward * least.forward) << which;
      EXPECT_LE(backward, most_backward * least.backward) << which;
    }
  }
}

/// Of walks that are shared out, per token. A state lies in memory once per tile of 48 rows; whoever multiplies by it reads it
/// for each of the tile's three strips, from the cache: the forward kernel once, the backward kernel four times, and twice more
/// for the gradient of the tile's decay.
TEST(ChunkScanCounts, SharedWalksMoveLittleMoreThanTheirInputsOutputsAndStates) {
  for (const ScanShape& shape : {kPaper, kPaperGroups, kPaperLarge, kWideHeads, kWideLarge, kOwnGroups}) {
    const Problem p = problem_of({"", shape, 1, 480, {480}});
    reset_counters();
    run_cuda<bfloat16>(p);
    const auto per_token = [&](const char* kernel) { return bytes_of({kernel}) / static_cast<double>(p.rows); };
    const double inputs = 2.0 * static_cast<double>(shape.projection()), outputs = 2.0 * static_cast<double>(shape.hidden);
    const double channels = static_cast<double>(p.channels()), state = static_cast<double>(shape.hidden * shape.state) * 4 / 48;
    const double products =
        slices_of(shape) * 4.0 * 2 * 2 * 2 * static_cast<double>(shape.state);  // dB's and dC's, of both halves, in and out
    // Both passes make the states, and sum them up, which also asks each range for a walk. Slices go twice through their inputs
    // and states on the way back, and load their weights.
    const double passes = slices_of(shape) > 1 ? 2 : 1;
    const std::string which = concat("E = ", shape.hidden, ", N = ", shape.state, ", G = ", shape.groups);
    EXPECT_LT(per_token("chunk_scan: states"), 1.35 * 2 * (2 * channels + state)) << which;
    EXPECT_LT(per_token("chunk_scan: pass"), 1.25 * 2 * (2 * state)) << which;
    EXPECT_LT(per_token("chunk_scan"), 1.15 * (inputs + (2 * passes - 1) * outputs + 3 * state)) << which;
    EXPECT_LT(per_token("chunk_scan_backward: gradients"), 1.1 * (passes * (inputs + outputs + 3 * state) + state)) << which;
    EXPECT_LT(per_token("chunk_scan_backward: pass"), 1.25 * 2 * state) << which;
    EXPECT_LT(per_token("chunk_scan_backward"),
              1.1 * ((1 + passes) * inputs + passes * outputs + (11 + 3 * passes) * state + products))
        << which;
    // Three rows of each tile: what is there, what one to three rows of the next tile add by as many taps, and the result.
    EXPECT_LT(per_token("chunk_scan_backward: edges"), 1.15 * (3 * 4 + 6 * 8 + 3 * 2) * channels / 48) << which;
    // A partial sum per range of 32 rows; the sum is added to the gradient.
    const double weights = 4 * channels + static_cast<double>(shape.hidden + 3 * shape.heads);
    EXPECT_LE(per_token("chunk_scan sum_partials"), 4 * weights * (480 / 32 + 2) / 480) << which;
  }
}

/// The kernels for every shape read from the cache whatever they multiply. Per token, in float32, from the definition: `taps`
/// of the convolution and `pairs` of rows that lie in the token's chunk, on average.
TEST(ChunkScanCounts, PlainKernelsReadWhatTheyMultiply) {
  const double E = 256, N = 32, Hs = 8, channels = E + 2 * N;
  struct Kernel {
    const char* name;
    double least, most;  ///< most: times the least
  };
  const auto check = [&](std::int64_t chunk, const std::vector<Kernel>& kernels) {
    const Problem p = problem_of({"", kPaper, 1, 256, {chunk}});
    reset_counters();
    run_cuda<float>(p);
    for (const auto& [name, least, most] : kernels) {
      const std::string kernel = std::string("chunk_scan ") + name;
      const double launches = static_cast<double>(counters(kernel).launches);
      EXPECT_LE(bytes_of({kernel.c_str()}) / launches, most * least * static_cast<double>(p.rows)) << kernel;
    }
  };
  const double taps = (1 + 2 + 3 + 5 * 4) / 8.0, pairs = (1 + 8) / 2.0;
  check(8, {{"activate", channels * (8 * taps + 4), 1.2},
            {"mix", Hs * pairs * 8 * N + pairs * 4 * E + 4 * E, 1.03},
            {"gate_and_norm", E * (2 * 8 + 4 + 4), 1.01},
            {"gate_and_norm_backward", E * (2 * 12 + 2 * 4 + 2 * 4), 1.01},
            {"scan_gradient", pairs * (12 * E + 16 * N) + 4 * channels, 1.15},
            {"activate_backward", channels * (8 * taps + 8), 1.2},
            {"convolve_backward", channels * (16 * taps + 4), 1.6},
            {"sum_partials", 4 * (4 * channels + E + 3 * Hs) * (4 + 2) / 256, 1.01}});
  // One chunk of four tiles: three pass a state on, in which every element is a sum over the tile's rows.
  check(256, {{"tile_state", (8 + 4 / 64.0) * N * E * 3 / 4, 1.02},
              {"sum_states", 16 * N * E * 3 / 256, 1.01},
              {"entry_gradient", (8 + 4 / 64.0) * N * E * 3 / 4, 1.02},
              {"sum_state_gradients", 16 * N * E * 3 / 256, 1.01}});
}

}  // namespace
}  // namespace attamba::simt
