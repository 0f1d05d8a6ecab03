// The backward kernels of SSMs that have slices: a source of its own, as these take long to compile.
#include "kernels/cuda/chunk_scan_fused_backward.h"

namespace attamba::kernels::cuda::scan {

void sliced_backward(const Launch& launch, bf16* dzxbcdt, const WeightGradients& gradients, const bf16* dout, const Sizes& s,
                     const Inputs<bf16>& in, bool shared_out) {
  dispatch_sliced(s, [&]<class F>() { launch_backward<F>(launch, dzxbcdt, gradients, dout, s, in, shared_out); });
}

}  // namespace attamba::kernels::cuda::scan
