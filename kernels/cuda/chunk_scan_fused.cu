// Forward half of chunk_scan_fused.h.
#include "kernels/cuda/chunk_scan_fused.h"

#include "kernels/cuda/chunk_scan_fused_mix.h"
#include "kernels/cuda/launch_kernel.h"

namespace attamba::kernels::cuda::scan {
namespace {

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
                 [&](int column) { return load(shared.inputs.norm + column); });
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

/// `states`: one per block, or, where walks are shared out, one per slot.
template <class F>
ATTAMBA_KERNEL(F::kThreads, 2)
chunk_scan_kernel(Sizes given, Inputs<bf16> in, bf16* out, float* states, bool shared_out) {
  constexpr int kPacks = F::kSlice / 8;
  const bool shares = !F::kSliced && shared_out;
  SliceSizes<F> s(given);
  const ForwardShared<F> shared(s, SharedMemory());
  if constexpr (!F::kSliced) {
    load_weights(s, in, shared.inputs);
  }
  for (int range = block_x(); range * kRange < s.rows; range += grid_x()) {
    int begin = first_chunk(s, in, range), limit = (range + 1) * kRange, other = shares ? shared_tile(s, in, range) : -1;
    if (begin < 0) {
      begin = limit = other;
      other = -1;
    }
    while (begin >= 0) {
      const Tile tile = cut_tile(s, in, begin, F::kSliced ? (range + 1) * kRange : limit, shared.inputs.starts);
      if (tile.rows == 0) {
        break;
      }
      float* all_states = states + static_cast<std::int64_t>(shares ? F::slot_of(begin) : block_x()) * s.all.state_size();
      for (s.slice = 0; s.column() < s.all.hidden; ++s.slice) {
        float* state = all_states + s.slice * F::kSliceState;
        tile_output<F>(s, in, shared, tile, state);
        if (!shares && !tile.last) {
          const int leaving = leaving_chunk(s, in, tile);
          if (leaving < F::kRows) {
            pass_state(s, shared.inputs, leaving, state, state);
          }
        }
        sync_block();
        for (int i = own_thread(); i < tile.rows * kPacks; i += F::kThreads) {
          const int t = i / kPacks, column = i % kPacks * 8;
          store(
              reinterpret_cast<Bytes16*>(out + static_cast<std::int64_t>(tile.begin + t) * s.all.hidden + s.column() + column),
              load(reinterpret_cast<const Bytes16*>(shared.z + t * F::kSliceStride + column)));
        }
        sync_block();
      }
      if constexpr (F::kSliced) {
        normalize(s, in, shared, tile, out);
        sync_block();  // the rows' sums are read
      }
      if (shares) {
        begin = limit = other;
        other = -1;
      } else {
        begin = tile.last ? -1 : tile.begin + tile.rows;
      }
    }
  }
}

}  // namespace

bool is_fused(const ScanShape& shape, std::int64_t n) {
  if (shape.conv != kFusedTaps || shape.hidden % kWholeSlice != 0) {
    return false;
  }
  if (!is_sliced(make_sizes(shape, 0))) {
    return (shape.state == 32 && shape.groups <= kHalves) || (shape.state == 128 && shape.groups == 1);
  }
  const bool narrow_heads = shape.heads * kUnit == shape.hidden, wide_heads = shape.heads * 2 * kUnit == shape.hidden;
  const bool form = (shape.state == 32 && (narrow_heads || wide_heads)) || (shape.state == 64 && wide_heads);
  const bool rows_aligned = shape.projection() * static_cast<std::int64_t>(sizeof(bf16)) % 16 == 0;
  return form && rows_aligned && shape.groups == 1 && !shares_walks(shape, n);
}

std::size_t fused_workspace(const ScanShape& shape, std::int64_t rows, bool shared_out) {
  const auto state = static_cast<std::size_t>(shape.hidden * shape.state), heads = static_cast<std::size_t>(shape.heads);
  return shared_out ? ScratchAllocator::aligned_bytes<float>(slots_of(rows) * state) +
                          ScratchAllocator::aligned_bytes<float>(slots_of(rows) * heads)
                    : ScratchAllocator::aligned_bytes<float>(static_cast<std::size_t>(fused_blocks(rows)) * state);
}

void fused_forward(const Launch& launch, bf16* out, const Sizes& s, const Inputs<bf16>& in, bool shared_out) {
  ScratchAllocator scratch(launch);
  const std::size_t count = shared_out ? slots_of(s.rows) : static_cast<std::size_t>(fused_blocks(s.rows));
  auto* states = scratch.take<float>(count * static_cast<std::size_t>(s.state_size()));
  if (shared_out) {
    long_states(launch, s, in, states, scratch.take<float>(count * static_cast<std::size_t>(s.heads)));
  }
  dispatch_fused(s, [&]<class F>() {
    const Grid grid{
        .x = fused_blocks(s.rows), .threads = F::kThreads, .shared_bytes = ForwardShared<F>::bytes(SliceSizes<F>(s))};
    launch_kernel("chunk_scan", chunk_scan_kernel<F>, launch, grid, s, in, out, states, shared_out);
  });
}

}  // namespace attamba::kernels::cuda::scan
