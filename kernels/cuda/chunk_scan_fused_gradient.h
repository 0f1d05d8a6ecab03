// What the backward kernels make of a tile.
//
// Pairs of rows are worked on transposed, a warp having 16 rows s and all later blocks of rows t: with dM = dY X^T,
//   dX = M^T dY + exit delta (dS' B),  d(C B^T) = sum_h dM o L,  and with P = dM o M, M rounded as it was in Y = M X,
//   sum_s P[t, s] + entry_t dY_t^T S C_t = dY_t . (Y_t - D X_t),
// so the terms of dl (kernels/cpu/chunk_scan_backward.cpp) need sums over t only, and cancel as they should.
#pragma once

#include "kernels/cuda/chunk_scan_fused_convolve.h"
#include "kernels/cuda/chunk_scan_fused_pairs.h"

namespace attamba::kernels::cuda::scan {

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
  template <class F>
  static constexpr int kParts = F::kSliced && !F::kOwnGroups ? 3 : 2;
  enum Part { from_exit, from_entry, slices };

  ATTAMBA_DEVICE bool shared_out() const { return rests != nullptr; }
  template <class F>
  ATTAMBA_DEVICE float* own_norm_sums(const SliceSizes<F>& s) const {
    return norm_sums == nullptr ? nullptr : norm_sums + std::int64_t{block_x()} * (F::kStrips * s.all.hidden);
  }
  template <class F>
  ATTAMBA_DEVICE float* own_products(Part part) const {
    constexpr int kProducts = kHalves * F::kRows * F::kState;
    return products + (std::int64_t{block_x()} * kParts<F> + part) * kProducts;
  }
};

/// acc [16, N] of the warp's strip, a group's dB (half 0) or dC (half 1), from the scores' gradients of the group's halves.
template <class F>
ATTAMBA_DEVICE void score_products(const SliceSizes<F>& s, const BackwardShared<F>& shared, const WarpPlace<F>& place,
                                   int strips, int group, float (&acc)[F::kState / 8][4]) {
  const Shared<F>& in = shared.inputs;
  const bool is_c = place.half == 1;
  for (int other = 0; other < strips; ++other) {
    const int from = is_c ? other : place.strip, block = is_c ? place.strip : other;
    if (from > block ||
        (!F::kByLabel && from < block && load(in.starts + block * kStripRows) > from * kStripRows + kStripRows - 1)) {
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

/// Sum from the lane's row on over the rows of its chunk or, by labels, of the tile, of which all decay: rows of 32, `first`
/// the first one.
template <class F>
ATTAMBA_DEVICE float chunk_suffix(float value, const Shared<F>& shared, int first, int lane) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const float later = shuffle_down(value, step);
    const int row = first + lane + step;
    const bool inside = lane + step < kWarp && row < F::kRows;
    value += inside && (F::kByLabel || load(shared.starts + (row < F::kRows ? row : 0)) <= first + lane) ? later : 0.0f;
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
        later[part] += F::kByLabel || load(shared.inputs.starts + next) <= t ? rest : 0.0f;
      }
      if (t < tile.rows) {
        const float dlog = later[part] + (F::kByLabel || t >= leaving ? whole : 0.0f);
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
  int leaving;    ///< as of leaving_chunk or leaving_label
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
      if (!s.ends_group()) {
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
  const bool works = WarpPlace<F>().strip < strips, leaves = leaving < F::kRows, enters = inputs.enters();
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
                       return inputs.leaves(t, leaving) ? exp2_fast(to_end) * load(inputs.delta + head * F::kRows + t) : 0.0f;
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
  if constexpr (F::kSliced && !F::kOwnGroups) {
    static_assert(F::kGroups == 1);
    if (works) {
      add_slices(s, place, passing.own_products<F>(Passing::slices), group[0]);
    }
  }
  const int channels = s.ends_group() ? s.channels : s.hidden;
  sync_block();  // B and C are read
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (works && i < s.groups && s.ends_group()) {
      write_group(shared, place, place.half == 1 ? s.c_column(i) : s.b_column(i), group[i]);
    }
  }
  sync_block();
  auto* taps = shared.taps();
  const int edge = kEdge * s.all.channels;
  const Edges edges{.next = in_slot(passing.edges, slot + 1, edge),
                    .own = in_slot(passing.edges, slot, edge),
                    .rest = passing.shared_out() ? in_slot(passing.rests, slot + 1, edge) : nullptr};
  for (int part = 0; part < F::kTapParts; ++part) {
    const int count = channels / F::kTapParts, begin = part * count;
    convolve_backward(s, in, tile, shared, leaving, begin, count, edges, taps, dzxbcdt);
    sync_block();
    sum_taps(s, strips, begin, count, taps, partial, step.add_taps);
    sync_block();
  }
}

/// All slices of a tile: its dout, inputs and steps, the norm's sums, then body() of each slice whose rows are loaded.
template <class F, class Body>
ATTAMBA_DEVICE void for_slices(SliceSizes<F>& s, const Inputs<bf16>& in, const BackwardShared<F>& shared, const Tile& tile,
                               const bf16* dout, const float* states, const Body& body) {
  if constexpr (F::kSliced) {
    for (s.slice = 0; s.column() < s.all.hidden; ++s.slice) {
      load_tile<F>(s, in, shared, tile, dout, s.new_channels());
      const bool works = WarpPlace<F>().strip < strip_count(tile.rows);
      gate_backward<Gate::sums>(s, in, tile, shared, WarpPlace<F>(), works, states + s.slice * F::kSliceState, nullptr);
      sync_block();
    }
    for (s.slice = 0; s.column() < s.all.hidden; ++s.slice) {
      load_tile<F>(s, in, shared, tile, dout, F::kOwnGroups ? s.channels : s.hidden);
      body();
    }
  } else {
    load_tile<F>(s, in, shared, tile, dout, s.channels);
    body();
  }
}

template <class F>
ATTAMBA_DEVICE void tile_gradient(SliceSizes<F> s, const Inputs<bf16>& in, const BackwardShared<F>& shared,
                                  const Passing& passing, const Step& step, const bf16* dout, bf16* dzxbcdt, float* partial) {
  const float* states = in_slot(passing.states, F::slot_of(step.tile.begin), s.all.state_size());
  for_slices(s, in, shared, step.tile, dout, states,
             [&] { slice_gradient<F>(s, in, shared, passing, step, dzxbcdt, partial); });
}

/// What a tile adds to the gradient of the state at its entry.
template <class F>
ATTAMBA_DEVICE void tile_entry_gradient(SliceSizes<F> s, const Inputs<bf16>& in, const BackwardShared<F>& shared,
                                        const Tile& tile, const bf16* dout, const float* states, float* gradients) {
  const int strips = strip_count(tile.rows);
  for_slices(s, in, shared, tile, dout, states, [&] {
    gate_backward<F::kSliced ? Gate::gradients : Gate::whole>(
        s, in, tile, shared, WarpPlace<F>(), WarpPlace<F>().strip < strips, states + s.slice * F::kSliceState, nullptr);
    sync_block();
    entry_gradient(s, shared, strips, nullptr, gradients + s.slice * F::kSliceState);
    sync_block();
  });
}

/// At the beginning: of the norm and the heads.
template <class F>
ATTAMBA_DEVICE void clear_sums(const SliceSizes<F>& s, const BackwardShared<F>& shared) {
  for (int i = own_thread(); i < 3 * s.all.heads; i += F::kThreads) {
    store(shared.head_sums + i, 0.0f);
  }
  for (int i = own_thread(); i < F::kStrips * s.all.hidden; i += F::kThreads) {
    store(shared.norm_sums + i, 0.0f);
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

/// Pieces of workspace, from `take(elements)`.
template <class F>
struct BackwardMemory {
  float *partials, *kept;
  Passing passing;

  template <class Take>
  BackwardMemory(const Sizes& s, bool shared_out, const Take& take) {
    const auto blocks = static_cast<std::size_t>(F::blocks(s.rows)), slots = F::slots(s.rows);
    const auto state = static_cast<std::size_t>(s.state_size()), edge = static_cast<std::size_t>(kEdge * s.channels);
    partials = take(blocks * static_cast<std::size_t>(s.partial_size()));
    kept = shared_out ? take(slots * static_cast<std::size_t>(s.heads)) : nullptr;
    passing.states = take(slots * state);
    passing.gradients = take((slots + 1) * state);
    passing.edges = take((slots + 1) * edge);
    passing.rests = shared_out ? take((slots + 1) * edge) : nullptr;
    passing.norm_sums =
        BackwardShared<F>::keeps_sums() ? nullptr : take(blocks * static_cast<std::size_t>(F::kStrips * s.hidden));
    passing.products = take(blocks * static_cast<std::size_t>(Passing::kParts<F> * kHalves * F::kRows * F::kState));
  }
};

}  // namespace attamba::kernels::cuda::scan
