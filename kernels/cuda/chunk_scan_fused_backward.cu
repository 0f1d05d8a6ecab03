// The backward kernels of SSMs that are one slice.
#include "kernels/cuda/chunk_scan_fused_backward.h"

namespace attamba::kernels::cuda::scan {

std::size_t fused_backward_workspace(const ScanShape& shape, std::int64_t rows, bool shared_out) {
  const Sizes s = make_sizes(shape, 0, rows);
  std::size_t bytes = 0;
  dispatch_fused(s, [&]<class F>() { bytes = bytes_of_memory<BackwardMemory<F>>(s, shared_out); });
  return bytes;
}

void fused_backward(const Launch& launch, bf16* dzxbcdt, const WeightGradients& gradients, const bf16* dout, const Sizes& s,
                    const Inputs<bf16>& in, bool shared_out) {
  const bool whole =
      dispatch_whole(s, [&]<class F>() { launch_backward<F>(launch, dzxbcdt, gradients, dout, s, in, shared_out); });
  if (!whole) {
    sliced_backward(launch, dzxbcdt, gradients, dout, s, in, shared_out);
  }
}

}  // namespace attamba::kernels::cuda::scan
