// Runs the CUDA kernels of kernels/cuda under a host compiler: one fiber per thread of a block, one block after another. This
// header is for tests: settings, and what kernels did. The kernels themselves see kernels/device/intrinsics.h only, which this
// library defines under a host compiler.
//
// Every launch is checked; a mistake is an Error out of launch_kernel that names the kernel, block, thread and source line:
// - memory: outside of an allocation or of the block's shared memory, misaligned, never written, released;
// - races: two threads of a block touch a location, one of them writes, and no sync_block or, within a warp, no warp function
//   lies between; two blocks do, and no fence_device and atomic_add lie between;
// - warp and block functions that not all lanes and threads reach, or not from the same line; threads that wait for ever;
// - asynchronous copies that are read before their wait, or never waited for.
// After an error the emulator is as usable as before; memory holds what the kernel had stored until then.
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

namespace attamba::simt {

struct Options {
  std::uint64_t seed = 0;  ///< orders blocks, and warps within them; from ATTAMBA_SIMT_SEED unless a test sets it
  bool checks = true;      ///< false: only bounds, alignment and rendezvous
  /// Whether shuffles, ballots and matrix functions order memory within a warp, as sync_warp does. CUDA promises it of
  /// sync_warp alone.
  bool shuffles_order_memory = false;
};
/// What the next launch goes by. Assign to change it.
Options& options();

/// What all launches of a kernel did since the last reset. Bytes are those that threads asked for: no cache, no coalescing.
struct Counters {
  std::int64_t launches = 0, blocks = 0;
  std::int64_t global_loaded = 0, global_stored = 0;  ///< bytes; asynchronous copies and atomics not counted
  std::int64_t shared_loaded = 0, shared_stored = 0;  ///< load_matrix counted, asynchronous copies not
  std::int64_t copied_async = 0;                      ///< bytes from global to shared memory; zeros filled in not counted
  std::int64_t atomics = 0;                           ///< calls
  std::int64_t matrix_products = 0;                   ///< mma_16x8x16 of a whole warp: 4096 floating-point operations
  std::int64_t matrix_loads = 0;                      ///< load_matrix_x4 of a whole warp
  std::int64_t matrix_load_conflicts = 0;             ///< times a matrix load had to wait for a bank: 0 for a good layout
  std::int64_t block_barriers = 0;                    ///< sync_block, once per block
  std::int64_t warp_functions = 0;                    ///< once per warp
};
Counters counters(const std::string& kernel);
/// Over all kernels.
Counters total_counters();
void reset_counters();

/// A kernel's function and the grid that it was launched on.
struct LaunchShape {
  const void* kernel = nullptr;
  std::int64_t x = 1, y = 1, z = 1;
  int threads = 0;
  std::size_t shared_bytes = 0;

  auto operator<=>(const LaunchShape&) const = default;
};
/// How often launch_kernel has launched what since the process began.
const std::map<LaunchShape, std::int64_t>& launches();

}  // namespace attamba::simt
