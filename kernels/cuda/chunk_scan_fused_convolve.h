// The backward kernel's way through SiLU and convolution.
#pragma once

#include "kernels/cuda/chunk_scan_fused_gate.h"

namespace attamba::kernels::cuda::scan {

using namespace device;

/// Gradients before SiLU of rows that the convolution crosses, [kEdge, all channels] each: of the next tile's first rows, where
/// it is known, and of this one's. Where it is not, `rest` receives dxBC of this tile's last rows without what they add.
struct Edges {
  const float* next;
  float *own, *rest;
};

/// `channels` of the slice from `begin` on, four of them by one strip per thread: through SiLU and convolution to dxBC, and the
/// taps' gradients of each strip into `taps` [kStrips, kFusedTaps, channels]. `active` holds dX, dB and dC.
template <class F>
ATTAMBA_DEVICE void convolve_backward(const SliceSizes<F>& s, const Inputs<bf16>& in, const Tile& tile,
                                      const BackwardShared<F>& shared, int leaving, int begin, int channels, const Edges& edges,
                                      float* taps, bf16* dzxbcdt) {
  constexpr int kWide = 4;
  const int packs = channels / kWide;
  for (int item = own_thread(); item < packs * strip_count(tile.rows); item += F::kThreads) {
    const int channel = begin + item % packs * kWide, strip = item / packs, first = strip * kStripRows;
    const int among_all = s.channel_of(channel);
    float weight[kFusedTaps][kWide], x[kFusedTaps][kWide] = {}, dx[kFusedTaps][kWide] = {}, dweight[kFusedTaps][kWide] = {};
    load_taps(s, in, shared.inputs, channel, weight);
    const bf16* from = input_row(s, in, tile.begin) + s.all.hidden + among_all;
    bf16* to = dzxbcdt + static_cast<std::int64_t>(tile.begin) * s.projection + s.all.hidden + among_all;
    const auto fetch = [&](int t) {
      const Bytes8 two = load(reinterpret_cast<const Bytes8*>(from + static_cast<std::int64_t>(t) * s.projection));
      x[0][0] = low_half(two.word[0]);
      x[0][1] = high_half(two.word[0]);
      x[0][2] = low_half(two.word[1]);
      x[0][3] = high_half(two.word[1]);
    };
    const auto shift = [&] {
#pragma unroll
      for (int j = kEdge; j > 0; --j) {
#pragma unroll
        for (int c = 0; c < kWide; ++c) {
          x[j][c] = x[j - 1][c];
          dx[j][c] = dx[j - 1][c];
        }
      }
    };
#pragma unroll
    for (int t = first - kEdge; t < first; ++t) {
      if (t >= shared.inputs.first_read(tile, first)) {
        shift();
        fetch(t);
      }
    }
    // dx[j] is that of the row j before, complete after kEdge more rows.
#pragma unroll 4
    for (int i = 0; i < kStripRows + kEdge; ++i) {
      const int t = first + i;
      float gradient[kWide] = {};
      int start = t;  // rows after the tile's last one count as other chunks, unless the chunk goes on in the next tile
      if (t < tile.rows) {
        start = load(shared.inputs.starts + t);
      } else if (leaving < F::kRows) {
        start = leaving;
      }
      const auto joined = [&](int j) {
        return F::kByLabel ? t < tile.rows && shared.inputs.mixes(start, t - j) : t - j >= start;
      };
      shift();
#pragma unroll
      for (int c = 0; c < kWide; ++c) {
        dx[0][c] = 0;
      }
      if (t < tile.rows && (F::kByLabel || i < kStripRows || start < first + kStripRows)) {
        fetch(t);
        const std::uint32_t* stored =
            reinterpret_cast<const std::uint32_t*>(shared.inputs.active + t * shared.inputs.stride + channel);
        const std::uint32_t pair[2] = {load(stored), load(stored + 1)};
#pragma unroll
        for (int c = 0; c < kWide; ++c) {
          float sum = 0;
#pragma unroll
          for (int j = 0; j < kFusedTaps; ++j) {
            sum += joined(j) ? weight[j][c] * x[j][c] : 0.0f;
          }
          const float open = sigmoid_fast(sum);
          gradient[c] = (c % 2 == 0 ? low_half(pair[c / 2]) : high_half(pair[c / 2])) * open * (1.0f + sum * (1.0f - open));
        }
      } else if (t >= tile.rows && leaving < F::kRows && edges.rest == nullptr) {
        const auto pack = Pack<float>::read(edges.next + (t - F::kRows) * s.all.channels + among_all);
#pragma unroll
        for (int c = 0; c < kWide; ++c) {
          gradient[c] = pack.value[c];
        }
      }
      if (t < kEdge && shared.inputs.enters()) {
        Pack<float> pack;
#pragma unroll
        for (int c = 0; c < kWide; ++c) {
          pack.value[c] = F::kByLabel || start < 0 ? gradient[c] : 0.0f;
        }
        pack.write(edges.own + t * s.all.channels + among_all);
      }
#pragma unroll
      for (int j = 0; j < kFusedTaps; ++j) {
#pragma unroll
        for (int c = 0; c < kWide; ++c) {
          dx[j][c] += joined(j) ? weight[j][c] * gradient[c] : 0.0f;
          dweight[j][c] += joined(j) && i < kStripRows ? gradient[c] * x[j][c] : 0.0f;
        }
      }
      const int done = t - kEdge;
      if (i >= kEdge && done >= F::kRows - kEdge && leaving < F::kRows && edges.rest != nullptr) {
        Pack<float> pack;
#pragma unroll
        for (int c = 0; c < kWide; ++c) {
          pack.value[c] = dx[kEdge][c];
        }
        pack.write(edges.rest + (done - F::kRows + kEdge) * s.all.channels + among_all);
      } else if (i >= kEdge && done < tile.rows) {
        Bytes8 two;
        two.word[0] = pack_bf16(dx[kEdge][0], dx[kEdge][1]);
        two.word[1] = pack_bf16(dx[kEdge][2], dx[kEdge][3]);
        store(reinterpret_cast<Bytes8*>(to + static_cast<std::int64_t>(done) * s.projection), two);
      }
    }
#pragma unroll
    for (int j = 0; j < kFusedTaps; ++j) {
      Pack<float> pack;
#pragma unroll
      for (int c = 0; c < kWide; ++c) {
        pack.value[c] = dweight[j][c];
      }
      pack.write(taps + (strip * kFusedTaps + kFusedTaps - 1 - j) * channels + channel - begin);
    }
  }
}

/// By a whole block: dxBC of the kEdge rows before the tile that begins at row `begin`, from `rest` [kEdge, channels] and from
/// the gradients before SiLU of the tile's first rows, `edge` [kEdge, channels]. reaches(from, t): whether row `from` has a tap
/// at t.
template <class Reaches>
ATTAMBA_DEVICE void join_rows(const Sizes& s, const Inputs<bf16>& in, int begin, const float* rest, const float* edge,
                              bf16* dzxbcdt, const Reaches& reaches) {
  for (int i = thread_index(); i < kEdge * s.channels; i += block_threads()) {
    const int row = i / s.channels, channel = i % s.channels, t = begin - kEdge + row;
    float sum = load(rest + i);
    for (int j = kEdge - row; j <= kEdge && t + j < s.rows; ++j) {  // row t + j lies j + row - kEdge rows into the tile
      if (reaches(t + j, t)) {
        sum +=
            load(in.conv + channel * kFusedTaps + kFusedTaps - 1 - j) * load(edge + (j + row - kEdge) * s.channels + channel);
      }
    }
    store(dzxbcdt + static_cast<std::int64_t>(t) * s.projection + s.hidden + channel, to_bf16(sum));
  }
}

/// partial [all channels, kFusedTaps] = or += the strips' taps of the slice's `channels` from `begin` on.
template <class F>
ATTAMBA_DEVICE void sum_taps(const SliceSizes<F>& s, int strips, int begin, int channels, const float* taps, float* partial,
                             bool add) {
  for (int i = own_thread(); i < channels * kFusedTaps; i += F::kThreads) {
    const int channel = i / kFusedTaps, tap = i % kFusedTaps;
    float* to = partial + s.channel_of(begin + channel) * kFusedTaps + tap;
    float sum = add ? load(to) : 0.0f;
    for (int strip = 0; strip < strips; ++strip) {
      sum += load(taps + (strip * kFusedTaps + tap) * channels + channel);
    }
    store(to, sum);
  }
}

}  // namespace attamba::kernels::cuda::scan
