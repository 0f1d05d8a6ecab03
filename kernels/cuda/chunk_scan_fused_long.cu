// Walks of chunk_scan_fused.h that are shared out: what each tile adds to the state, the sum along each chunk in both
// directions, and the convolution's gradient where it crosses from tile to tile.
#include "kernels/cuda/chunk_scan_fused_convolve.h"
#include "kernels/cuda/chunk_scan_fused_mix.h"
#include "kernels/cuda/chunk_scan_fused_walk.h"
#include "kernels/cuda/launch_kernel.h"

namespace attamba::kernels::cuda::scan {
namespace {

using namespace device;

template <class F>
ATTAMBA_DEVICE void tile_state(SliceSizes<F>& s, const Inputs<bf16>& in, const Shared<F>& shared, int begin, int limit,
                               float* states, float* kept) {
  const Tile tile = cut_tile(s, in, begin, limit, shared.starts);
  const int leaving = tile.last ? F::kRows : leaving_chunk(s, in, tile);
  sync_block();
  if (leaving < F::kRows) {
    add_tile_state(s, in, shared, tile, leaving, states, kept);
  }
  sync_block();
}

template <class F>
ATTAMBA_KERNEL(F::kThreads, F::kBlocks)
chunk_scan_states_kernel(Sizes given, Inputs<bf16> in, float* states, float* kept) {
  SliceSizes<F> s(given);
  SharedMemory memory;
  Shared<F> shared;
  shared.take(s, memory);
  if constexpr (!F::kSliced) {
    load_weights(s, in, shared);
  }
  for (int range = block_x(); range * kRange < s.rows; range += grid_x()) {
    const int begin = first_chunk(s, in, range), other = shared_tile(s, in, range);
    if (begin >= 0) {
      tile_state(s, in, shared, begin, (range + 1) * kRange, states, kept);
    }
    if (other >= 0) {
      tile_state(s, in, shared, other, other, states, kept);
    }
  }
}

/// A block owns kPassThreads * kPassElements elements of the states of one range's walk.
ATTAMBA_KERNEL(kPassThreads, 2)
chunk_scan_pass_kernel(Sizes s, Inputs<bf16> in, float* values, const float* kept, int pieces, bool backwards) {
  const int range = block_x() / pieces, begin = first_chunk(s, in, range), limit = (range + 1) * kRange;
  const int element = (block_x() % pieces * kPassThreads + thread_index()) * kPassElements;
  if (begin < 0 || element >= s.state_size()) {
    return;
  }
  int tiles = 0, most = (s.rows - 1 - begin) / kTileRows;  // after the first one
  while (tiles < most) {
    const int middle = tiles + (most - tiles + 1) / 2;
    if (chunk_start(s, in, begin + middle * kTileRows) < limit) {
      tiles = middle;
    } else {
      most = middle - 1;
    }
  }
  pass_along(s, values, kept, begin / kTileRows + 1, tiles, element, backwards);
}

void pass(const Launch& launch, const Sizes& s, const Inputs<bf16>& in, float* values, float* kept, bool backwards) {
  const int pieces = pass_pieces(s), ranges = (s.rows + kRange - 1) / kRange;
  launch_kernel(backwards ? "chunk_scan_backward: pass" : "chunk_scan: pass", chunk_scan_pass_kernel, launch,
                {.x = static_cast<std::int64_t>(ranges) * pieces, .threads = kPassThreads}, s, in, values, kept, pieces,
                backwards);
}

/// A block owns the rows before one range's shared tile.
ATTAMBA_KERNEL(kPassThreads, 4)
chunk_scan_edges_kernel(Sizes s, Inputs<bf16> in, const float* rests, const float* edges, bf16* dzxbcdt) {
  const int begin = shared_tile(s, in, block_x());
  if (begin < 0) {
    return;
  }
  const int chunk = chunk_start(s, in, begin);
  const std::int64_t edge = static_cast<std::int64_t>(begin / kTileRows) * kEdge * s.channels;
  join_rows(s, in, begin, rests + edge, edges + edge, dzxbcdt, [&](int, int t) { return t >= chunk; });
}

}  // namespace

void long_states(const Launch& launch, const Sizes& s, const Inputs<bf16>& in, float* states, float* kept) {
  dispatch_fused(s, [&]<class F>() {
    const Grid grid{.x = F::blocks(s.rows), .threads = F::kThreads, .shared_bytes = Shared<F>::bytes(SliceSizes<F>(s))};
    launch_kernel("chunk_scan: states", chunk_scan_states_kernel<F>, launch, grid, s, in, states, kept);
  });
  pass(launch, s, in, states, kept, false);
}

void pass_gradients(const Launch& launch, const Sizes& s, const Inputs<bf16>& in, float* gradients, float* kept) {
  pass(launch, s, in, gradients, kept, true);
}

void join_edges(const Launch& launch, const Sizes& s, const Inputs<bf16>& in, const float* rests, const float* edges,
                bf16* dzxbcdt) {
  launch_kernel("chunk_scan_backward: edges", chunk_scan_edges_kernel, launch,
                {.x = (s.rows + kRange - 1) / kRange, .threads = kPassThreads}, s, in, rests, edges, dzxbcdt);
}

}  // namespace attamba::kernels::cuda::scan
