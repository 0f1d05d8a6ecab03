// The backward kernel's shared memory, and its way through norm and gate.
#pragma once

#include "kernels/cuda/chunk_scan_fused_mix.h"

namespace attamba::kernels::cuda::scan {

constexpr int kScoreTile = 16, kScoreStride = 24;  ///< rows of a stored tile of scores' gradients, free of bank conflicts

template <class F>
struct BackwardShared {
  static constexpr int kScoreTiles = F::kStrips * (F::kStrips + 1) / 2;

  Shared<F> inputs;
  bf16* dy;               ///< [kRows, kSliceStride]: dout, then dY
  bf16* dscores;          ///< [kHalves, kScoreTiles, kScoreTile, kScoreStride]: sum over the half's heads, [s, t]
  float *dlog, *ddelta;   ///< [Hs, kRows]
  float *traces, *terms;  ///< [kStrips, Hs]: of dM; of what the exit state adds to dl
  float* sums;            ///< [kRows, kHalves, 2]: of u^2 and of u w dout
  float* head_sums;       ///< [3, all heads]: gradients of A_log, D, dt_bias so far
  float* norm_sums;       ///< [kStrips, E]: gradient of the norm so far

  /// With large states, several slices or labels the norm's sums lie in workspace, of which `sums_elsewhere` is the block's:
  /// shared memory of sm_86 is small.
  ATTAMBA_HOST_DEVICE static constexpr bool keeps_sums() { return F::kState <= 32 && !F::kSliced && !F::kByLabel; }

  ATTAMBA_DEVICE BackwardShared(const SliceSizes<F>& s, device::SharedMemory shared, float* sums_elsewhere) {
    inputs.take(s, shared);
    dy = shared.take<bf16>(F::kRows * F::kSliceStride);
    dscores = shared.take<bf16>(kHalves * kScoreTiles * kScoreTile * kScoreStride);
    dlog = shared.take<float>(s.heads * F::kRows);
    ddelta = shared.take<float>(s.heads * F::kRows);
    traces = shared.take<float>(F::kStrips * s.heads);
    terms = shared.take<float>(F::kStrips * s.heads);
    sums = shared.take<float>(F::kRows * kHalves * 2);
    head_sums = shared.take<float>(3 * s.all.heads);
    norm_sums = keeps_sums() ? shared.take<float>(F::kStrips * F::kSlice) : sums_elsewhere;
  }
  static std::size_t bytes(const SliceSizes<F>& s) {
    using device::SharedMemory;
    return Shared<F>::bytes(s) + SharedMemory::bytes_of<bf16>(F::kRows * F::kSliceStride) +
           SharedMemory::bytes_of<bf16>(kHalves * kScoreTiles * kScoreTile * kScoreStride) +
           2 * SharedMemory::bytes_of<float>(s.heads * F::kRows) + 2 * SharedMemory::bytes_of<float>(F::kStrips * s.heads) +
           SharedMemory::bytes_of<float>(F::kRows * kHalves * 2) + SharedMemory::bytes_of<float>(3 * s.all.heads) +
           (keeps_sums() ? SharedMemory::bytes_of<float>(F::kStrips * F::kSlice) : 0);
  }
  /// The taps' gradients [kStrips, kFusedTaps, channels of a part of the slice], when dy and dscores are done with.
  ATTAMBA_DEVICE float* taps() const {
    constexpr int kTaps = F::kStrips * kFusedTaps * (F::kSlice + 2 * F::kGroups * F::kState) / F::kTapParts;
    static_assert(kTaps * sizeof(float) <=
                  sizeof(bf16) * (F::kRows * F::kSliceStride + kHalves * kScoreTiles * kScoreTile * kScoreStride));
    return reinterpret_cast<float*>(dy);
  }
  /// Of rows `from` of a strip and later rows `block` of another.
  ATTAMBA_DEVICE bf16* score_tile(int half, int from, int block) const {
    return dscores + (half * kScoreTiles + block * (block + 1) / 2 + from) * kScoreTile * kScoreStride;
  }
};

/// Transposes words over the four lanes that share rows: lane q's word i and lane i's word q change places.
ATTAMBA_DEVICE void transpose_quad(std::uint32_t (&word)[4], int q) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = (q & bit) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & bit) == 0) {
        const std::uint32_t got = device::shuffle_xor(upper ? word[i] : word[i | bit], bit);
        word[i] = upper ? got : word[i];
        word[i | bit] = upper ? word[i | bit] : got;
      }
    }
  }
}

/// Sums eight values over the eight lanes of a column, and returns the one of value[lane / 4].
ATTAMBA_DEVICE float sum_columns(float (&value)[8], int lane) {
#pragma unroll
  for (int half = 4; half >= 1; half /= 2) {
    const bool upper = (lane & 4 * half) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float got = device::shuffle_xor(upper ? value[i] : value[i + half], 4 * half);
      value[i] = (upper ? value[i + half] : value[i]) + got;
    }
  }
  return value[0];
}
/// The column of the slice whose sum for the warp's unit `own` is left to a lane.
template <class F>
ATTAMBA_DEVICE int norm_column(const WarpPlace<F>& place, int own) {
  return place.column(own) + place.g / 2 * 8 + place.g % 2;
}

/// What gate_backward does: all of it, or, where there are several slices, only the norm's sums, which it adds to those of the
/// slices before, or only what follows from them.
enum class Gate { whole, sums, gradients };

/// dY of the tile's slice in place of dout, dz, and dl of each row as its P's row sum; adds to the norm's sums. Called by all
/// warps; `works`: those whose strip has rows. Without `dzxbcdt` dz goes nowhere, and the norm's sums stay.
template <Gate kPart, class F>
ATTAMBA_DEVICE void gate_backward(const SliceSizes<F>& s, const Inputs<bf16>& in, const Tile& tile,
                                  const BackwardShared<F>& shared, const WarpPlace<F>& place, bool works, const float* state,
                                  bf16* dzxbcdt) {
  constexpr int kTiles = kUnit / 8;
  static_assert(kTiles == 4, "a lane's columns of a unit are 16 bytes");
  float y[F::kWarpUnits][kTiles][4] = {};  // without the skip
  std::uint32_t z[F::kWarpUnits][2][kTiles] = {};
  const auto x_pair = [&](int row, int column) {
    return load_pair(shared.inputs.active + place.row(row) * shared.inputs.stride + column);
  };
  if (works) {
    mix(s, shared.inputs, place, state, y);
    float squares[2] = {}, dots[2] = {};
#pragma unroll
    for (int own = 0; own < F::kWarpUnits; ++own) {
      if (never(s, own)) {
        break;
      }
      const float skip = device::load(in.d_skip + s.head_of(place.unit(own) / s.units));
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        Bytes16 raw{};
        if (place.row(row) < tile.rows) {
          raw = device::load(reinterpret_cast<const Bytes16*>(input_row(s, in, tile.begin + place.row(row)) + s.column() +
                                                              place.column(own) + 6 * place.q));
        }
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          z[own][row][i] = raw.word[i];
        }
        transpose_quad(z[own][row], place.q);
        if constexpr (kPart != Gate::gradients) {
#pragma unroll
          for (int i = 0; i < kTiles; ++i) {
            const int column = place.column(own) + i * 8;
            const std::uint32_t x = x_pair(row, column), d = load_pair(shared.dy + place.row(row) * F::kSliceStride + column);
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const float gate = e == 0 ? low_half(z[own][row][i]) : high_half(z[own][row][i]);
              const float u =
                  (y[own][i][2 * row + e] + skip * (e == 0 ? low_half(x) : high_half(x))) * gate * sigmoid_fast(gate);
              squares[row] += u * u;
              dots[row] += u * norm_weight(s, in, shared.inputs, column + e) * (e == 0 ? low_half(d) : high_half(d));
            }
          }
        }
      }
    }
    if constexpr (kPart != Gate::gradients) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float square = quad_sum(squares[row]), dot = quad_sum(dots[row]);
        if (place.q == 0) {
          float* sums = shared.sums + (place.row(row) * kHalves + place.half) * 2;
          device::store(sums, s.slice == 0 ? square : device::load(sums) + square);
          device::store(sums + 1, s.slice == 0 ? dot : device::load(sums + 1) + dot);
        }
      }
    }
  }
  if constexpr (kPart == Gate::sums) {
    return;
  }
  if constexpr (kPart == Gate::whole) {
    device::sync_block();
  }
  if (!works) {
    return;
  }
  float scale[2], pull[2];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const float* sums = shared.sums + place.row(row) * kHalves * 2;
    const float mean = (device::load(sums) + device::load(sums + 2)) / static_cast<float>(s.all.hidden) + s.eps;
    scale[row] = device::rsqrt(mean);
    pull[row] = scale[row] / mean * (device::load(sums + 1) + device::load(sums + 3)) / static_cast<float>(s.all.hidden);
  }
#pragma unroll
  for (int own = 0; own < F::kWarpUnits; ++own) {
    const int head = place.unit(own) / s.units;
    const float skip = device::load(in.d_skip + s.head_of(head));
    float columns[8] = {};
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      if (never(s, F::kWarpUnits + 2 * own + row)) {
        return;
      }
      float row_sum = 0;
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const int column = place.column(own) + i * 8;
        bf16* to = shared.dy + place.row(row) * F::kSliceStride + column;
        const std::uint32_t x = x_pair(row, column), d_pair = load_pair(to);
        float dy[2], dz[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float gate = e == 0 ? low_half(z[own][row][i]) : high_half(z[own][row][i]), open = sigmoid_fast(gate);
          const float d = e == 0 ? low_half(d_pair) : high_half(d_pair);
          const float whole = y[own][i][2 * row + e] + skip * (e == 0 ? low_half(x) : high_half(x)), u = whole * gate * open;
          const float du = scale[row] * norm_weight(s, in, shared.inputs, column + e) * d - u * pull[row];
          dy[e] = du * gate * open;
          dz[e] = du * whole * open * (1.0f + gate * (1.0f - open));
          columns[i * 2 + e] += d * u * scale[row];
        }
        const std::uint32_t rounded = device::pack_bf16(dy[0], dy[1]);
        device::store(reinterpret_cast<std::uint32_t*>(to), rounded);
        row_sum += low_half(rounded) * y[own][i][2 * row] + high_half(rounded) * y[own][i][2 * row + 1];
        z[own][row][i] = device::pack_bf16(dz[0], dz[1]);
      }
      row_sum = quad_sum(row_sum);
      if (place.q == 0) {
        float* dlog = shared.dlog + head * F::kRows + place.row(row);
        device::store(dlog, place.unit(own) % s.units == 0 ? row_sum : device::load(dlog) + row_sum);
      }
      transpose_quad(z[own][row], place.q);
      if (dzxbcdt != nullptr && place.row(row) < tile.rows) {
        Bytes16 raw;
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          raw.word[i] = z[own][row][i];
        }
        device::store(
            reinterpret_cast<Bytes16*>(dzxbcdt + static_cast<std::int64_t>(tile.begin + place.row(row)) * s.projection +
                                       s.column() + place.column(own) + 6 * place.q),
            raw);
      }
    }
    const float sum = sum_columns(columns, place.lane);
    if (dzxbcdt != nullptr) {
      float* sums = shared.norm_sums + place.strip * s.all.hidden + s.column() + norm_column(place, own);
      device::store(sums, device::load(sums) + sum);
    }
  }
}

}  // namespace attamba::kernels::cuda::scan
