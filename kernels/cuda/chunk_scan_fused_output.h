// What the forward kernels make of a tile.
#pragma once

#include "kernels/cuda/chunk_scan_fused_mix.h"

namespace attamba::kernels::cuda::scan {

using namespace device;

template <class F>
struct ForwardShared {
  Shared<F> inputs;
  bf16* z;      ///< [kRows, kSliceStride]; becomes out, or what the norm is yet to scale
  float* sums;  ///< [kRows, kHalves] of squares

  ATTAMBA_DEVICE ForwardShared(const SliceSizes<F>& s, SharedMemory shared) {
    inputs.take(s, shared);
    z = shared.take<bf16>(F::kRows * F::kSliceStride);
    sums = shared.take<float>(F::kRows * kHalves);
  }
  static std::size_t bytes(const SliceSizes<F>& s) {
    return Shared<F>::bytes(s) + SharedMemory::bytes_of<bf16>(F::kRows * F::kSliceStride) +
           SharedMemory::bytes_of<float>(F::kRows * kHalves);
  }
};

/// y becomes Y silu(z); returns in `squares` the sums of squares of the lane's two rows over the warp's columns.
template <class F>
ATTAMBA_DEVICE void gate(const SliceSizes<F>& s, const Inputs<bf16>& in, const ForwardShared<F>& shared,
                         const WarpPlace<F>& place, float (&y)[F::kWarpUnits][kUnit / 8][4], float (&squares)[2]) {
  squares[0] = squares[1] = 0;
#pragma unroll
  for (int own = 0; own < F::kWarpUnits; ++own) {
    if (never(s, own)) {
      break;
    }
    const float skip = load(in.d_skip + s.head_of(place.unit(own) / s.units));
#pragma unroll
    for (int tile = 0; tile < kUnit / 8; ++tile) {
      const int column = place.column(own) + tile * 8;
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const std::uint32_t x = load_pair(shared.inputs.active + place.row(row) * shared.inputs.stride + column);
        const std::uint32_t z = load_pair(shared.z + place.row(row) * F::kSliceStride + column);
        float& low = y[own][tile][2 * row];
        float& high = y[own][tile][2 * row + 1];
        low = (low + skip * low_half(x)) * low_half(z) * sigmoid_fast(low_half(z));
        high = (high + skip * high_half(x)) * high_half(z) * sigmoid_fast(high_half(z));
        squares[row] += low * low + high * high;
      }
    }
  }
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    squares[row] = quad_sum(squares[row]);
  }
}

/// The rows' values times `scale` and weight(column), into z.
template <class F, class Weight>
ATTAMBA_DEVICE void write_rows(const ForwardShared<F>& shared, const WarpPlace<F>& place,
                               const float (&y)[F::kWarpUnits][kUnit / 8][4], int row, float scale, const Weight& weight) {
#pragma unroll
  for (int own = 0; own < F::kWarpUnits; ++own) {
#pragma unroll
    for (int tile = 0; tile < kUnit / 8; ++tile) {
      const int column = place.column(own) + tile * 8;
      store_pair(shared.z + place.row(row) * F::kSliceStride + column, y[own][tile][2 * row] * scale * weight(column),
                 y[own][tile][2 * row + 1] * scale * weight(column + 1));
    }
  }
}

/// Of a row whose sums are complete.
template <class F>
ATTAMBA_DEVICE float row_scale(const SliceSizes<F>& s, const ForwardShared<F>& shared, int row) {
  const float* sums = shared.sums + row * kHalves;
  return rsqrt((load(sums) + load(sums + 1)) / static_cast<float>(s.all.hidden) + s.eps);
}

/// One slice of a tile, into z; `state` at its entry, where a chunk enters.
template <class F>
ATTAMBA_DEVICE void tile_output(const SliceSizes<F>& s, const Inputs<bf16>& in, const ForwardShared<F>& shared,
                                const Tile& tile, const float* state) {
  if constexpr (F::kSliced) {
    load_weights(s, in, shared.inputs);
  }
  fetch_rows<F>(tile, input_row(s, in, tile.begin) + s.column(), s.projection, shared.z);
  sync_block();
  convolve_tile(s, in, tile, shared.inputs, s.new_channels());
  load_steps(s, in, tile, shared.inputs);
  copy_async_wait<0>();
  sync_block();
  const WarpPlace<F> place;
  float y[F::kWarpUnits][kUnit / 8][4] = {}, squares[2];
  const bool works = place.first_row() < tile.rows;
  if (works) {
    mix(s, shared.inputs, place, state, y);
    gate(s, in, shared, place, y, squares);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      if (place.q == 0) {
        float* sum = shared.sums + place.row(row) * kHalves + place.half;
        store(sum, s.slice == 0 ? squares[row] : load(sum) + squares[row]);
      }
      if constexpr (F::kSliced) {
        write_rows(shared, place, y, row, 1, [](int) { return 1.0f; });
      }
    }
  }
  sync_block();
  if (works && !F::kSliced) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      write_rows(shared, place, y, row, row_scale(s, shared, place.row(row)),
                 [&](int column) { return norm_weight(s, in, shared.inputs, column); });
    }
  }
}

/// Scales the tile's rows of `out`, which this block has written, all slices: eight columns by one strip per thread.
template <class F>
ATTAMBA_DEVICE void normalize(const SliceSizes<F>& s, const Inputs<bf16>& in, const ForwardShared<F>& shared, const Tile& tile,
                              bf16* out) {
  const int packs = s.all.hidden / 8;
  for (int item = own_thread(); item < packs * strip_count(tile.rows); item += F::kThreads) {
    const int column = item % packs * 8, first = item / packs * kStripRows;
    const int end = first + kStripRows < tile.rows ? first + kStripRows : tile.rows;
    const Pack<float> weight[2] = {Pack<float>::read(in.norm + column), Pack<float>::read(in.norm + column + 4)};
#pragma unroll 4
    for (int t = first; t < end; ++t) {
      auto* to = reinterpret_cast<Bytes16*>(out + static_cast<std::int64_t>(tile.begin + t) * s.all.hidden + column);
      const float scale = row_scale(s, shared, t);
      Bytes16 raw = load(to);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        raw.word[i] = pack_bf16(low_half(raw.word[i]) * scale * weight[i / 2].value[i % 2 * 2],
                                high_half(raw.word[i]) * scale * weight[i / 2].value[i % 2 * 2 + 1]);
      }
      store(to, raw);
    }
  }
}

/// A tile's rows of `out`; `states` at its entry, where a state enters. pass_on(state), called of each slice's when it has been
/// read, may write the one at the tile's end.
template <class F, class Pass>
ATTAMBA_DEVICE void write_tile(SliceSizes<F>& s, const Inputs<bf16>& in, const ForwardShared<F>& shared, const Tile& tile,
                               float* states, bf16* out, const Pass& pass_on) {
  constexpr int kPacks = F::kSlice / 8;
  for (s.slice = 0; s.column() < s.all.hidden; ++s.slice) {
    float* state = states + s.slice * F::kSliceState;
    tile_output<F>(s, in, shared, tile, state);
    pass_on(state);
    sync_block();
    for (int i = own_thread(); i < tile.rows * kPacks; i += F::kThreads) {
      const int t = i / kPacks, column = i % kPacks * 8;
      store(reinterpret_cast<Bytes16*>(out + static_cast<std::int64_t>(tile.begin + t) * s.all.hidden + s.column() + column),
            load(reinterpret_cast<const Bytes16*>(shared.z + t * F::kSliceStride + column)));
    }
    sync_block();
  }
  if constexpr (F::kSliced) {
    normalize(s, in, shared, tile, out);
    sync_block();  // the rows' sums are read
  }
}

/// Pieces of workspace, from `take(elements)`: states, one per block, or, where tiles are shared out, one per slot.
template <class F>
struct ForwardMemory {
  float *states, *kept;

  template <class Take>
  ForwardMemory(const Sizes& s, bool shared_out, const Take& take) {
    const std::size_t slots = shared_out ? F::slots(s.rows) : static_cast<std::size_t>(F::blocks(s.rows));
    states = take(slots * static_cast<std::size_t>(s.state_size()));
    kept = shared_out ? take(slots * static_cast<std::size_t>(s.heads)) : nullptr;
  }
};

}  // namespace attamba::kernels::cuda::scan
