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
  /// [blocks, Part, halves, kStrips, N / 16] pieces of dB and dC. Of `from_exit` and `from_entry` a half has its heads' sums;
  /// of `slices`, where there may be several, half 0 has dB and half 1 dC of those before.
  float* products;
  enum Part { from_exit, from_entry, slices };

  ATTAMBA_DEVICE bool shared_out() const { return rests != nullptr; }
  template <class F>
  ATTAMBA_DEVICE float* own_norm_sums(const SliceSizes<F>& s) const {
    return norm_sums == nullptr ? nullptr : norm_sums + std::int64_t{block_x()} * (F::kStrips * s.all.hidden);
  }
  ATTAMBA_HOST_DEVICE static constexpr int parts(bool sliced) { return sliced ? 3 : 2; }
  template <class F>
  ATTAMBA_DEVICE float* own_products(Part part) const {
    constexpr int kProducts = kHalves * F::kRows * F::kState;
    return products + (std::int64_t{block_x()} * parts(F::kSliced) + part) * kProducts;
  }
};
ATTAMBA_DEVICE float* in_slot(float* values, int slot, int size) {
  return values + static_cast<std::int64_t>(slot) * size;
}

/// acc [16, N] of the warp's strip, a group's dB (half 0) or dC (half 1), from the scores' gradients of the group's halves.
template <class F>
ATTAMBA_DEVICE void score_products(const SliceSizes<F>& s, const BackwardShared<F>& shared, const WarpPlace<F>& place,
                                   int strips, int group, float (&acc)[F::kState / 8][4]) {
  const Shared<F>& in = shared.inputs;
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
      for (int n = 0; n < F::kState; n += 16) {
        std::uint32_t right[4];
        load_right(right, in.active, in.stride, other * kStripRows, column + n, place.lane);
        multiply(acc[n / 8], acc[n / 8 + 1], left, right);
      }
    }
  }
}

template <class F>
ATTAMBA_DEVICE void add_products(const SliceSizes<F>& s, const WarpPlace<F>& place, int group, float* products,
                                 float (&acc)[F::kState / 8][4]) {
  for (int half = s.groups == 1 ? 0 : group; half < (s.groups == 1 ? kHalves : group + 1); ++half) {
#pragma unroll
    for (int n = 0; n < F::kState / 16; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const auto pack = Pack<float>::read(product_piece<F>(products, place, half, n) + 4 * i);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          acc[2 * n + i][e] += pack.value[e];
        }
      }
    }
  }
}

template <class F>
ATTAMBA_DEVICE void write_group(const BackwardShared<F>& shared, const WarpPlace<F>& place, int column,
                                const float (&acc)[F::kState / 8][4]) {
#pragma unroll
  for (int n = 0; n < F::kState / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      store_pair(shared.inputs.active + place.row(i) * shared.inputs.stride + column + n * 8 + 2 * place.q, acc[n][2 * i],
                 acc[n][2 * i + 1]);
    }
  }
}

/// Sum over the rows of the lane's row's chunk from the lane's row on; rows of 32, `start` their chunks', `first` the first
/// one.
template <class F>
ATTAMBA_DEVICE float chunk_suffix(float value, const Shared<F>& shared, int first, int lane) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const float later = shuffle_down(value, step);
    const int row = first + lane + step;
    value += lane + step < kWarp && row < F::kRows && load(shared.starts + (row < F::kRows ? row : 0)) <= first + lane ? later
                                                                                                                       : 0.0f;
  }
  return value;
}

/// A warp per head of the slice: ddt, and the head's weights' sums. `state` and `gradient` where one chunk fills the tile.
template <class F>
ATTAMBA_DEVICE void step_gradient(const SliceSizes<F>& s, const Inputs<bf16>& in, const Tile& tile,
                                  const BackwardShared<F>& shared, int leaving, float* state, float* gradient, bf16* dzxbcdt) {
  constexpr int kParts = (F::kRows + kWarp - 1) / kWarp, kPieces = kUnit / 16 * (F::kState / 16);
  const int thread = own_thread(), lane = thread % kWarp;
  for (int head = thread / kWarp; head < s.heads; head += F::kWarps) {
    const float rate = -exp(load(in.a_log + s.head_of(head)));
    float whole = 0;
    if (leaving < F::kRows) {
      for (int strip = 0; strip < F::kStrips; ++strip) {
        whole += load(shared.terms + strip * s.heads + head);
      }
    }
    if (leaving < 0) {
      float sum = 0;
#pragma unroll 1
      for (int piece = 0; piece < kPieces * s.units; ++piece) {
        const float *a = state_piece<F>(state, head * s.units, 0, piece, lane),
                    *b = state_piece<F>(gradient, head * s.units, 0, piece, lane);
        sum += dot(a, 1, b, 1, 8);
      }
      whole += exp2_fast(load(shared.inputs.decay + head * F::kRows + F::kRows - 1)) * warp_sum(sum);
    }
    float later[kParts], rate_sum = 0, bias_sum = 0;
#pragma unroll
    for (int part = kParts - 1; part >= 0; --part) {
      const int t = part * kWarp + lane, next = (part + 1) * kWarp;
      later[part] =
          chunk_suffix(t < tile.rows ? load(shared.dlog + head * F::kRows + t) : 0.0f, shared.inputs, part * kWarp, lane);
      if (part + 1 < kParts) {
        const float rest = shuffle(later[part + 1], 0);
        later[part] += load(shared.inputs.starts + next) <= t ? rest : 0.0f;
      }
      if (t < tile.rows) {
        const float dlog = later[part] + (t >= leaving ? whole : 0.0f);
        const float ddt = (load(shared.ddelta + head * F::kRows + t) + rate * dlog) *
                          sigmoid(input_step(s, in, tile.begin + t, s.all.heads, s.head_of(head)));
        bf16* end = dzxbcdt + static_cast<std::int64_t>(tile.begin + t + 1) * s.projection;
        store(end - s.all.heads + s.head_of(head), to_bf16(ddt));
        rate_sum += load(shared.inputs.delta + head * F::kRows + t) * dlog;
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
      float* sums = shared.head_sums + s.head_of(head);
      store(sums, load(sums) + rate * rate_sum);
      store(sums + s.all.heads, load(sums + s.all.heads) + trace);
      store(sums + 2 * s.all.heads, load(sums + 2 * s.all.heads) + bias_sum);
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
template <class F>
ATTAMBA_DEVICE void entry_gradient(const SliceSizes<F>& s, const BackwardShared<F>& shared, int strips, const float* exit,
                                   float* entry) {
  const Shared<F>& inputs = shared.inputs;
  pass_outer_products(s, shared.dy, F::kSliceStride, inputs, true, strips, exit, entry, [&](int head, int t) {
    return load(inputs.starts + t) < 0 ? exp2_fast(load(inputs.decay + head * F::kRows + t)) : 0.0f;
  });
}

/// Fills dy with the slice's dout, `active` up to `channels`, and the steps; `starts` are there.
template <class F>
ATTAMBA_DEVICE void load_tile(const SliceSizes<F>& s, const Inputs<bf16>& in, const BackwardShared<F>& shared, const Tile& tile,
                              const bf16* dout, int channels) {
  if constexpr (F::kSliced) {
    load_weights(s, in, shared.inputs);
    sync_block();
  }
  fetch_rows<F>(tile, dout + static_cast<std::int64_t>(tile.begin) * s.all.hidden + s.column(), s.all.hidden, shared.dy);
  convolve_tile(s, in, tile, shared.inputs, channels);
  load_steps(s, in, tile, shared.inputs);
  copy_async_wait<0>();
  sync_block();
}

/// dB and dC of the slices before are added to `acc`, and what they come to is kept, unless this is the last slice.
template <class F>
ATTAMBA_DEVICE void add_slices(const SliceSizes<F>& s, const WarpPlace<F>& place, float* products,
                               float (&acc)[F::kState / 8][4]) {
#pragma unroll
  for (int n = 0; n < F::kState / 16; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float* piece = product_piece<F>(products, place, place.half, n) + 4 * i;
      auto pack = s.slice == 0 ? Pack<float>{} : Pack<float>::read(piece);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        acc[2 * n + i][e] += pack.value[e];
        pack.value[e] = acc[2 * n + i][e];
      }
      if (!s.is_last()) {
        pack.write(piece);
      }
    }
  }
}

/// One slice of a tile, which load_tile has loaded.
template <class F>
ATTAMBA_DEVICE void slice_gradient(const SliceSizes<F>& s, const Inputs<bf16>& in, const BackwardShared<F>& shared,
                                   const Passing& passing, const Step& step, bf16* dzxbcdt, float* partial) {
  const Shared<F>& inputs = shared.inputs;
  const Tile& tile = step.tile;
  const int strips = strip_count(tile.rows), leaving = step.leaving, slot = F::slot_of(tile.begin);
  const int own_state = s.slice * F::kSliceState;
  const bool works = WarpPlace<F>().strip < strips, leaves = leaving < F::kRows, enters = load(inputs.starts) < 0;
  float* state = in_slot(passing.states, slot, s.all.state_size()) + own_state;
  float* exit = in_slot(passing.gradients, slot + 1, s.all.state_size()) + own_state;
  gate_backward<F::kSliced ? Gate::gradients : Gate::whole>(s, in, tile, shared, WarpPlace<F>(), works, state, dzxbcdt);
  sync_block();
  if (works) {
    const WarpPlace<F> place;
    if (enters) {
      state_products(s, place, shared.dy, F::kSliceStride, state, passing.own_products<F>(Passing::from_entry),
                     [&](int head, int t) {
                       const float* decay = inputs.decay + head * F::kRows;
                       return load(inputs.starts + t) < 0 ? exp2_fast(load(decay + t)) : 0.0f;
                     });
    }
    if (leaves) {
      state_products(s, place, inputs.active, inputs.stride, exit, passing.own_products<F>(Passing::from_exit),
                     [&](int head, int t) {
                       const float* decay = inputs.decay + head * F::kRows;
                       const float to_end = load(decay + F::kRows - 1) - load(decay + t);
                       return t >= leaving ? exp2_fast(to_end) * load(inputs.delta + head * F::kRows + t) : 0.0f;
                     });
    }
    pair_gradient(s, in, shared, place, strips, leaving, exit);
  }
  sync_block();  // the scores' gradients are there
  if (enters && !passing.shared_out()) {
    entry_gradient(s, shared, strips, leaving < 0 ? exit : nullptr,
                   in_slot(passing.gradients, slot, s.all.state_size()) + own_state);
  }
  step_gradient(s, in, tile, shared, leaving, state, exit, dzxbcdt);
  const WarpPlace<F> place;
  float group[2][F::kState / 8][4] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (works && i < s.groups) {
      score_products(s, shared, place, strips, i, group[i]);
      if (place.half == 1 ? enters : leaves) {
        add_products(s, place, i, passing.own_products<F>(place.half == 1 ? Passing::from_entry : Passing::from_exit),
                     group[i]);
      }
    }
  }
  if constexpr (F::kSliced) {
    static_assert(F::kGroups == 1);
    if (works) {
      add_slices(s, place, passing.own_products<F>(Passing::slices), group[0]);
    }
  }
  const int channels = s.is_last() ? s.channels : s.hidden;
  sync_block();  // B and C are read
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (works && i < s.groups && s.is_last()) {
      write_group(shared, place, place.half == 1 ? s.c_column(i) : s.b_column(i), group[i]);
    }
  }
  sync_block();
  auto* taps = reinterpret_cast<float*>(shared.dy);
  const int edge = kEdge * s.all.channels;
  const Edges edges{.next = in_slot(passing.edges, slot + 1, edge),
                    .own = in_slot(passing.edges, slot, edge),
                    .rest = passing.shared_out() ? in_slot(passing.rests, slot + 1, edge) : nullptr};
  convolve_backward(s, in, tile, shared, leaving, channels, edges, taps, dzxbcdt);
  sync_block();
  sum_taps(s, strips, channels, taps, partial, step.add_taps);
  sync_block();
}

template <class F>
ATTAMBA_DEVICE void tile_gradient(SliceSizes<F> s, const Inputs<bf16>& in, const BackwardShared<F>& shared,
                                  const Passing& passing, const Step& step, const bf16* dout, bf16* dzxbcdt, float* partial) {
  if constexpr (F::kSliced) {
    const float* states = in_slot(passing.states, F::slot_of(step.tile.begin), s.all.state_size());
    for (s.slice = 0; s.column() < s.all.hidden; ++s.slice) {
      load_tile<F>(s, in, shared, step.tile, dout, s.new_channels());
      const bool works = WarpPlace<F>().strip < strip_count(step.tile.rows);
      gate_backward<Gate::sums>(s, in, step.tile, shared, WarpPlace<F>(), works, states + s.slice * F::kSliceState, nullptr);
      sync_block();
    }
    for (s.slice = 0; s.column() < s.all.hidden; ++s.slice) {
      load_tile<F>(s, in, shared, step.tile, dout, s.hidden);
      slice_gradient<F>(s, in, shared, passing, step, dzxbcdt, partial);
    }
  } else {
    load_tile<F>(s, in, shared, step.tile, dout, s.channels);
    slice_gradient<F>(s, in, shared, passing, step, dzxbcdt, partial);
  }
}

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
    for (s.slice = 0; s.column() < s.all.hidden && leaving < F::kRows; ++s.slice) {
      if constexpr (F::kSliced) {
        load_weights(s, in, shared);
        sync_block();
      }
      convolve_tile(s, in, tile, shared, s.new_channels());
      load_steps(s, in, tile, shared);
      sync_block();
      float* entry = in_slot(states, F::slot_of(begin), s.all.state_size()) + s.slice * F::kSliceState;
      pass_state(s, shared, leaving, entry, entry + s.all.state_size());
      if constexpr (F::kSliced) {
        sync_block();
      }
    }
    sync_block();
  }
}

/// At the end: the norm's and the heads' partial gradients.
template <class F>
ATTAMBA_DEVICE void write_partials(const SliceSizes<F>& s, const BackwardShared<F>& shared, float* partial, bool taps_written) {
  sync_block();
  const int taps = s.all.channels * kFusedTaps;
  for (int i = own_thread(); i < s.all.hidden; i += F::kThreads) {
    float sum = 0;
    for (int strip = 0; strip < F::kStrips; ++strip) {
      sum += load(shared.norm_sums + strip * s.all.hidden + i);
    }
    store(partial + taps + i, sum);
  }
  for (int i = own_thread(); i < 3 * s.all.heads; i += F::kThreads) {
    store(partial + taps + s.all.hidden + i, load(shared.head_sums + i));
  }
  for (int i = own_thread(); i < taps && !taps_written; i += F::kThreads) {
    store(partial + i, 0.0f);
  }
}

template <class F>
ATTAMBA_KERNEL(F::kThreads, 2)
chunk_scan_backward_kernel(Sizes given, Inputs<bf16> in, const bf16* dout, bf16* dzxbcdt, float* partials, Passing passing) {
  const SliceSizes<F> s(given);
  const BackwardShared<F> shared(s, SharedMemory(), passing.own_norm_sums(s));
  float* partial = partials + static_cast<std::int64_t>(block_x()) * s.all.partial_size();
  bool taps_written = false;
  if constexpr (!F::kSliced) {
    load_weights(s, in, shared.inputs);
  }
  for (int i = own_thread(); i < 3 * s.all.heads; i += F::kThreads) {
    store(shared.head_sums + i, 0.0f);
  }
  for (int i = own_thread(); i < F::kStrips * s.all.hidden; i += F::kThreads) {
    store(shared.norm_sums + i, 0.0f);
  }
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
ATTAMBA_KERNEL(F::kThreads, 2)
chunk_scan_gradients_kernel(Sizes given, Inputs<bf16> in, const bf16* dout, const float* states, float* gradients) {
  const SliceSizes<F> s(given);
  const BackwardShared<F> shared(s, SharedMemory(), nullptr);
  load_weights(s, in, shared.inputs);
  for (int range = block_x(); range * kRange < s.rows; range += grid_x()) {
    const int begin = shared_tile(s, in, range);
    if (begin < 0) {
      continue;
    }
    const Tile tile = cut_tile(s, in, begin, begin, shared.inputs.starts);
    const int strips = strip_count(tile.rows), slot = F::slot_of(begin);
    sync_block();
    load_tile<F>(s, in, shared, tile, dout, s.channels);
    gate_backward<Gate::whole>(s, in, tile, shared, WarpPlace<F>(), WarpPlace<F>().strip < strips,
                               states + static_cast<std::int64_t>(slot) * F::kSliceState, nullptr);
    sync_block();
    entry_gradient(s, shared, strips, nullptr, in_slot(gradients, slot, F::kSliceState));
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
    const Sizes s = make_sizes(shape, 0);
    partials = take(blocks * static_cast<std::size_t>(s.partial_size()));
    kept = shared_out ? take(slots * static_cast<std::size_t>(shape.heads)) : nullptr;
    passing.states = take(slots * state);
    passing.gradients = take((slots + 1) * state);
    passing.edges = take((slots + 1) * edge);
    passing.rests = shared_out ? take((slots + 1) * edge) : nullptr;
    passing.norm_sums = nullptr;
    dispatch_fused(s, [&]<class F>() {
      if (!BackwardShared<F>::keeps_sums(SliceSizes<F>(s))) {
        passing.norm_sums = take(blocks * static_cast<std::size_t>(F::kStrips * shape.hidden));
      }
      passing.products = take(blocks * static_cast<std::size_t>(Passing::parts(F::kSliced) * kHalves * F::kRows * F::kState));
    });
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
  dispatch_fused(s, [&]<class F>() {
    const Grid grid{
        .x = fused_blocks(s.rows), .threads = F::kThreads, .shared_bytes = BackwardShared<F>::bytes(SliceSizes<F>(s))};
    if constexpr (!F::kSliced) {
      if (shared_out) {
        long_states(launch, s, in, passing.states, memory.kept);
        launch_kernel("chunk_scan_backward: gradients", chunk_scan_gradients_kernel<F>, launch, grid, s, in, dout,
                      passing.states, passing.gradients);
        pass_gradients(launch, s, in, passing.gradients, memory.kept);
      }
    }
    launch_kernel("chunk_scan_backward", chunk_scan_backward_kernel<F>, launch, grid, s, in, dout, dzxbcdt, memory.partials,
                  passing);
  });
  if (shared_out) {
    join_edges(launch, s, in, passing.rests, passing.edges, dzxbcdt);
  }
  add_partials(launch, gradients, s, memory.partials, fused_blocks(s.rows));
}

}  // namespace attamba::kernels::cuda::scan
