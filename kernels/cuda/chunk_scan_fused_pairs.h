// The backward kernel's work on pairs of rows, and on states that pass from tile to tile: dX, and tiles of the scores'
// gradients.
#pragma once

#include "kernels/cuda/chunk_scan_fused_gate.h"

namespace attamba::kernels::cuda::scan {

using namespace device;

template <class F>
ATTAMBA_DEVICE float* product_piece(float* products, const WarpPlace<F>& place, int half, int n) {
  return products + ((half * F::kStrips + place.strip) * (F::kState / 16) + n) * kStatePiece + place.lane * 8;
}

// ------------------------------------------------------------------------------------------------ terms of passed states
/// acc [16, 16] += rows [16, kUnit] of m times a unit's state, columns n 16 .. n 16 + 15. The state's pieces are laid out
/// for sums over N; this one is over the unit, so elements are gathered.
template <class F>
ATTAMBA_DEVICE void multiply_state(float (&acc)[2][4], const WarpPlace<F>& place, const bf16* m, int stride, const float* state,
                                   int unit, int n) {
#pragma unroll
  for (int p = 0; p < kUnit / 16; ++p) {
    const float* piece = state_piece<F>(state, unit, p, n, 0);
    std::uint32_t left[4], right[4];
    load_left(left, m, stride, place.first_row(), unit * kUnit + p * 16, place.lane);
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // rows 2q, 2q + 1 (+ 8 for odd i) of column g (+ 8 for i > 1)
      const float* from = piece + (2 * place.q * 4 + place.g / 2) * 8 + i / 2 * 4 + i % 2 * 2 + place.g % 2;
      right[i] = pack_bf16(load(from), load(from + 4 * 8));
    }
    multiply(acc[0], acc[1], left, right);
  }
}

/// The warp's units' part of dC (entry) or dB (exit): the sum of factor o (rows S), factor(head, t), into its products.
template <class F, class Factor>
ATTAMBA_DEVICE void state_products(const SliceSizes<F>& s, const WarpPlace<F>& place, const bf16* m, int stride,
                                   const float* state, float* products, const Factor& factor) {
#pragma unroll 1
  for (int n = 0; n < F::kState / 16; ++n) {
    float sum[2][4] = {};
#pragma unroll 1
    for (int own = 0; own < F::kWarpUnits; ++own) {
      const int unit = place.unit(own), head = unit / s.units;
      float acc[2][4] = {};
      multiply_state(acc, place, m, stride, state, unit, n);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float f = factor(head, place.row(i));
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          sum[0][2 * i + e] += f * acc[0][2 * i + e];
          sum[1][2 * i + e] += f * acc[1][2 * i + e];
        }
      }
    }
    float* piece = product_piece<F>(products, place, place.half, n);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Pack<float> pack;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        pack.value[e] = sum[i][e];
      }
      pack.write(piece + 4 * i);
    }
  }
}

// ------------------------------------------------------------------------------------------------ pairs of rows
/// What one unit's work on its pairs sums up, of the lane's rows s.
struct PairSums {
  float ddelta[2] = {}, columns[2] = {};  ///< sum over t of dM o L o scores; of P
  float trace = 0;                        ///< of dM, over the lane's elements
};

/// dx [16, kUnit] += M^T dY of one unit, the warp's rows s and the rows t of `block`; dscores += dM o L.
template <class F>
ATTAMBA_DEVICE void pair_block(const SliceSizes<F>& s, const BackwardShared<F>& shared, const WarpPlace<F>& place, int unit,
                               int block, const float (&scores)[2][4], float (&dscores)[2][4], float (&dx)[kUnit / 8][4],
                               PairSums& sums) {
  const Shared<F>& in = shared.inputs;
  const int head = unit / s.units;
  const float *decay = in.decay + head * F::kRows, *delta = in.delta + head * F::kRows;
  float gradient[2][4] = {}, mixing[2][4];
#pragma unroll
  for (int p = 0; p < kUnit; p += 16) {
    std::uint32_t left[4], right[4];
    load_left(left, in.active, in.stride, place.first_row(), unit * kUnit + p, place.lane);
    load_right_transposed(right, shared.dy, F::kSliceStride, block * kStripRows, unit * kUnit + p, place.lane);
    multiply(gradient[0], gradient[1], left, right);
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int t = block * kStripRows + j / 2 * 8 + 2 * place.q + j % 2, start = load(in.starts + t);
    const float decay_to = load(decay + t);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int from = place.row(i), e = 2 * i + j % 2;
      const float between = from <= t && in.mixes(start, from) ? exp2_fast(decay_to - load(decay + from)) : 0.0f;
      const float weighted = gradient[j / 2][e] * between, weight = between * load(delta + from);
      mixing[j / 2][e] = scores[j / 2][e] * weight;
      dscores[j / 2][e] += gradient[j / 2][e] * weight;
      sums.ddelta[i] += weighted * scores[j / 2][e];
      sums.trace += from == t ? gradient[j / 2][e] : 0.0f;
    }
  }
  std::uint32_t left[4];
  as_left(left, mixing[0], mixing[1]);
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // left[i]: rows g + 8 (i % 2), columns 0..7 or 8..15
    sums.columns[i % 2] += gradient[i / 2][i % 2 * 2] * low_half(left[i]) + gradient[i / 2][i % 2 * 2 + 1] * high_half(left[i]);
  }
#pragma unroll
  for (int p = 0; p < kUnit; p += 16) {
    std::uint32_t right[4];
    load_right(right, shared.dy, F::kSliceStride, block * kStripRows, unit * kUnit + p, place.lane);
    multiply(dx[p / 8], dx[p / 8 + 1], left, right);
  }
}

/// What the gradient of the state at the tile's end adds to a unit's dX, its head's d delta and, as -terms, dl; returns the
/// lane's sum of terms, which counts for the whole chunk.
template <class F>
ATTAMBA_DEVICE float exit_gradient(const SliceSizes<F>& s, const BackwardShared<F>& shared, const WarpPlace<F>& place, int unit,
                                   int leaving, const float* gradient, float (&dx)[kUnit / 8][4]) {
  const Shared<F>& in = shared.inputs;
  const int head = unit / s.units, b = s.b_column(unit / (F::kUnits / s.groups));
  const float *decay = in.decay + head * F::kRows, *delta = in.delta + head * F::kRows;
  float exit[2], dots[2] = {}, terms = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    exit[i] = in.leaves(place.row(i), leaving) ? exp2_fast(load(decay + F::kRows - 1) - load(decay + place.row(i))) : 0.0f;
  }
  float sum[kUnit / 8][4] = {};
  multiply_pieces(sum, in, place, b, gradient, unit);
#pragma unroll
  for (int tile = 0; tile < kUnit / 8; ++tile) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = unit * kUnit + tile * 8 + 2 * place.q;
      const std::uint32_t x = load_pair(in.active + place.row(i) * in.stride + column);
      const float weight = exit[i] * load(delta + place.row(i));
      dots[i] += low_half(x) * sum[tile][2 * i] + high_half(x) * sum[tile][2 * i + 1];
      dx[tile][2 * i] += weight * sum[tile][2 * i];
      dx[tile][2 * i + 1] += weight * sum[tile][2 * i + 1];
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float dot = exit[i] * quad_sum(dots[i]), term = load(delta + place.row(i)) * dot;
    if (place.q == 0) {
      const int at = head * F::kRows + place.row(i);
      store(shared.ddelta + at, load(shared.ddelta + at) + dot);
      store(shared.dlog + at, load(shared.dlog + at) - term);
      terms += term;
    }
  }
  return terms;
}

/// X's columns of a unit and the warp's rows become dX, which no other warp reads before; `dx` lacks the skip.
template <class F>
ATTAMBA_DEVICE void write_dx(const BackwardShared<F>& shared, const WarpPlace<F>& place, int unit, float skip,
                             const float (&dx)[kUnit / 8][4]) {
  sync_warp();  // the warp has read X
#pragma unroll
  for (int tile = 0; tile < kUnit / 8; ++tile) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = unit * kUnit + tile * 8 + 2 * place.q;
      const std::uint32_t dy = load_pair(shared.dy + place.row(i) * F::kSliceStride + column);
      store_pair(shared.inputs.active + place.row(i) * shared.inputs.stride + column, dx[tile][2 * i] + skip * low_half(dy),
                 dx[tile][2 * i + 1] + skip * high_half(dy));
    }
  }
}

/// The warp's rows and units: dX in place of X, sums over t for delta and dl, tiles of the scores' gradient. `exit` is the
/// gradient of the state at the tile's end where a chunk leaves the tile.
template <class F>
ATTAMBA_DEVICE void pair_gradient(const SliceSizes<F>& s, const Inputs<bf16>& in, const BackwardShared<F>& shared,
                                  const WarpPlace<F>& place, int strips, int leaving, const float* exit) {
  const int group = s.groups == 1 ? 0 : place.half, last_row = place.first_row() + kStripRows - 1;
  int blocks = 1;  // of rows t that may mix with rows s
  while (place.strip + blocks < strips &&
         (F::kByLabel || load(shared.inputs.starts + (place.strip + blocks) * kStripRows) <= last_row)) {
    ++blocks;
  }
  float scores[F::kStrips][2][4] = {}, dscores[F::kStrips][2][4] = {};
#pragma unroll
  for (int b = 0; b < F::kStrips; ++b) {
    if (b < blocks) {
      row_products(scores[b], shared.inputs, place.first_row(), s.b_column(group), (place.strip + b) * kStripRows,
                   s.c_column(group), place.lane);
    }
  }
#pragma unroll 1
  for (int own = 0; own < F::kWarpUnits; ++own) {
    const int unit = place.unit(own), head = unit / s.units;
    const bool adds = unit % s.units != 0;  // to what the head's units before have stored
    const auto store_sum = [&](float* to, float value) { store(to, adds ? load(to) + value : value); };
    float dx[kUnit / 8][4] = {};
    PairSums sums;
#pragma unroll
    for (int b = 0; b < F::kStrips; ++b) {
      if (b < blocks) {
        pair_block(s, shared, place, unit, place.strip + b, scores[b], dscores[b], dx, sums);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float ddelta = quad_sum(sums.ddelta[i]), column = quad_sum(sums.columns[i]);
      if (place.q == 0) {
        const int at = head * F::kRows + place.row(i);
        store_sum(shared.ddelta + at, ddelta);
        store(shared.dlog + at, load(shared.dlog + at) - column);
      }
    }
    float terms = 0;
    if (leaving < F::kRows) {
      terms = exit_gradient(s, shared, place, unit, leaving, exit, dx);
    }
    terms = warp_sum(terms);
    const float trace = warp_sum(sums.trace);
    if (place.lane == 0) {
      store_sum(shared.traces + place.strip * s.heads + head, trace);
      store_sum(shared.terms + place.strip * s.heads + head, terms);
    }
    write_dx(shared, place, unit, load(in.d_skip + s.head_of(head)), dx);
  }
#pragma unroll
  for (int b = 0; b < F::kStrips; ++b) {
    if (b < blocks) {
      bf16* tile = shared.score_tile(place.half, place.strip, place.strip + b) + place.g * kScoreStride + 2 * place.q;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          store_pair(tile + 8 * i * kScoreStride + j * 8, dscores[b][j][2 * i], dscores[b][j][2 * i + 1]);
        }
      }
    }
  }
}

}  // namespace attamba::kernels::cuda::scan
