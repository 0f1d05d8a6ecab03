// The backward pass of scans by labels: label_scan_fused.cu says who works on which tiles, chunk_scan_fused_gradient.h what
// is made of one.
#include "kernels/cuda/chunk_scan_fused_gradient.h"
#include "kernels/cuda/chunk_scan_fused_walk.h"
#include "kernels/cuda/launch_kernel.h"

namespace attamba::kernels::cuda::scan {
namespace {

using namespace device;

/// What each tile but the first one adds to the gradient of the state at its entry.
template <class F>
ATTAMBA_KERNEL(F::kThreads, F::kBlocks)
label_scan_gradients_kernel(Sizes given, Inputs<bf16> in, const bf16* dout, float* states, float* gradients) {
  const SliceSizes<F> s(given);
  const BackwardShared<F> shared(s, SharedMemory(), nullptr);
  for (int index = block_x() + 1; index * F::kRows < s.rows; index += grid_x()) {
    const Tile tile = label_tile<F>(s, in, index, shared.inputs.starts);
    sync_block();
    tile_entry_gradient(s, in, shared, tile, dout, in_slot(states, index, s.all.state_size()),
                        in_slot(gradients, index, s.all.state_size()));
  }
}

template <class F>
ATTAMBA_KERNEL(F::kThreads, F::kBlocks)
label_scan_backward_kernel(Sizes given, Inputs<bf16> in, const bf16* dout, bf16* dzxbcdt, float* partials, Passing passing) {
  const SliceSizes<F> s(given);
  const BackwardShared<F> shared(s, SharedMemory(), passing.own_norm_sums(s));
  float* partial = partials + static_cast<std::int64_t>(block_x()) * s.all.partial_size();
  clear_sums(s, shared);
  for (int index = block_x(); index * F::kRows < s.rows; index += grid_x()) {
    Step step{};
    step.tile = label_tile<F>(s, in, index, shared.inputs.starts);
    sync_block();
    step.leaving = leaving_label<F>(step.tile, shared.inputs.starts);
    step.add_taps = index != block_x();
    tile_gradient<F>(s, in, shared, passing, step, dout, dzxbcdt, partial);
  }
  write_partials(s, shared, partial, true);
}

/// A block owns the rows before one tile of labels, which is not the first one.
ATTAMBA_KERNEL(kPassThreads, 4)
label_scan_edges_kernel(Sizes s, Inputs<bf16> in, const float* rests, const float* edges, bf16* dzxbcdt) {
  const int tile = block_x() + 1;
  const std::int64_t edge = static_cast<std::int64_t>(tile) * kEdge * s.channels;
  join_rows(s, in, tile * int{kLabelBlock}, rests + edge, edges + edge, dzxbcdt,
            [&](int from, int t) { return same_label(in, from, t); });
}

}  // namespace

std::size_t fused_label_backward_workspace(const ScanShape& shape, std::int64_t rows) {
  const Sizes s = make_sizes(shape, 0, rows);
  std::size_t bytes = 0;
  dispatch_by_label(s, [&]<class F>() { bytes = bytes_of_memory<BackwardMemory<F>>(s, true); });
  return bytes;
}

void fused_label_backward(const Launch& launch, bf16* dzxbcdt, const WeightGradients& gradients, const bf16* dout,
                          const Sizes& s, const Inputs<bf16>& in) {
  dispatch_by_label(s, [&]<class F>() {
    ScratchAllocator scratch(launch);
    const BackwardMemory<F> memory(s, true, [&](std::size_t count) { return scratch.take<float>(count); });
    const Passing& passing = memory.passing;
    const Grid grid{.x = F::blocks(s.rows), .threads = F::kThreads, .shared_bytes = BackwardShared<F>::bytes(SliceSizes<F>(s))};
    label_states(launch, s, in, passing.states, memory.kept);
    launch_kernel("label_scan_backward: gradients", label_scan_gradients_kernel<F>, launch, grid, s, in, dout, passing.states,
                  passing.gradients);
    pass_label_gradients(launch, s, passing.gradients, memory.kept);
    launch_kernel("label_scan_backward", label_scan_backward_kernel<F>, launch, grid, s, in, dout, dzxbcdt, memory.partials,
                  passing);
    launch_kernel("label_scan_backward: edges", label_scan_edges_kernel, launch,
                  {.x = (s.rows - 1) / kLabelBlock, .threads = kPassThreads}, s, in, passing.rests, passing.edges, dzxbcdt);
    add_partials(launch, gradients, s, memory.partials, F::blocks(s.rows));
  });
}

}  // namespace attamba::kernels::cuda::scan
