// Y = M X + entry o (C S) on tensor cores, the part that both fused kernels do for every tile, and how states pass through a
// tile.
#pragma once

#include "kernels/cuda/chunk_scan_fused_tile.h"

namespace attamba::kernels::cuda::scan {

/// Over the four lanes that share rows.
ATTAMBA_DEVICE float quad_sum(float value) {
  value += device::shuffle_xor(value, 1);
  return value + device::shuffle_xor(value, 2);
}

/// A warp's strip of rows and half of the columns, and its lane's place in fragments. Made anew for each part of a tile's work:
/// addresses that follow from it would otherwise be kept from part to part, in more registers than there are.
template <class F>
struct WarpPlace {
  int strip, half, lane, g, q;

  ATTAMBA_DEVICE WarpPlace() {
    const int thread = own_thread(), warp = thread / device::kWarp;
    strip = warp / kHalves;
    half = warp % kHalves;
    lane = thread % device::kWarp;
    g = lane / 4;
    q = lane % 4;
  }
  ATTAMBA_DEVICE int first_row() const { return strip * kStripRows; }
  ATTAMBA_DEVICE int row(int i) const { return strip * kStripRows + g + 8 * i; }
  /// Of the slice, the warp's unit `own`.
  ATTAMBA_DEVICE int unit(int own) const { return half * F::kWarpUnits + own; }
  /// The lane's first column of it.
  ATTAMBA_DEVICE int column(int own) const { return unit(own) * kUnit + 2 * q; }
};

/// acc [16, 16] = rows of a and of b times each other, over kState columns from a_column and b_column of `active`.
template <class F>
ATTAMBA_DEVICE void row_products(float (&acc)[2][4], const Shared<F>& shared, int a_row, int a_column, int b_row, int b_column,
                                 int lane) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    acc[0][i] = acc[1][i] = 0;
  }
#pragma unroll
  for (int n = 0; n < F::kState; n += 16) {
    std::uint32_t left[4], right[4];
    load_left(left, shared.active, shared.stride, a_row, a_column + n, lane);
    load_right_transposed(right, shared.active, shared.stride, b_row, b_column + n, lane);
    multiply(acc[0], acc[1], left, right);
  }
}

/// acc [16, kUnit] += M X of a unit's columns, rows of the warp's strip and those of `block`, 16 each; scores [16, 16].
template <class F>
ATTAMBA_DEVICE void mix_block(const SliceSizes<F>& s, float (&acc)[kUnit / 8][4], const float (&scores)[2][4],
                              const Shared<F>& shared, const WarpPlace<F>& place, int block, int unit, const int (&start)[2]) {
  const int head = unit / s.units;
  const float *decay = shared.decay + head * F::kRows, *delta = shared.delta + head * F::kRows;
  const float at[2] = {device::load(decay + place.row(0)), device::load(decay + place.row(1))};
  float mixing[2][4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int from = block * kStripRows + j / 2 * 8 + 2 * place.q + j % 2;
    const float decay_from = device::load(decay + from), delta_from = device::load(delta + from);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float weight = device::exp2_fast(at[i] - decay_from) * delta_from;
      const int e = 2 * i + j % 2;
      mixing[j / 2][e] = from <= place.row(i) && shared.mixes(start[i], from) ? scores[j / 2][e] * weight : 0.0f;
    }
  }
  std::uint32_t left[4];
  as_left(left, mixing[0], mixing[1]);
#pragma unroll
  for (int p = 0; p < kUnit; p += 16) {
    std::uint32_t right[4];
    load_right(right, shared.active, shared.stride, block * kStripRows, unit * kUnit + p, place.lane);
    multiply(acc[p / 8], acc[p / 8 + 1], left, right);
  }
}

/// acc [16, kUnit] += the strip's rows [16, N] of `active`, from `column` on, times a unit's S^T, in pieces.
template <class F>
ATTAMBA_DEVICE void multiply_pieces(float (&acc)[kUnit / 8][4], const Shared<F>& shared, const WarpPlace<F>& place, int column,
                                    const float* state, int unit) {
#pragma unroll 1  // all pieces at once do not fit the registers
  for (int n = 0; n < F::kState / 16; ++n) {
    std::uint32_t left[4];
    load_left(left, shared.active, shared.stride, place.first_row(), column + n * 16, place.lane);
#pragma unroll
    for (int p = 0; p < kUnit / 16; ++p) {
      const float* piece = state_piece<F>(state, unit, p, n, place.lane);
      const auto low = device::Pack<float>::read(piece), high = device::Pack<float>::read(piece + 4);
      const std::uint32_t right[4] = {
          device::pack_bf16(low.value[0], low.value[1]), device::pack_bf16(high.value[0], high.value[1]),
          device::pack_bf16(low.value[2], low.value[3]), device::pack_bf16(high.value[2], high.value[3])};
      multiply(acc[2 * p], acc[2 * p + 1], left, right);
    }
  }
}

/// acc += entry o (C S).
template <class F>
ATTAMBA_DEVICE void add_entry(const SliceSizes<F>& s, float (&acc)[kUnit / 8][4], const Shared<F>& shared,
                              const WarpPlace<F>& place, int unit, int c, const float* state, const int (&start)[2]) {
  const float* decay = shared.decay + unit / s.units * F::kRows;
  float entry[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    entry[i] = start[i] < 0 ? device::exp2_fast(device::load(decay + place.row(i))) : 0.0f;
  }
  float sum[kUnit / 8][4] = {};
  multiply_pieces(sum, shared, place, c, state, unit);
#pragma unroll
  for (int tile = 0; tile < kUnit / 8; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      acc[tile][i] += entry[i / 2] * sum[tile][i];
    }
  }
}

/// y, zero before, of the warp's strip and units, without the skip.
template <class F>
ATTAMBA_DEVICE void mix(const SliceSizes<F>& s, const Shared<F>& shared, const WarpPlace<F>& place, const float* state,
                        float (&y)[F::kWarpUnits][kUnit / 8][4]) {
  const int per_group = F::kUnits / s.groups;
  const int start[2] = {device::load(shared.starts + place.row(0)), device::load(shared.starts + place.row(1))};
  const int earliest = F::kByLabel ? 0 : device::load(shared.starts + place.first_row());
  for (int block = earliest > 0 ? earliest / kStripRows : 0; block <= place.strip; ++block) {
    float scores[2][4];
#pragma unroll
    for (int own = 0; own < F::kWarpUnits; ++own) {
      const int unit = place.unit(own);
      if (own == 0 || unit % per_group == 0) {
        const int group = unit / per_group;
        row_products(scores, shared, place.first_row(), s.c_column(group), block * kStripRows, s.b_column(group), place.lane);
      }
      mix_block(s, y[own], scores, shared, place, block, unit, start);
    }
  }
  if (F::kByLabel ? shared.enters() : earliest < 0) {
#pragma unroll
    for (int own = 0; own < F::kWarpUnits; ++own) {
      const int unit = place.unit(own);
      add_entry(s, y[own], shared, place, unit, s.c_column(unit / per_group), state, start);
    }
  }
}

/// A state in pieces, to = decay o before + sum_t m_t (x) weight_t v_t, over the rows of the tile's strips: m [kRows, slice] in
/// shared memory, v B or C, weight(head, t). Without `before` the sum alone, with it the decay is the whole tile's.
template <class F, class Weight>
ATTAMBA_DEVICE void pass_outer_products(const SliceSizes<F>& s, const bf16* m, int stride, const Shared<F>& shared, bool with_c,
                                        int strips, const float* before, float* to, const Weight& weight) {
  constexpr int kBlocks = F::kSlice / 16;
  const int thread = own_thread(), lane = thread % device::kWarp;
  for (int block = thread / device::kWarp; block < kBlocks; block += F::kWarps) {
    const int unit = block / (kUnit / 16), rows16 = block % (kUnit / 16), head = unit / s.units;
    const int group = unit / (F::kUnits / s.groups);
    const float kept = device::exp2_fast(device::load(shared.decay + head * F::kRows + F::kRows - 1));
#pragma unroll 1
    for (int n = 0; n < F::kState / 16; ++n) {
      float acc[2][4] = {};
      add_outer_products(acc[0], acc[1], m, stride, block * 16, shared,
                         (with_c ? s.c_column(group) : s.b_column(group)) + n * 16, strips, lane,
                         [&](int t) { return weight(head, t); });
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        device::Pack<float> pack;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          pack.value[e] = acc[i][e];
        }
        if (before != nullptr) {
          const auto old = device::Pack<float>::read(state_piece<F>(before, unit, rows16, n, lane) + 4 * i);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            pack.value[e] += kept * old.value[e];
          }
        }
        pack.write(state_piece<F>(to, unit, rows16, n, lane) + 4 * i);
      }
    }
  }
}

/// From the state at the entry of a full tile, which the rows with start `leaving` leave, to that at its end.
template <class F>
ATTAMBA_DEVICE void pass_state(const SliceSizes<F>& s, const Shared<F>& shared, int leaving, const float* entry, float* exit) {
  pass_outer_products(
      s, shared.active, shared.stride, shared, false, F::kStrips, leaving < 0 ? entry : nullptr, exit, [&](int head, int t) {
        const float* decay = shared.decay + head * F::kRows;
        const float to_end = device::load(decay + F::kRows - 1) - device::load(decay + t);
        return shared.leaves(t, leaving) ? device::exp2_fast(to_end) * device::load(shared.delta + head * F::kRows + t) : 0.0f;
      });
}

/// What the tile adds to the state at its end, of the rows with start `leaving`, into the next tile's slot, and how much of the
/// state at its entry is left there. The tile's starts are there.
template <class F>
ATTAMBA_DEVICE void add_tile_state(SliceSizes<F>& s, const Inputs<bf16>& in, const Shared<F>& shared, const Tile& tile,
                                   int leaving, float* states, float* kept) {
  const int slot = F::slot_of(tile.begin) + 1;
  for_loaded_slices(s, in, tile, shared, [&] {
    pass_state(s, shared, leaving, nullptr, in_slot(states, slot, s.all.state_size()) + s.slice * F::kSliceState);
    for (int head = device::thread_index(); head < s.heads; head += F::kThreads) {
      const float whole = leaving < 0 ? device::exp2_fast(device::load(shared.decay + head * F::kRows + F::kRows - 1)) : 0.0f;
      device::store(kept + slot * s.all.heads + s.head_of(head), whole);
    }
  });
}

}  // namespace attamba::kernels::cuda::scan
