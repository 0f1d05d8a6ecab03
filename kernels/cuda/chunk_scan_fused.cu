// Forward half of chunk_scan_fused.h.
#include "kernels/cuda/chunk_scan_fused_output.h"
#include "kernels/cuda/chunk_scan_fused_walk.h"
#include "kernels/cuda/launch_kernel.h"

namespace attamba::kernels::cuda::scan {
namespace {

using namespace device;

/// `states`: one per block, or, where walks are shared out, one per slot.
template <class F>
ATTAMBA_KERNEL(F::kThreads, F::kBlocks)
chunk_scan_kernel(Sizes given, Inputs<bf16> in, bf16* out, float* states, bool shared_out) {
  SliceSizes<F> s(given);
  const ForwardShared<F> shared(s, SharedMemory());
  if constexpr (!F::kSliced) {
    load_weights(s, in, shared.inputs);
  }
  for (int range = block_x(); range * kRange < s.rows; range += grid_x()) {
    int begin = first_chunk(s, in, range), limit = (range + 1) * kRange, other = shared_out ? shared_tile(s, in, range) : -1;
    if (begin < 0) {
      begin = limit = other;
      other = -1;
    }
    while (begin >= 0) {
      const Tile tile = cut_tile(s, in, begin, limit, shared.inputs.starts);
      if (tile.rows == 0) {
        break;
      }
      write_tile(s, in, shared, tile, in_slot(states, shared_out ? F::slot_of(begin) : block_x(), s.all.state_size()), out,
                 [&](float* state) {
                   if (!shared_out && !tile.last) {
                     const int leaving = leaving_chunk(s, in, tile);
                     if (leaving < F::kRows) {
                       pass_state(s, shared.inputs, leaving, state, state);
                     }
                   }
                 });
      if (shared_out) {
        begin = limit = other;
        other = -1;
      } else {
        begin = tile.last ? -1 : tile.begin + tile.rows;
      }
    }
  }
}

}  // namespace

bool is_fused(const ScanShape& shape) {
  const bool rows_aligned = shape.projection() * static_cast<std::int64_t>(sizeof(bf16)) % 16 == 0;
  return shape.conv == kFusedTaps && rows_aligned && dispatch_fused(make_sizes(shape, 0), AnyForm{});
}

std::size_t fused_workspace(const ScanShape& shape, std::int64_t rows, bool shared_out) {
  const Sizes s = make_sizes(shape, 0, rows);
  std::size_t bytes = 0;
  dispatch_fused(s, [&]<class F>() { bytes = bytes_of_memory<ForwardMemory<F>>(s, shared_out); });
  return bytes;
}

void fused_forward(const Launch& launch, bf16* out, const Sizes& s, const Inputs<bf16>& in, bool shared_out) {
  dispatch_fused(s, [&]<class F>() {
    ScratchAllocator scratch(launch);
    const ForwardMemory<F> memory(s, shared_out, [&](std::size_t count) { return scratch.take<float>(count); });
    if (shared_out) {
      long_states(launch, s, in, memory.states, memory.kept);
    }
    const Grid grid{.x = F::blocks(s.rows), .threads = F::kThreads, .shared_bytes = ForwardShared<F>::bytes(SliceSizes<F>(s))};
    launch_kernel("chunk_scan", chunk_scan_kernel<F>, launch, grid, s, in, out, memory.states, shared_out);
  });
}

}  // namespace attamba::kernels::cuda::scan
