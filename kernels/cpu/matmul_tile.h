// Private to the CPU kernels: one-threaded products of small fixed shapes, from which matmul and the loss are put together.
// Tiles depend on the problem's shape alone and never cut the summed dimension, so results do not depend on the number of
// threads, and a product may also run inside a parallel region.
#pragma once

#include <algorithm>
#include <compare>
#include <cstddef>
#include <cstdint>

#include "src/core/dtype.h"
#include "src/core/parallel.h"

namespace attamba::kernels::cpu {

/// c [m, n] = op(a) op(b), or c += ... when `accumulate`. Row strides are in elements; a transposed operand is stored [k, m]
/// (a) or [n, k] (b). `input` is the type of a and b; `output` that of c: the same or its accumulator.
struct TileProduct {
  std::int64_t m = 0, n = 0, k = 0;
  std::int64_t a_stride = 0, b_stride = 0, c_stride = 0;
  bool transpose_a = false, transpose_b = false;
  DType input = DType::float32, output = DType::float32;
  bool accumulate = false;

  friend auto operator<=>(const TileProduct&, const TileProduct&) = default;
};

/// Whether our own gemm runs this tile. Not one row, as in decoding, where packing b would cost more than multiplying.
bool runs_in_gemm(const TileProduct& tile);
/// Scratch of one `run_tile` call.
std::size_t tile_scratch_bytes(const TileProduct& tile);
/// Runs on the calling thread alone and never throws: a product that oneDNN refuses is converted and given to OpenBLAS.
void run_tile(const TileProduct& tile, void* c, const void* a, const void* b, std::byte* scratch);
/// Whether products of bfloat16 operands run as such here, where that is faster; otherwise they are converted to float32.
bool has_native_bfloat16();
/// For tests: go the native way whatever the processor is. Tiles that oneDNN then refuses are still converted one by one.
/// Returns what it was.
bool assume_native_bfloat16(bool native);

/// Converts rows x columns elements; strides in elements.
void convert_block(float* out, std::int64_t out_stride, const bfloat16* in, std::int64_t in_stride, std::int64_t rows,
                   std::int64_t columns);
void convert_block(bfloat16* out, std::int64_t out_stride, const float* in, std::int64_t in_stride, std::int64_t rows,
                   std::int64_t columns);

/// The number of workers that scratch of `available` bytes feeds with `per_worker` bytes each, at least one.
inline int worker_count(std::size_t available, std::size_t per_worker) {
  if (per_worker == 0) {
    return thread_count();
  }
  return static_cast<int>(std::clamp<std::size_t>(available / per_worker, 1, static_cast<std::size_t>(thread_count())));
}

/// Runs body(i, worker) for i in [0, count) with worker in [0, workers): each worker is one thread with scratch of its own.
template <class Body>
void parallel_workers(std::int64_t count, int workers, const Body& body) {
  if (count == 1 || workers == 1 || omp_in_parallel()) {
    for (std::int64_t i = 0; i < count; ++i) {
      body(i, 0);
    }
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(workers)
  for (std::int64_t i = 0; i < count; ++i) {
    body(i, omp_get_thread_num());
  }
}

}  // namespace attamba::kernels::cpu
