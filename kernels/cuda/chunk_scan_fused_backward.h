// Backward half of chunk_scan_fused.h: its kernels over chunks, and their launches. Everything is recomputed from zxbcdt, tile
// by tile from a block's last one; a chunk longer than a tile is first walked forwards for the states at its tiles' entries.
#pragma once

#include "kernels/cuda/chunk_scan_fused_gradient.h"
#include "kernels/cuda/chunk_scan_fused_walk.h"
#include "kernels/cuda/launch_kernel.h"

namespace attamba::kernels::cuda::scan {

/// States at the entries of the walk's tiles; returns the last one's first row.
template <class F>
ATTAMBA_DEVICE int entry_states(SliceSizes<F> s, const Inputs<bf16>& in, const Shared<F>& shared, int begin, int limit,
                                float* states) {
  for (;; begin += F::kRows) {
    const Tile tile = cut_tile(s, in, begin, limit, shared.starts);
    if (tile.rows == 0 || tile.last) {
      sync_block();
      return tile.rows == 0 ? begin - F::kRows : begin;
    }
    const int leaving = leaving_chunk(s, in, tile);
    sync_block();
    if (leaving < F::kRows) {
      for_loaded_slices(s, in, tile, shared, [&] {
        float* entry = in_slot(states, F::slot_of(begin), s.all.state_size()) + s.slice * F::kSliceState;
        pass_state(s, shared, leaving, entry, entry + s.all.state_size());
      });
    }
    sync_block();
  }
}

template <class F>
ATTAMBA_KERNEL(F::kThreads, F::kBlocks)
chunk_scan_backward_kernel(Sizes given, Inputs<bf16> in, const bf16* dout, bf16* dzxbcdt, float* partials, Passing passing) {
  const SliceSizes<F> s(given);
  const BackwardShared<F> shared(s, SharedMemory(), passing.own_norm_sums(s));
  float* partial = partials + static_cast<std::int64_t>(block_x()) * s.all.partial_size();
  bool taps_written = false;
  if constexpr (!F::kSliced) {
    load_weights(s, in, shared.inputs);
  }
  clear_sums(s, shared);
  for (int range = block_x(); range * kRange < s.rows; range += grid_x()) {
    const int begin = first_chunk(s, in, range), other = passing.shared_out() ? shared_tile(s, in, range) : -1;
    int at = other < 0 ? begin : other;
    if (begin >= 0 && !passing.shared_out()) {
      at = entry_states<F>(s, in, shared.inputs, begin, (range + 1) * kRange, passing.states);
    }
    while (at >= 0) {
      const bool shared_one = passing.shared_out() && at != begin;
      Step step{};
      step.tile = cut_tile(s, in, at, shared_one ? at : (range + 1) * kRange, shared.inputs.starts);
      step.leaving = step.tile.last ? F::kRows : leaving_chunk(s, in, step.tile);
      step.add_taps = taps_written;
      sync_block();
      tile_gradient<F>(s, in, shared, passing, step, dout, dzxbcdt, partial);
      taps_written = true;
      at = shared_one ? begin : at > begin ? at - F::kRows : -1;
    }
  }
  write_partials(s, shared, partial, taps_written);
}

/// For walks that are shared out: what each tile adds to the gradient of the state at its entry.
template <class F>
ATTAMBA_KERNEL(F::kThreads, F::kBlocks)
chunk_scan_gradients_kernel(Sizes given, Inputs<bf16> in, const bf16* dout, float* states, float* gradients) {
  const SliceSizes<F> s(given);
  const BackwardShared<F> shared(s, SharedMemory(), nullptr);
  if constexpr (!F::kSliced) {
    load_weights(s, in, shared.inputs);
  }
  for (int range = block_x(); range * kRange < s.rows; range += grid_x()) {
    const int begin = shared_tile(s, in, range);
    if (begin < 0) {
      continue;
    }
    const Tile tile = cut_tile(s, in, begin, begin, shared.inputs.starts);
    sync_block();
    tile_entry_gradient(s, in, shared, tile, dout, in_slot(states, F::slot_of(begin), s.all.state_size()),
                        in_slot(gradients, F::slot_of(begin), s.all.state_size()));
  }
}

template <class F>
void launch_backward(const Launch& launch, bf16* dzxbcdt, const WeightGradients& gradients, const bf16* dout, const Sizes& s,
                     const Inputs<bf16>& in, bool shared_out) {
  ScratchAllocator scratch(launch);
  const BackwardMemory<F> memory(s, shared_out, [&](std::size_t count) { return scratch.take<float>(count); });
  const Passing& passing = memory.passing;
  const Grid grid{.x = F::blocks(s.rows), .threads = F::kThreads, .shared_bytes = BackwardShared<F>::bytes(SliceSizes<F>(s))};
  if (shared_out) {
    long_states(launch, s, in, passing.states, memory.kept);
    launch_kernel("chunk_scan_backward: gradients", chunk_scan_gradients_kernel<F>, launch, grid, s, in, dout, passing.states,
                  passing.gradients);
    pass_gradients(launch, s, in, passing.gradients, memory.kept);
  }
  launch_kernel("chunk_scan_backward", chunk_scan_backward_kernel<F>, launch, grid, s, in, dout, dzxbcdt, memory.partials,
                passing);
  if (shared_out) {
    join_edges(launch, s, in, passing.rests, passing.edges, dzxbcdt);
  }
  add_partials(launch, gradients, s, memory.partials, F::blocks(s.rows));
}

}  // namespace attamba::kernels::cuda::scan
