// One tile of the fused scans in shared memory: what both directions start with.
#pragma once

#include "kernels/cuda/chunk_scan_fused.h"

namespace attamba::kernels::cuda::scan {

/// Shared memory that both directions use. Rows after the tile's last one up to the end of their strip hold zeros.
template <class F>
struct Shared {
  /// By labels, the rows before the tile that the convolution reaches have starts, too, and weights stay where they are: with
  /// tiles of 64 rows, shared memory of sm_86 is too small for them.
  static constexpr int kRowsBefore = F::kByLabel ? kEdge : 0;
  static constexpr bool kKeepsWeights = !F::kByLabel;

  bf16* active;  ///< [kRows, stride]: X, B, C
  int stride;
  float* conv;   ///< [kFusedTaps, channels]
  float* norm;   ///< [E]
  float* delta;  ///< [Hs, kRows]
  float* decay;  ///< [Hs, kRows], sum of log2 of the decays of rows 0..t
  /// [kRowsBefore + kRows], the first one kRowsBefore rows before the tile: where a row's chunk starts, counted from the tile's
  /// first row. By labels, the first row of the tile that has the row's label, or -1 where it is that of the row before the
  /// tile: rows mix that have the same start.
  int* starts;

  ATTAMBA_DEVICE void take(const SliceSizes<F>& s, device::SharedMemory& shared) {
    stride = s.channels + kPadding;
    active = shared.take<bf16>(F::kRows * stride);
    if constexpr (kKeepsWeights) {
      conv = shared.take<float>(kFusedTaps * s.channels);
      norm = shared.take<float>(s.hidden);
    }
    delta = shared.take<float>(s.heads * F::kRows);
    decay = shared.take<float>(s.heads * F::kRows);
    starts = shared.take<int>(kRowsBefore + F::kRows) + kRowsBefore;
  }
  static std::size_t bytes(const SliceSizes<F>& s) {
    using device::SharedMemory;
    return SharedMemory::bytes_of<bf16>(F::kRows * (s.channels + kPadding)) +
           (kKeepsWeights ? SharedMemory::bytes_of<float>(kFusedTaps * s.channels) + SharedMemory::bytes_of<float>(s.hidden)
                          : 0) +
           2 * SharedMemory::bytes_of<float>(s.heads * F::kRows) + SharedMemory::bytes_of<int>(kRowsBefore + F::kRows);
  }

  /// Whether row t, of which `start` is, mixes with row `from` at or before it.
  ATTAMBA_DEVICE bool mixes(int start, int from) const {
    return F::kByLabel ? device::load(starts + from) == start : from >= start;
  }
  /// First row that the convolution of row t may read, of those that are kEdge before it or less.
  ATTAMBA_DEVICE int first_read(const Tile& tile, int t) const { return F::kByLabel ? -tile.begin : device::load(starts + t); }
  /// Whether a state enters the tile: at the rows whose start is negative.
  ATTAMBA_DEVICE bool enters() const { return device::load(starts + (F::kByLabel ? -1 : 0)) < 0; }
  /// Whether row t adds to the state that leaves the tile, that of the rows with start `leaving`.
  ATTAMBA_DEVICE bool leaves(int t, int leaving) const {
    return F::kByLabel ? device::load(starts + t) == leaving : t >= leaving;
  }
};

/// The slice's, where they are kept in shared memory.
template <class F>
ATTAMBA_DEVICE void load_weights(const SliceSizes<F>& s, const Inputs<bf16>& in, const Shared<F>& shared) {
  if constexpr (Shared<F>::kKeepsWeights) {
    for (int i = own_thread(); i < s.channels * kFusedTaps; i += F::kThreads) {
      const int channel = i / kFusedTaps, tap = i % kFusedTaps;
      device::store(shared.conv + tap * s.channels + channel, device::load(in.conv + s.channel_of(channel) * kFusedTaps + tap));
    }
    for (int i = own_thread(); i < s.hidden; i += F::kThreads) {
      device::store(shared.norm + i, device::load(in.norm + s.column() + i));
    }
  }
}

/// Of the norm, at a column of the slice.
template <class F>
ATTAMBA_DEVICE float norm_weight(const SliceSizes<F>& s, const Inputs<bf16>& in, const Shared<F>& shared, int column) {
  return device::load(Shared<F>::kKeepsWeights ? shared.norm + column : in.norm + s.column() + column);
}

/// Of the convolution, for four channels of the slice from `channel` on; weight[j] is that of the row j before.
template <class F>
ATTAMBA_DEVICE void load_taps(const SliceSizes<F>& s, const Inputs<bf16>& in, const Shared<F>& shared, int channel,
                              float (&weight)[kFusedTaps][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (Shared<F>::kKeepsWeights) {
      const auto of_tap = device::Pack<float>::read(shared.conv + (kFusedTaps - 1 - i) * s.channels + channel);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        weight[i][c] = of_tap.value[c];
      }
    } else {
      const auto of_channel = device::Pack<float>::read(in.conv + (s.channel_of(channel) + i) * kFusedTaps);
#pragma unroll
      for (int j = 0; j < kFusedTaps; ++j) {
        weight[j][i] = of_channel.value[kFusedTaps - 1 - j];
      }
    }
  }
}

/// Fills the slice's first `channels` of `active`, four channels by kConvRows rows per thread. `starts` are there.
template <class F>
ATTAMBA_DEVICE void convolve_tile(const SliceSizes<F>& s, const Inputs<bf16>& in, const Tile& tile, const Shared<F>& shared,
                                  int channels) {
  using device::Bytes8;
  constexpr int kHistory = kFusedTaps - 1, kWide = 4;
  const int packs = channels / kWide, rows = strip_count(tile.rows) * kStripRows;
  for (int item = own_thread(); item < packs * (rows / kConvRows); item += F::kThreads) {
    const int channel = item % packs * kWide, first = item / packs * kConvRows;
    const int reach = shared.first_read(tile, first);
    Bytes8 raw[kHistory + kConvRows];
#pragma unroll
    for (int i = 0; i < kHistory + kConvRows; ++i) {
      const int t = first - kHistory + i;
      raw[i] = Bytes8{};
      if (t >= reach && t < tile.rows) {
        raw[i] = device::load(
            reinterpret_cast<const Bytes8*>(input_row(s, in, tile.begin + t) + s.all.hidden + s.channel_of(channel)));
      }
    }
    float weight[kFusedTaps][kWide], x[kFusedTaps][kWide] = {};  // x[j] is that of j rows before
    load_taps(s, in, shared, channel, weight);
    const auto unpack = [](float(&to)[kWide], const Bytes8& from) {
      to[0] = low_half(from.word[0]);
      to[1] = high_half(from.word[0]);
      to[2] = low_half(from.word[1]);
      to[3] = high_half(from.word[1]);
    };
#pragma unroll
    for (int j = 0; j < kFusedTaps; ++j) {
      if (j < kHistory) {
        unpack(x[j], raw[kHistory - 1 - j]);
      }
    }
#pragma unroll
    for (int i = 0; i < kConvRows; ++i) {
      const int start = device::load(shared.starts + first + i);
      const bool begins = !F::kByLabel && start == first + i;
      float value[kWide];
#pragma unroll
      for (int j = kHistory; j > 0; --j) {
#pragma unroll
        for (int c = 0; c < kWide; ++c) {
          x[j][c] = begins ? 0.0f : x[j - 1][c];
        }
      }
      unpack(x[0], raw[kHistory + i]);
#pragma unroll
      for (int c = 0; c < kWide; ++c) {
        value[c] = 0;
#pragma unroll
        for (int j = 0; j < kFusedTaps; ++j) {
          value[c] += !F::kByLabel || shared.mixes(start, first + i - j) ? weight[j][c] * x[j][c] : 0.0f;
        }
        value[c] *= sigmoid_fast(value[c]);
      }
      const Bytes8 packed{{device::pack_bf16(value[0], value[1]), device::pack_bf16(value[2], value[3])}};
      device::store(reinterpret_cast<Bytes8*>(shared.active + (first + i) * shared.stride + channel), packed);
    }
  }
}

/// Fills delta and decay, a warp per head.
template <class F>
ATTAMBA_DEVICE void load_steps(const SliceSizes<F>& s, const Inputs<bf16>& in, const Tile& tile, const Shared<F>& shared) {
  const int lane = own_lane();
  for (int head = own_warp(); head < s.heads; head += F::kWarps) {
    const float rate = -device::exp(device::load(in.a_log + s.head_of(head))) * kLog2E;
    float before = 0;
    for (int first = 0; first < F::kRows; first += device::kWarp) {
      const int t = first + lane;
      const float delta = t < tile.rows ? softplus(input_step(s, in, tile.begin + t, s.all.heads, s.head_of(head))) : 0.0f;
      float sum = rate * delta;
#pragma unroll
      for (int step = 1; step < device::kWarp; step *= 2) {
        const float other = device::shuffle_up(sum, step);
        sum += lane >= step ? other : 0.0f;
      }
      sum += before;
      before = device::shuffle(sum, device::kWarp - 1);
      if (t < F::kRows) {
        device::store(shared.delta + head * F::kRows + t, delta);
        device::store(shared.decay + head * F::kRows + t, sum);
      }
    }
  }
}

/// Calls body() of each slice whose X, B, C and steps are loaded. The tile's starts are there.
template <class F, class Body>
ATTAMBA_DEVICE void for_loaded_slices(SliceSizes<F>& s, const Inputs<bf16>& in, const Tile& tile, const Shared<F>& shared,
                                      const Body& body) {
  for (s.slice = 0; s.column() < s.all.hidden; ++s.slice) {
    if constexpr (F::kSliced) {
      load_weights(s, in, shared);
      device::sync_block();  // the slice before is read
    }
    convolve_tile(s, in, tile, shared, s.new_channels());
    load_steps(s, in, tile, shared);
    device::sync_block();
    body();
  }
}

// ------------------------------------------------------------------------------------------------ states of long chunks
// A unit's state S [kUnit, N] lies in workspace as accumulators, so that a lane reads back what a second operand takes: per 16
// rows of S by 16 columns, per lane, columns 0..7's and 8..15's four values.
ATTAMBA_DEVICE float* in_slot(float* values, int slot, int size) {
  return values + static_cast<std::int64_t>(slot) * size;
}
constexpr int kStatePiece = 8 * device::kWarp;
template <class F, class T>
ATTAMBA_DEVICE T* state_piece(T* states, int unit, int rows16, int columns16, int lane) {
  return states + ((unit * (kUnit / 16) + rows16) * (F::kState / 16) + columns16) * kStatePiece + lane * 8;
}

/// acc [16, 16] += m^T (w o v) over strips of the tile's rows, from columns `column` of m and `vectors` of `active`;
/// weight(t) is w_t.
template <class F, class Weight>
ATTAMBA_DEVICE void add_outer_products(float (&acc0)[4], float (&acc1)[4], const bf16* m, int stride, int column,
                                       const Shared<F>& shared, int vectors, int strips, int lane, const Weight& weight) {
  const int q = lane % 4;
  for (int strip = 0; strip < strips; ++strip) {
    std::uint32_t left[4], right[4];
    load_left_transposed(left, m, stride, strip * kStripRows, column, lane);
    load_right(right, shared.active, shared.stride, strip * kStripRows, vectors, lane);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = strip * kStripRows + i * 8 + 2 * q;
      const float low = weight(row), high = weight(row + 1);
      right[i] = device::pack_bf16(low_half(right[i]) * low, high_half(right[i]) * high);
      right[i + 2] = device::pack_bf16(low_half(right[i + 2]) * low, high_half(right[i + 2]) * high);
    }
    multiply(acc0, acc1, left, right);
  }
}

/// Starts the copy of a slice's columns of a tile's rows; those after the last one get zeros up to the end of their strip.
template <class F>
ATTAMBA_DEVICE void fetch_rows(const Tile& tile, const bf16* from, int stride, bf16* to) {
  constexpr int kPacks = F::kSlice / 8;
  for (int i = own_thread(); i < strip_count(tile.rows) * kStripRows * kPacks; i += F::kThreads) {
    const int t = i / kPacks, column = i % kPacks * 8;
    const bool valid = t < tile.rows;
    device::copy_async_16(to + t * F::kSliceStride + column, from + static_cast<std::int64_t>(valid ? t : 0) * stride + column,
                          valid);
  }
  device::copy_async_commit();
}

}  // namespace attamba::kernels::cuda::scan
