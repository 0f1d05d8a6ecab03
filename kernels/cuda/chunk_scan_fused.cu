// Forward half of chunk_scan_fused.h.
#include "kernels/cuda/chunk_scan_fused.h"

#include "kernels/cuda/chunk_scan_fused_mix.h"
#include "kernels/cuda/launch_kernel.h"

namespace attamba::kernels::cuda::scan {
namespace {

using namespace device;

struct ForwardShared {
  Shared inputs;
  bf16* z;      ///< [kRows, kHiddenStride]; becomes out
  float* sums;  ///< [kRows, kHalves] of squares

  ATTAMBA_DEVICE ForwardShared(const Sizes& s, SharedMemory shared) {
    inputs.take(s, shared);
    z = shared.take<bf16>(kRows * kHiddenStride);
    sums = shared.take<float>(kRows * kHalves);
  }
  static std::size_t bytes(const Sizes& s) {
    return Shared::bytes(s) + SharedMemory::bytes_of<bf16>(kRows * kHiddenStride) +
           SharedMemory::bytes_of<float>(kRows * kHalves);
  }
};

/// y becomes Y silu(z); returns in `squares` the sums of squares of the lane's two rows over the warp's columns.
template <int kHead>
ATTAMBA_DEVICE void gate(const Sizes& s, const Inputs<bf16>& in, const ForwardShared& shared, const WarpPlace& place,
                         float (&y)[kHalf / kHead][kHead / 8][4], float (&squares)[2]) {
  squares[0] = squares[1] = 0;
#pragma unroll
  for (int h = 0; h < kHalf / kHead; ++h) {
    if (never(s, h)) {
      break;
    }
    const float skip = load(in.d_skip + place.first_head<kHead>() + h);
#pragma unroll
    for (int tile = 0; tile < kHead / 8; ++tile) {
      const int column = place.column<kHead>(h) + tile * 8;
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const std::uint32_t x = load_pair(shared.inputs.active + place.row(row) * shared.inputs.stride + column);
        const std::uint32_t z = load_pair(shared.z + place.row(row) * kHiddenStride + column);
        float& low = y[h][tile][2 * row];
        float& high = y[h][tile][2 * row + 1];
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

template <int kHead>
ATTAMBA_DEVICE void normalize(const Sizes& s, const ForwardShared& shared, const WarpPlace& place,
                              const float (&y)[kHalf / kHead][kHead / 8][4]) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const float* sums = shared.sums + place.row(row) * kHalves;
    const float scale = rsqrt((load(sums) + load(sums + 1)) / static_cast<float>(kFusedHidden) + s.eps);
#pragma unroll
    for (int h = 0; h < kHalf / kHead; ++h) {
#pragma unroll
      for (int tile = 0; tile < kHead / 8; ++tile) {
        const int column = place.column<kHead>(h) + tile * 8;
        const float* weight = shared.inputs.norm + column;
        store_pair(shared.z + place.row(row) * kHiddenStride + column, y[h][tile][2 * row] * scale * load(weight),
                   y[h][tile][2 * row + 1] * scale * load(weight + 1));
      }
    }
  }
}

/// One tile; `state` at its entry, where a chunk enters.
template <int kState>
ATTAMBA_DEVICE void tile_output(const Sizes& s, const Inputs<bf16>& in, const ForwardShared& shared, const Tile& tile,
                                const float* state) {
  constexpr int kHead = kFusedHead;
  fetch_rows(tile, input_row(s, in, tile.begin), s.projection, shared.z);
  sync_block();
  convolve_tile(s, in, tile, shared.inputs);
  load_steps(s, in, tile, shared.inputs);
  copy_async_wait<0>();
  sync_block();
  const WarpPlace place;
  float y[kHalf / kHead][kHead / 8][4] = {}, squares[2];
  const bool works = place.first_row() < tile.rows;
  if (works) {
    mix<kHead, kState>(s, shared.inputs, place, state, y);
    gate<kHead>(s, in, shared, place, y, squares);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      if (place.q == 0) {
        store(shared.sums + place.row(row) * kHalves + place.half, squares[row]);
      }
    }
  }
  sync_block();
  if (works) {
    normalize<kHead>(s, shared, place, y);
  }
}

/// `states`: one per block, or, where walks are shared out, one per slot.
template <int kState, int kGroups>
ATTAMBA_KERNEL(kFusedThreads, 2)
chunk_scan_kernel(Sizes given, Inputs<bf16> in, bf16* out, float* states, bool shared_out) {
  constexpr int kPacks = kFusedHidden / 8, kStateSize = kFusedHidden * kState;
  const Sizes s = fixed_sizes<kState, kGroups>(given);
  const ForwardShared shared(s, SharedMemory());
  load_weights(s, in, shared.inputs);
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
      float* state = states + static_cast<std::int64_t>(shared_out ? slot_of(begin) : block_x()) * kStateSize;
      tile_output<kState>(s, in, shared, tile, state);
      if (shared_out) {
        begin = limit = other;
        other = -1;
      } else if (tile.last) {
        begin = -1;
      } else {
        begin += tile.rows;
        const int leaving = leaving_chunk(s, in, tile);
        if (leaving < kRows) {
          pass_state<kFusedHead, kState>(s, shared.inputs, leaving, state, state);
        }
      }
      sync_block();
      for (int i = own_thread(); i < tile.rows * kPacks; i += kFusedThreads) {
        const int t = i / kPacks, column = i % kPacks * 8;
        store(reinterpret_cast<Bytes16*>(out + static_cast<std::int64_t>(tile.begin + t) * kFusedHidden + column),
              load(reinterpret_cast<const Bytes16*>(shared.z + t * kHiddenStride + column)));
      }
      sync_block();
    }
  }
}

}  // namespace

bool is_fused(const ScanShape& shape) {
  return shape.hidden == kFusedHidden && shape.heads == kFusedHidden / kFusedHead && shape.conv == kFusedTaps &&
         ((shape.state == 32 && shape.groups <= kHalves) || (shape.state == 128 && shape.groups == 1));
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
  const Grid grid{.x = fused_blocks(s.rows), .threads = kFusedThreads, .shared_bytes = ForwardShared::bytes(s)};
  dispatch_fused(s, [&]<int kState, int kGroups>() {
    launch_kernel("chunk_scan", chunk_scan_kernel<kState, kGroups>, launch, grid, s, in, out, states, shared_out);
  });
}

}  // namespace attamba::kernels::cuda::scan
