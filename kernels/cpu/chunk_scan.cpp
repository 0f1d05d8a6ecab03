// Chunked selective scan, forward (docs/model.md): convolution, SiLU, softplus, scan, skip, gate and norm in one pass over
// blocks that stay in the cache. Chunks longer than a block take three: what each block adds to the state, the sum along each
// chunk, and the pass over blocks with their entry states.
#include "kernels/chunk_scan_checks.h"
#include "kernels/cpu/chunk_scan_block.h"

namespace attamba::kernels::cpu {
namespace {

using namespace scan;

/// out = RMSNorm(y * silu(z)) of one row; y is overwritten by the product.
template <class T, class A>
void gate_and_norm(const Geometry& g, const Inputs<T>& in, const T* z, A* y, T* out) {
  A squares = 0;
  for_hidden(g, [&](std::int64_t column, std::int64_t padded, std::int64_t count) {
    const T* gate = z + column;
    A* value = y + padded;
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t c = 0; c < count; ++c) {
      value[c] *= silu(convert<A>(gate[c]));
      sum += value[c] * value[c];
    }
    squares += sum;
  });
  const A scale = A(1) / std::sqrt(squares / static_cast<A>(g.hidden) + in.eps);
  for_hidden(g, [&](std::int64_t column, std::int64_t padded, std::int64_t count) {
    T* to = out + column;
    const A *value = y + padded, *weight = in.norm + padded;
#pragma omp simd
    for (std::int64_t c = 0; c < count; ++c) {
      to[c] = convert<T>(value[c] * scale * weight[c]);
    }
  });
}

template <class T>
void forward(const Launch& launch, const Tensor& out, const Tensor& zxbcdt, const ScanWeights& weights, const Tensor& starts,
             const ScanShape& shape, double eps, std::int64_t sequence_length) {
  using A = Accumulator<T>;
  const Geometry g = make_geometry(shape, kLanes<A>);
  const std::int64_t rows = zxbcdt.shape().rows();
  const WindowLimits limits = window_limits(g, rows, sequence_length, sizeof(A));
  Carver carver(launch.scratch.data());
  const WindowScratch<A> window(carver, g, limits, false);
  require(carver.used() <= launch.scratch.size(), "chunk_scan: need ", carver.used(), " bytes of scratch and more, have ",
          launch.scratch.size());
  const Lanes<A> lanes(g, false, launch.scratch.subspan(carver.used()));
  const Inputs<T> in = prepare_inputs<T>(g, zxbcdt, weights, starts, eps, window);
  T* to = out.as<T>();
  for (std::int64_t begin = 0; begin < rows; begin += limits.rows) {
    const Cut cut = cut_blocks(g, begin, std::min(rows, begin + limits.rows), sequence_length, in.starts, window.blocks,
                               window.slot_blocks);
    entry_states(g, in, cut, window, lanes.data(), lanes.count());
    for_tasks(cut.blocks, lanes.count(), [&](std::int64_t b, std::int64_t lane) {
      const Block& block = window.blocks[b];
      const BlockScratch<A>& s = lanes[lane];
      load_channels<false>(g, in, block, true, s);
      load_steps<false>(g, in, block, s);
      mix_block(g, in, block, block.carry_in < 0 ? nullptr : window.states + block.carry_in * g.state_size(), s);
      for (std::int64_t t = block.begin; t < block.end; ++t) {
        gate_and_norm(g, in, in.row(g, t), s.y + (t - block.begin) * g.x_columns, to + t * g.hidden);
      }
    });
  }
}

}  // namespace

void chunk_scan(const Launch& launch, const Tensor& out, const Tensor& zxbcdt, const ScanWeights& weights, const Tensor& starts,
                const ScanShape& shape, double eps, std::int64_t sequence_length) {
  check_scan_input("chunk_scan", zxbcdt, starts, shape, sequence_length);
  check_scan_weights("chunk_scan", "weight", weights, shape, accumulator_of(zxbcdt.dtype()));
  check_scan_rows("chunk_scan", "out", out, zxbcdt, shape.hidden);
  dispatch_floating(zxbcdt.dtype(), "chunk_scan",
                    [&]<class T>() { forward<T>(launch, out, zxbcdt, weights, starts, shape, eps, sequence_length); });
}

std::size_t chunk_scan_workspace(const TensorType& zxbcdt, const ScanShape& shape, std::int64_t sequence_length) {
  return dispatch_floating(zxbcdt.dtype, "chunk_scan", [&]<class T>() {
    return scan::scratch_bytes<Accumulator<T>>(shape, zxbcdt.shape.rows(), sequence_length, false);
  });
}

}  // namespace attamba::kernels::cpu
