// The forward pass of scans by labels (kernels/cpu/label_scan.cpp) by chunk_scan_fused.h: tiles of kLabelBlock rows, each for
// itself, after two launches for the states at their entries.
#include "kernels/cuda/chunk_scan_fused_output.h"
#include "kernels/cuda/chunk_scan_fused_walk.h"
#include "kernels/cuda/launch_kernel.h"

namespace attamba::kernels::cuda::scan {
namespace {

using namespace device;

template <class F>
ATTAMBA_KERNEL(F::kThreads, F::kBlocks)
label_scan_states_kernel(Sizes given, Inputs<bf16> in, float* states, float* kept) {
  SliceSizes<F> s(given);
  SharedMemory memory;
  Shared<F> shared;
  shared.take(s, memory);
  for (int index = block_x(); (index + 1) * F::kRows < s.rows; index += grid_x()) {
    const Tile tile = label_tile<F>(s, in, index, shared.starts);
    sync_block();
    add_tile_state(s, in, shared, tile, leaving_label<F>(tile, shared.starts), states, kept);
    sync_block();
  }
}

/// A block owns kPassThreads * kPassElements elements of the states of all tiles.
ATTAMBA_KERNEL(kPassThreads, 2)
label_scan_pass_kernel(Sizes s, float* values, const float* kept, bool backwards) {
  const int element = (block_x() * kPassThreads + thread_index()) * kPassElements;
  if (element < s.state_size()) {
    pass_along(s, values, kept, 1, (s.rows - 1) / int{kLabelBlock}, element, backwards);
  }
}

template <class F>
ATTAMBA_KERNEL(F::kThreads, F::kBlocks)
label_scan_kernel(Sizes given, Inputs<bf16> in, bf16* out, float* states) {
  SliceSizes<F> s(given);
  const ForwardShared<F> shared(s, SharedMemory());
  for (int index = block_x(); index * F::kRows < s.rows; index += grid_x()) {
    const Tile tile = label_tile<F>(s, in, index, shared.inputs.starts);
    write_tile(s, in, shared, tile, in_slot(states, index, s.all.state_size()), out, [](float*) {});
  }
}

}  // namespace

bool is_fused_by_label(const ScanShape& shape) {
  return shape.conv == kFusedTaps && dispatch_by_label(make_sizes(shape, 0), AnyForm{});
}

void label_states(const Launch& launch, const Sizes& s, const Inputs<bf16>& in, float* states, float* kept) {
  dispatch_by_label(s, [&]<class F>() {
    const Grid grid{.x = F::blocks(s.rows), .threads = F::kThreads, .shared_bytes = Shared<F>::bytes(SliceSizes<F>(s))};
    launch_kernel("label_scan: states", label_scan_states_kernel<F>, launch, grid, s, in, states, kept);
  });
  launch_kernel("label_scan: pass", label_scan_pass_kernel, launch, {.x = pass_pieces(s), .threads = kPassThreads}, s, states,
                kept, false);
}

void pass_label_gradients(const Launch& launch, const Sizes& s, float* gradients, const float* kept) {
  launch_kernel("label_scan_backward: pass", label_scan_pass_kernel, launch, {.x = pass_pieces(s), .threads = kPassThreads}, s,
                gradients, kept, true);
}

std::size_t fused_label_workspace(const ScanShape& shape, std::int64_t rows) {
  const Sizes s = make_sizes(shape, 0, rows);
  std::size_t bytes = 0;
  dispatch_by_label(s, [&]<class F>() { bytes = bytes_of_memory<ForwardMemory<F>>(s, true); });
  return bytes;
}

void fused_label_forward(const Launch& launch, bf16* out, const Sizes& s, const Inputs<bf16>& in) {
  dispatch_by_label(s, [&]<class F>() {
    ScratchAllocator scratch(launch);
    const ForwardMemory<F> memory(s, true, [&](std::size_t count) { return scratch.take<float>(count); });
    label_states(launch, s, in, memory.states, memory.kept);
    const Grid grid{.x = F::blocks(s.rows), .threads = F::kThreads, .shared_bytes = ForwardShared<F>::bytes(SliceSizes<F>(s))};
    launch_kernel("label_scan", label_scan_kernel<F>, launch, grid, s, in, out, memory.states);
  });
}

}  // namespace attamba::kernels::cuda::scan
