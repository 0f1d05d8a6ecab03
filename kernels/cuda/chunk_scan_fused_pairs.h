// The backward kernel's work on pairs of rows, and on states that pass from tile to tile: dX, and tiles of the scores'
// gradients.
#pragma once

#include "kernels/cuda/chunk_scan_fused_gate.h"

namespace attamba::kernels::cuda::scan {

using namespace device;

constexpr int kWarpHeads = kHalf / kFusedHead;

template <int kState>
ATTAMBA_DEVICE float* product_piece(float* products, int half, int strip, int n) {
  return products + ((half * kStrips + strip) * (kState / 16) + n) * kStatePiece + lane_index() * 8;
}

// ------------------------------------------------------------------------------------------------ terms of passed states
/// acc [16, 16] += rows [16, kFusedHead] of m times a head's state, columns n 16 .. n 16 + 15. The state's pieces are laid out
/// for sums over N; this one is over E/Hs, so elements are gathered.
template <int kState>
ATTAMBA_DEVICE void multiply_state(float (&acc)[2][4], const bf16* m, int stride, int row, int column, const float* state,
                                   int head, int n) {
  const int g = lane_index() / 4, q = lane_index() % 4;
#pragma unroll
  for (int p = 0; p < kFusedHead / 16; ++p) {
    const float* piece = state + ((head * (kFusedHead / 16) + p) * (kState / 16) + n) * kStatePiece;
    std::uint32_t left[4], right[4];
    load_left(left, m, stride, row, column + p * 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // rows 2q, 2q + 1 (+ 8 for odd i) of column g (+ 8 for i > 1)
      const float* from = piece + (2 * q * 4 + g / 2) * 8 + i / 2 * 4 + i % 2 * 2 + g % 2;
      right[i] = pack_bf16(load(from), load(from + 4 * 8));
    }
    multiply(acc[0], acc[1], left, right);
  }
}

/// The warp's heads' part of dC (entry) or dB (exit): sum_h factor_h o (rows_h S_h), into its products.
template <int kState, class Factor>
ATTAMBA_DEVICE void state_products(const WarpPlace& place, const bf16* m, int stride, const float* state, float* products,
                                   const Factor& factor) {
#pragma unroll 1
  for (int n = 0; n < kState / 16; ++n) {
    float sum[2][4] = {};
#pragma unroll 1
    for (int h = 0; h < kWarpHeads; ++h) {
      const int head = place.first_head<kFusedHead>() + h;
      float acc[2][4] = {};
      multiply_state<kState>(acc, m, stride, place.first_row(), head * kFusedHead, state, head, n);
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
    float* piece = product_piece<kState>(products, place.half, place.strip, n);
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
/// dx = M^T dY of the warp's rows and heads; sums over t for delta and dl, and the scores' gradient tiles.
template <int kState>
ATTAMBA_DEVICE void pair_gradient(const Sizes& s, const BackwardShared& shared, const WarpPlace& place, int strips,
                                  float (&dx)[kWarpHeads][kFusedHead / 8][4]) {
  const Shared& in = shared.inputs;
  const int group = s.groups == 1 ? 0 : place.half, last_row = place.first_row() + kStripRows - 1;
  float ddelta[kWarpHeads][2] = {}, columns[kWarpHeads][2] = {}, trace[kWarpHeads] = {};
  for (int block = place.strip; block < strips; ++block) {
    if (load(in.starts + block * kStripRows) > last_row) {
      break;
    }
    float scores[2][4], dscores[2][4] = {};
    row_products<kState>(scores, in, place.first_row(), s.b_column(group), block * kStripRows, s.c_column(group));
    int start[2][2];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      start[j / 2][j % 2] = load(in.starts + block * kStripRows + j / 2 * 8 + 2 * place.q + j % 2);
    }
#pragma unroll
    for (int h = 0; h < kWarpHeads; ++h) {
      const int head = place.first_head<kFusedHead>() + h;
      const float *decay = in.decay + head * kRows, *delta = in.delta + head * kRows;
      float gradient[2][4] = {}, mixing[2][4];
#pragma unroll
      for (int p = 0; p < kFusedHead; p += 16) {
        std::uint32_t left[4], right[4];
        load_left(left, in.active, in.stride, place.first_row(), head * kFusedHead + p);
        load_right_transposed(right, shared.dy, kHiddenStride, block * kStripRows, head * kFusedHead + p);
        multiply(gradient[0], gradient[1], left, right);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int from = place.row(i);
        const float decay_from = load(decay + from), delta_from = load(delta + from);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int t = block * kStripRows + j / 2 * 8 + 2 * place.q + j % 2, e = 2 * i + j % 2;
          const bool pair = from <= t && from >= start[j / 2][j % 2];
          const float between = pair ? exp2_fast(load(decay + t) - decay_from) : 0.0f;
          const float weighted = gradient[j / 2][e] * between, score = scores[j / 2][e];
          mixing[j / 2][e] = score * between * delta_from;
          dscores[j / 2][e] += weighted * delta_from;
          ddelta[h][i] += weighted * score;
          trace[h] += from == t ? gradient[j / 2][e] : 0.0f;
        }
      }
      std::uint32_t left[4];
      as_left(left, mixing[0], mixing[1]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // left[i]: rows g + 8 (i % 2), columns 0..7 or 8..15
        columns[h][i % 2] +=
            gradient[i / 2][i % 2 * 2] * low_half(left[i]) + gradient[i / 2][i % 2 * 2 + 1] * high_half(left[i]);
      }
#pragma unroll
      for (int p = 0; p < kFusedHead; p += 16) {
        std::uint32_t right[4];
        load_right(right, shared.dy, kHiddenStride, block * kStripRows, head * kFusedHead + p);
        multiply(dx[h][p / 8], dx[h][p / 8 + 1], left, right);
      }
    }
    bf16* tile = shared.score_tile(place.half, place.strip, block);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        store_pair(tile + (place.g + 8 * i) * kScoreStride + j * 8 + 2 * place.q, dscores[j][2 * i], dscores[j][2 * i + 1]);
      }
    }
  }
#pragma unroll
  for (int h = 0; h < kWarpHeads; ++h) {
    const int head = place.first_head<kFusedHead>() + h;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float d = quad_sum(ddelta[h][i]), column = quad_sum(columns[h][i]);
      if (place.q == 0) {
        const int at = head * kRows + place.row(i);
        store(shared.ddelta + at, d);
        store(shared.dlog + at, load(shared.dlog + at) - column);
      }
    }
    const float sum = warp_sum(trace[h]);
    if (lane_index() == 0) {
      store(shared.traces + place.strip * s.heads + head, sum);
      store(shared.terms + place.strip * s.heads + head, 0.0f);
    }
  }
}

/// What the gradient of the state at the tile's end adds to dX, d delta and, as -terms whose sum counts for the whole chunk,
/// dl.
template <int kState>
ATTAMBA_DEVICE void exit_gradient(const Sizes& s, const BackwardShared& shared, const WarpPlace& place, int leaving,
                                  const float* gradient, float (&dx)[kWarpHeads][kFusedHead / 8][4]) {
  const Shared& in = shared.inputs;
#pragma unroll
  for (int h = 0; h < kWarpHeads; ++h) {
    const int head = place.first_head<kFusedHead>() + h, b = s.b_column(s.groups == 1 ? 0 : place.half);
    const float *decay = in.decay + head * kRows, *delta = in.delta + head * kRows;
    float exit[2], dots[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      exit[i] = place.row(i) >= leaving ? exp2_fast(load(decay + kRows - 1) - load(decay + place.row(i))) : 0.0f;
    }
#pragma unroll
    for (int p = 0; p < kFusedHead / 16; ++p) {
      float sum[2][4] = {};
      multiply_pieces<kFusedHead, kState>(sum, in, place.first_row(), b, gradient, head, p);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int column = place.column<kFusedHead>(h) + p * 16 + j * 8;
          const std::uint32_t x = load_pair(in.active + place.row(i) * in.stride + column);
          const float weight = exit[i] * load(delta + place.row(i));
          dots[i] += low_half(x) * sum[j][2 * i] + high_half(x) * sum[j][2 * i + 1];
          dx[h][2 * p + j][2 * i] += weight * sum[j][2 * i];
          dx[h][2 * p + j][2 * i + 1] += weight * sum[j][2 * i + 1];
        }
      }
    }
    float terms = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float dot = exit[i] * quad_sum(dots[i]), term = load(delta + place.row(i)) * dot;
      if (place.q == 0) {
        const int at = head * kRows + place.row(i);
        store(shared.ddelta + at, load(shared.ddelta + at) + dot);
        store(shared.dlog + at, load(shared.dlog + at) - term);
        terms += term;
      }
    }
    terms = warp_sum(terms);
    if (lane_index() == 0) {
      store(shared.terms + place.strip * s.heads + head, terms);
    }
  }
}

/// X's columns of `active` become dX; `dx` lacks the skip.
ATTAMBA_DEVICE void write_dx(const Inputs<bf16>& in, const BackwardShared& shared, const WarpPlace& place,
                             const float (&dx)[kWarpHeads][kFusedHead / 8][4]) {
#pragma unroll
  for (int h = 0; h < kWarpHeads; ++h) {
    const float skip = load(in.d_skip + place.first_head<kFusedHead>() + h);
#pragma unroll
    for (int tile = 0; tile < kFusedHead / 8; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = place.column<kFusedHead>(h) + tile * 8;
        const std::uint32_t dy = load_pair(shared.dy + place.row(i) * kHiddenStride + column);
        store_pair(shared.inputs.active + place.row(i) * shared.inputs.stride + column,
                   dx[h][tile][2 * i] + skip * low_half(dy), dx[h][tile][2 * i + 1] + skip * high_half(dy));
      }
    }
  }
}

}  // namespace attamba::kernels::cuda::scan
