// Backward half of chunk_scan_fused.h. Everything is recomputed from zxbcdt, tile by tile from a block's last one; a chunk
// longer than a tile is first walked forwards for the states at its tiles' entries.
//
// Pairs of rows are worked on transposed, a warp having 16 rows s and all later blocks of rows t: with dM = dY X^T,
//   dX = M^T dY + exit delta (dS' B),  d(C B^T) = sum_h dM o L,  and with P = dM o M, M rounded as it was in Y = M X,
//   sum_s P[t, s] + entry_t dY_t^T S C_t = dY_t . (Y_t - D X_t),
// so the terms of dl (kernels/cpu/chunk_scan_backward.cpp) need sums over t only, and cancel as they should.
#include "kernels/cuda/chunk_scan_fused_convolve.h"
#include "kernels/cuda/chunk_scan_fused_pairs.h"
#include "kernels/cuda/launch_kernel.h"

namespace attamba::kernels::cuda::scan {
namespace {

using namespace device;

/// What passes between tiles, in workspace.
struct Passing {
  float* states;     ///< [slots, E N], at a tile's entry
  float* gradients;  ///< [slots, E N], of these
  float* edges;      ///< [slots, kEdge, channels], see Edges
  float* rests;      ///< the same, or null where the tiles of a walk go to one block
  float* norm_sums;  ///< [blocks, kStrips, E], or null where they fit in shared memory
  float* products;   ///< [blocks, 2, halves, kStrips, N / 16] pieces of dB (from the exit) and dC (from the entry)

  ATTAMBA_DEVICE bool shared_out() const { return rests != nullptr; }
  ATTAMBA_DEVICE float* own_norm_sums() const {
    return norm_sums == nullptr ? nullptr : norm_sums + std::int64_t{block_x()} * (kStrips * kFusedHidden);
  }
  template <int kState>
  ATTAMBA_DEVICE float* own_products(int which) const {
    constexpr int kProducts = kHalves * kRows * kState;
    return products + (std::int64_t{block_x()} * 2 + which) * kProducts;
  }
};
ATTAMBA_DEVICE float* in_slot(float* values, int slot, int size) {
  return values + static_cast<std::int64_t>(slot) * size;
}

/// acc [16, N] of the warp's strip, a group's dB (half 0) or dC (half 1), from the scores' gradients of the group's halves.
template <int kState>
ATTAMBA_DEVICE void score_products(const Sizes& s, const BackwardShared& shared, const WarpPlace& place, int strips, int group,
                                   float (&acc)[kState / 8][4]) {
  const Shared& in = shared.inputs;
  const bool is_c = place.half == 1;
  for (int other = 0; other < strips; ++other) {
    const int from = is_c ? other : place.strip, block = is_c ? place.strip : other;
    if (from > block || (from < block && load(in.starts + block * kStripRows) > from * kStripRows + kStripRows - 1)) {
      continue;
    }
    const int column = is_c ? s.b_column(group) : s.c_column(group);
    for (int half = s.groups == 1 ? 0 : group; half < (s.groups == 1 ? kHalves : group + 1); ++half) {
      const bf16* tile = shared.score_tile(half, from, block);
      std::uint32_t left[4];
      if (is_c) {
        load_left_transposed(left, tile, kScoreStride, 0, 0, place.lane);
      } else {
        load_left(left, tile, kScoreStride, 0, 0, place.lane);
      }
#pragma unroll
      for (int n = 0; n < kState; n += 16) {
        std::uint32_t right[4];
        load_right(right, in.active, in.stride, other * kStripRows, column + n, place.lane);
        multiply(acc[n / 8], acc[n / 8 + 1], left, right);
      }
    }
  }
}

template <int kState>
ATTAMBA_DEVICE void add_products(const Sizes& s, const WarpPlace& place, int group, float* products,
                                 float (&acc)[kState / 8][4]) {
  for (int half = s.groups == 1 ? 0 : group; half < (s.groups == 1 ? kHalves : group + 1); ++half) {
#pragma unroll
    for (int n = 0; n < kState / 16; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const auto pack = Pack<float>::read(product_piece<kState>(products, place, half, n) + 4 * i);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          acc[2 * n + i][e] += pack.value[e];
        }
      }
    }
  }
}

template <int kState>
ATTAMBA_DEVICE void write_group(const BackwardShared& shared, const WarpPlace& place, int column,
                                const float (&acc)[kState / 8][4]) {
#pragma unroll
  for (int n = 0; n < kState / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      store_pair(shared.inputs.active + place.row(i) * shared.inputs.stride + column + n * 8 + 2 * place.q, acc[n][2 * i],
                 acc[n][2 * i + 1]);
    }
  }
}

/// Sum over the rows of the lane's row's chunk from the lane's row on; rows of 32, `start` their chunks', `first` the first
/// one.
ATTAMBA_DEVICE float chunk_suffix(float value, const int* starts, int first, int lane) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const float later = shuffle_down(value, step);
    const int row = first + lane + step;
    value += lane + step < kWarp && row < kRows && load(starts + (row < kRows ? row : 0)) <= first + lane ? later : 0.0f;
  }
  return value;
}

/// A warp per head: ddt, and the head's weights' sums. `state` and `gradient` where one chunk fills the tile.
template <int kState>
ATTAMBA_DEVICE void step_gradient(const Sizes& s, const Inputs<bf16>& in, const Tile& tile, const BackwardShared& shared,
                                  int leaving, float* state, float* gradient, bf16* dzxbcdt) {
  constexpr int kParts = (kRows + kWarp - 1) / kWarp, kPieces = kFusedHead / 16 * (kState / 16);
  const int thread = own_thread(), lane = thread % kWarp;
  for (int head = thread / kWarp; head < s.heads; head += kFusedWarps) {
    const float rate = -exp(load(in.a_log + head));
    float whole = 0;
    if (leaving < kRows) {
      for (int strip = 0; strip < kStrips; ++strip) {
        whole += load(shared.terms + strip * s.heads + head);
      }
    }
    if (leaving < 0) {
      float sum = 0;
#pragma unroll 1
      for (int piece = 0; piece < kPieces; ++piece) {
        const float *a = state_piece<kFusedHead, kState>(state, head, 0, piece, lane),
                    *b = state_piece<kFusedHead, kState>(gradient, head, 0, piece, lane);
        sum += dot(a, 1, b, 1, 8);
      }
      whole += exp2_fast(load(shared.inputs.decay + head * kRows + kRows - 1)) * warp_sum(sum);
    }
    float later[kParts], rate_sum = 0, bias_sum = 0;
#pragma unroll
    for (int part = kParts - 1; part >= 0; --part) {
      const int t = part * kWarp + lane, next = (part + 1) * kWarp;
      later[part] =
          chunk_suffix(t < tile.rows ? load(shared.dlog + head * kRows + t) : 0.0f, shared.inputs.starts, part * kWarp, lane);
      if (part + 1 < kParts) {
        const float rest = shuffle(later[part + 1], 0);
        later[part] += load(shared.inputs.starts + next) <= t ? rest : 0.0f;
      }
      if (t < tile.rows) {
        const float dlog = later[part] + (t >= leaving ? whole : 0.0f);
        const float ddt =
            (load(shared.ddelta + head * kRows + t) + rate * dlog) * sigmoid(input_step(s, in, tile.begin + t, head));
        store(dzxbcdt + static_cast<std::int64_t>(tile.begin + t) * s.projection + s.projection - s.heads + head, to_bf16(ddt));
        rate_sum += load(shared.inputs.delta + head * kRows + t) * dlog;
        bias_sum += ddt;
      }
    }
    rate_sum = warp_sum(rate_sum);
    bias_sum = warp_sum(bias_sum);
    if (lane == 0) {
      float trace = 0;
      for (int strip = 0; strip < strip_count(tile.rows); ++strip) {
        trace += load(shared.traces + strip * s.heads + head);
      }
      float* sums = shared.head_sums + head;
      store(sums, load(sums) + rate * rate_sum);
      store(sums + s.heads, load(sums + s.heads) + trace);
      store(sums + 2 * s.heads, load(sums + 2 * s.heads) + bias_sum);
    }
  }
}

// ------------------------------------------------------------------------------------------------ one tile, one block
/// Where a tile lies in its block's walk.
struct Step {
  Tile tile;
  int leaving;    ///< as of leaving_chunk
  bool add_taps;  ///< the block has written its taps' gradient before
};

/// The gradient of the state at the tile's entry: what the tile's dY adds, and `exit` decayed, where its chunk goes on.
template <int kState>
ATTAMBA_DEVICE void entry_gradient(const Sizes& s, const BackwardShared& shared, int strips, const float* exit, float* entry) {
  const Shared& inputs = shared.inputs;
  pass_outer_products<kFusedHead, kState>(s, shared.dy, kHiddenStride, inputs, true, strips, exit, entry, [&](int head, int t) {
    return load(inputs.starts + t) < 0 ? exp2_fast(load(inputs.decay + head * kRows + t)) : 0.0f;
  });
}

template <int kState>
ATTAMBA_DEVICE void tile_gradient(const Sizes& s, const Inputs<bf16>& in, const BackwardShared& shared, const Passing& passing,
                                  const Step& step, const bf16* dout, bf16* dzxbcdt, float* partial) {
  constexpr int kStateSize = kFusedHidden * kState;
  const Shared& inputs = shared.inputs;
  const Tile& tile = step.tile;
  const int strips = strip_count(tile.rows), leaving = step.leaving, slot = slot_of(tile.begin);
  const bool works = WarpPlace().strip < strips, leaves = leaving < kRows, enters = load(inputs.starts) < 0;
  float *state = in_slot(passing.states, slot, kStateSize), *exit = in_slot(passing.gradients, slot + 1, kStateSize);
  fetch_rows(tile, dout + static_cast<std::int64_t>(tile.begin) * kFusedHidden, kFusedHidden, shared.dy);
  convolve_tile(s, in, tile, inputs);
  load_steps(s, in, tile, inputs);
  copy_async_wait<0>();
  sync_block();
  gate_backward<kState>(s, in, tile, shared, WarpPlace(), works, state, dzxbcdt);
  sync_block();
  if (works) {
    const WarpPlace place;
    if (enters) {
      state_products<kState>(place, shared.dy, kHiddenStride, state, passing.own_products<kState>(1), [&](int head, int t) {
        return load(inputs.starts + t) < 0 ? exp2_fast(load(inputs.decay + head * kRows + t)) : 0.0f;
      });
    }
    if (leaves) {
      state_products<kState>(place, inputs.active, inputs.stride, exit, passing.own_products<kState>(0), [&](int head, int t) {
        const float* decay = inputs.decay + head * kRows;
        return t >= leaving ? exp2_fast(load(decay + kRows - 1) - load(decay + t)) * load(inputs.delta + head * kRows + t)
                            : 0.0f;
      });
    }
    pair_gradient<kState>(s, in, shared, place, strips, leaving, exit);
  }
  sync_block();  // the scores' gradients are there
  if (enters && !passing.shared_out()) {
    entry_gradient<kState>(s, shared, strips, leaving < 0 ? exit : nullptr, in_slot(passing.gradients, slot, kStateSize));
  }
  step_gradient<kState>(s, in, tile, shared, leaving, state, exit, dzxbcdt);
  const WarpPlace place;
  float group[2][kState / 8][4] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (works && i < s.groups) {
      score_products<kState>(s, shared, place, strips, i, group[i]);
      if (place.half == 1 ? enters : leaves) {
        add_products<kState>(s, place, i, passing.own_products<kState>(place.half), group[i]);
      }
    }
  }
  sync_block();  // B and C are read
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (works && i < s.groups) {
      write_group<kState>(shared, place, place.half == 1 ? s.c_column(i) : s.b_column(i), group[i]);
    }
  }
  sync_block();
  auto* taps = reinterpret_cast<float*>(shared.dy);
  const int edge = kEdge * s.channels;
  const Edges edges{.next = in_slot(passing.edges, slot + 1, edge),
                    .own = in_slot(passing.edges, slot, edge),
                    .rest = passing.shared_out() ? in_slot(passing.rests, slot + 1, edge) : nullptr};
  convolve_backward(s, in, tile, shared, leaving, edges, taps, dzxbcdt);
  sync_block();
  sum_taps(s, strips, taps, partial, step.add_taps);
  sync_block();
}

/// States at the entries of the walk's tiles; returns the last one's first row.
template <int kState>
ATTAMBA_DEVICE int entry_states(const Sizes& s, const Inputs<bf16>& in, const Shared& shared, int begin, int limit,
                                float* states) {
  constexpr int kStateSize = kFusedHidden * kState;
  for (;; begin += kRows) {
    const Tile tile = cut_tile(s, in, begin, limit, shared.starts);
    if (tile.rows == 0 || tile.last) {
      sync_block();
      return tile.rows == 0 ? begin - kRows : begin;
    }
    const int leaving = leaving_chunk(s, in, tile);
    sync_block();
    if (leaving < kRows) {
      convolve_tile(s, in, tile, shared);
      load_steps(s, in, tile, shared);
      sync_block();
      pass_state<kFusedHead, kState>(s, shared, leaving, in_slot(states, slot_of(begin), kStateSize),
                                     in_slot(states, slot_of(begin) + 1, kStateSize));
    }
    sync_block();
  }
}

/// At the end: the norm's and the heads' partial gradients.
ATTAMBA_DEVICE void write_partials(const Sizes& s, const BackwardShared& shared, float* partial, bool taps_written) {
  sync_block();
  const int taps = s.channels * kFusedTaps;
  for (int i = own_thread(); i < kFusedHidden; i += kFusedThreads) {
    float sum = 0;
    for (int strip = 0; strip < kStrips; ++strip) {
      sum += load(shared.norm_sums + strip * kFusedHidden + i);
    }
    store(partial + taps + i, sum);
  }
  for (int i = own_thread(); i < 3 * s.heads; i += kFusedThreads) {
    store(partial + taps + kFusedHidden + i, load(shared.head_sums + i));
  }
  for (int i = own_thread(); i < taps && !taps_written; i += kFusedThreads) {
    store(partial + i, 0.0f);
  }
}

template <int kState, int kGroups>
ATTAMBA_KERNEL(kFusedThreads, 2)
chunk_scan_backward_kernel(Sizes given, Inputs<bf16> in, const bf16* dout, bf16* dzxbcdt, float* partials, Passing passing) {
  const Sizes s = fixed_sizes<kState, kGroups>(given);
  const BackwardShared shared(s, SharedMemory(), passing.own_norm_sums());
  float* partial = partials + static_cast<std::int64_t>(block_x()) * s.partial_size();
  bool taps_written = false;
  load_weights(s, in, shared.inputs);
  for (int i = own_thread(); i < 3 * s.heads; i += kFusedThreads) {
    store(shared.head_sums + i, 0.0f);
  }
  for (int i = own_thread(); i < kStrips * kFusedHidden; i += kFusedThreads) {
    store(shared.norm_sums + i, 0.0f);
  }
  for (int range = block_x(); range * kRange < s.rows; range += grid_x()) {
    const int begin = first_chunk(s, in, range), other = passing.shared_out() ? shared_tile(s, in, range) : -1;
    int at = other < 0 ? begin : other;
    if (begin >= 0 && !passing.shared_out()) {
      at = entry_states<kState>(s, in, shared.inputs, begin, (range + 1) * kRange, passing.states);
    }
    while (at >= 0) {
      const bool shared_one = passing.shared_out() && at != begin;
      Step step{};
      step.tile = cut_tile(s, in, at, shared_one ? at : (range + 1) * kRange, shared.inputs.starts);
      step.leaving = step.tile.last ? kRows : leaving_chunk(s, in, step.tile);
      step.add_taps = taps_written;
      sync_block();
      tile_gradient<kState>(s, in, shared, passing, step, dout, dzxbcdt, partial);
      taps_written = true;
      at = shared_one ? begin : at > begin ? at - kRows : -1;
    }
  }
  write_partials(s, shared, partial, taps_written);
}

/// For walks that are shared out: what each tile adds to the gradient of the state at its entry.
template <int kState, int kGroups>
ATTAMBA_KERNEL(kFusedThreads, 2)
chunk_scan_gradients_kernel(Sizes given, Inputs<bf16> in, const bf16* dout, const float* states, float* gradients) {
  constexpr int kStateSize = kFusedHidden * kState;
  const Sizes s = fixed_sizes<kState, kGroups>(given);
  const BackwardShared shared(s, SharedMemory(), nullptr);
  load_weights(s, in, shared.inputs);
  for (int range = block_x(); range * kRange < s.rows; range += grid_x()) {
    const int begin = shared_tile(s, in, range);
    if (begin < 0) {
      continue;
    }
    const Tile tile = cut_tile(s, in, begin, begin, shared.inputs.starts);
    const int strips = strip_count(tile.rows), slot = slot_of(begin);
    fetch_rows(tile, dout + static_cast<std::int64_t>(begin) * kFusedHidden, kFusedHidden, shared.dy);
    sync_block();
    convolve_tile(s, in, tile, shared.inputs);
    load_steps(s, in, tile, shared.inputs);
    copy_async_wait<0>();
    sync_block();
    gate_backward<kState>(s, in, tile, shared, WarpPlace(), WarpPlace().strip < strips,
                          states + static_cast<std::int64_t>(slot) * kStateSize, nullptr);
    sync_block();
    entry_gradient<kState>(s, shared, strips, nullptr, in_slot(gradients, slot, kStateSize));
    sync_block();
  }
}

/// Pieces of workspace, from `take(elements)`.
struct BackwardMemory {
  float *partials, *kept;
  Passing passing;

  template <class Take>
  BackwardMemory(const ScanShape& shape, std::int64_t rows, bool shared_out, const Take& take) {
    const auto blocks = static_cast<std::size_t>(fused_blocks(rows)), slots = slots_of(rows);
    const auto state = static_cast<std::size_t>(shape.hidden * shape.state);
    const auto edge = static_cast<std::size_t>(kEdge * (shape.hidden + 2 * shape.groups * shape.state));
    partials = take(blocks * static_cast<std::size_t>(make_sizes(shape, 0).partial_size()));
    kept = shared_out ? take(slots * static_cast<std::size_t>(shape.heads)) : nullptr;
    passing.states = take(slots * state);
    passing.gradients = take((slots + 1) * state);
    passing.edges = take((slots + 1) * edge);
    passing.rests = shared_out ? take((slots + 1) * edge) : nullptr;
    const bool sums_elsewhere = shape.state > BackwardShared::kMostStateWithSums;
    passing.norm_sums = sums_elsewhere ? take(blocks * static_cast<std::size_t>(kStrips * kFusedHidden)) : nullptr;
    passing.products = take(blocks * 2 * static_cast<std::size_t>(kHalves * kRows * shape.state));
  }
};

}  // namespace

std::size_t fused_backward_workspace(const ScanShape& shape, std::int64_t rows, bool shared_out) {
  std::size_t bytes = 0;
  BackwardMemory(shape, rows, shared_out, [&](std::size_t count) -> float* {
    bytes += ScratchAllocator::aligned_bytes<float>(count);
    return nullptr;
  });
  return bytes;
}

void fused_backward(const Launch& launch, bf16* dzxbcdt, const WeightGradients& gradients, const bf16* dout, const Sizes& s,
                    const Inputs<bf16>& in, const ScanShape& shape, bool shared_out) {
  ScratchAllocator scratch(launch);
  const BackwardMemory memory(shape, s.rows, shared_out, [&](std::size_t count) { return scratch.take<float>(count); });
  const Passing& passing = memory.passing;
  const Grid grid{.x = fused_blocks(s.rows), .threads = kFusedThreads, .shared_bytes = BackwardShared::bytes(s)};
  dispatch_fused(s, [&]<int kState, int kGroups>() {
    if (shared_out) {
      long_states(launch, s, in, passing.states, memory.kept);
      launch_kernel("chunk_scan_backward: gradients", chunk_scan_gradients_kernel<kState, kGroups>, launch, grid, s, in, dout,
                    passing.states, passing.gradients);
      pass_gradients(launch, s, in, passing.gradients, memory.kept);
    }
    launch_kernel("chunk_scan_backward", chunk_scan_backward_kernel<kState, kGroups>, launch, grid, s, in, dout, dzxbcdt,
                  memory.partials, passing);
    if (shared_out) {
      join_edges(launch, s, in, passing.rests, passing.edges, dzxbcdt);
    }
  });
  add_partials(launch, gradients, s, memory.partials, static_cast<std::int64_t>(grid.x));
}

}  // namespace attamba::kernels::cuda::scan
