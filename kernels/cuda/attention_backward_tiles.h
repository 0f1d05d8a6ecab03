// What the tensor core kernels of attention_backward.cu are made of: products with tiles of keys for dq, and with tiles of
// query rows for dk and dv. Scores are recomputed transposed where keys are owned, so that P and dS never leave registers
// either way.
#pragma once

#include "kernels/cuda/attention_tiles.h"

namespace attamba::kernels::cuda::attention_parts {

inline constexpr float kLog2E = 1.4426950408889634f;

// ------------------------------------------------------------------------------------------------ queries
/// The q and dout of a warp's 16 rows as A operands, and their statistics.
template <int kD>
struct OwnQueries {
  std::uint32_t q[kD / 16][4], dout[kD / 16][4];
  float lse[2], delta[2];

  /// From tiles whose first row is the warp's, and its statistics.
  ATTAMBA_DEVICE OwnQueries(const bf16* q_tile, const bf16* dout_tile, const device::Bytes8* statistics) {
#pragma unroll
    for (int step = 0; step < kD / 16; ++step) {
      load_a<kD>(q[step], q_tile, 0, step);
      load_a<kD>(dout[step], dout_tile, 0, step);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Statistic statistic = load_statistic(statistics + device::lane_index() / 4 + 8 * r);
      lse[r] = statistic.lse;
      delta[r] = statistic.delta;
    }
  }
};

/// Adds one tile of keys to dq of the warp's rows.
template <int kD, int kKeys>
ATTAMBA_DEVICE void add_to_dq(float (&dq)[kD / 8][4], const OwnQueries<kD>& own, const bf16* k, const bf16* v, int first,
                              const WarpKeys& keys, float scale_log2) {
  const int column = device::lane_index() % 4 * 2;
#pragma unroll 1
  for (int j = 0; j < kKeys / 16; ++j) {
    const int from = first + 16 * j;
    if (!keys.see_any(from, from + 16)) {
      continue;
    }
    float s[2][4] = {}, dp[2][4] = {};
#pragma unroll
    for (int step = 0; step < kD / 16; ++step) {
      multiply_rows<kD>(s, own.q[step], k, 16 * j, step);
      multiply_rows<kD>(dp, own.dout[step], v, 16 * j, step);
    }
    const bool masked = !keys.see_all(from, from + 16);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int key = from + 8 * i + column + e % 2, r = e / 2;
        const float p = device::exp2_fast(device::fused_multiply_add(s[i][e], scale_log2, -own.lse[r]));
        const bool seen = !masked || (key >= keys.thread[r].begin && key < keys.thread[r].end);
        s[i][e] = seen ? p * (dp[i][e] - own.delta[r]) : 0.0f;
      }
    }
    std::uint32_t ds[4];
    round_to_a(ds, s);
    multiply_columns<kD>(dq, ds, k, 16 * j);
  }
}

// ------------------------------------------------------------------------------------------------ keys
/// A operands of the warp's 16 keys or values: kept in registers, or read again whenever they are needed.
template <int kD, bool kKeep>
struct OwnRows {
  const bf16* tile;
  std::uint32_t kept[kKeep ? kD / 16 : 1][4];

  ATTAMBA_DEVICE explicit OwnRows(const bf16* own_tile) : tile(own_tile) {
    if constexpr (kKeep) {
#pragma unroll
      for (int step = 0; step < kD / 16; ++step) {
        load_a<kD>(kept[step], tile, 0, step);
      }
    }
  }
  ATTAMBA_DEVICE void multiply(float (&sum)[2][4], const bf16* rows, int row, int step) {
    if constexpr (!kKeep) {
      load_a<kD>(kept[0], tile, 0, step);
    }
    multiply_rows<kD>(sum, kept[kKeep ? step : 0], rows, row, step);
  }
};

/// Query rows that see keys of a warp.
struct WarpRows {
  Range thread[2];  ///< this thread's keys
  Range any, all;   ///< those that see at least one of the warp's keys, those that see every one

  /// Of the warp's keys in lists of where each key's rows begin and end; `count` of these keys exist.
  ATTAMBA_DEVICE WarpRows(const int* begins, const int* ends, int count) {
    const int g = device::lane_index() / 4;
    for (int r = 0; r < 2; ++r) {
      thread[r] = g + 8 * r < count ? Range{load(begins + g + 8 * r), load(ends + g + 8 * r)} : Range{0, 0};
    }
    any = count > 0 ? Range{load(begins), load(ends + (count < 16 ? count : 16) - 1)} : Range{0, 0};
    all = count >= 16 ? Range{load(begins + 15), load(ends)} : Range{0, 0};
  }
  ATTAMBA_DEVICE bool any_sees(int from, int to) const { return from < any.end && to > any.begin; }
  ATTAMBA_DEVICE bool all_see(int from, int to) const { return from >= all.begin && to <= all.end; }
};

/// Adds a tile of query rows, [2, kRows, kD] q and dout, to dk and dv of the warp's keys.
template <int kD, bool kKeep, int kRows>
ATTAMBA_DEVICE void add_to_dk_dv(float (&dk)[kD / 8][4], float (&dv)[kD / 8][4], OwnRows<kD, kKeep>& k, OwnRows<kD, kKeep>& v,
                                 const bf16* q, const device::Bytes8* statistics, int first, const WarpRows& rows,
                                 float scale_log2) {
  const int column = device::lane_index() % 4 * 2;
  const bf16* const dout = q + kRows * kD;
#pragma unroll 1
  for (int j = 0; j < kRows / 16; ++j) {
    const int from = first + 16 * j;
    if (!rows.any_sees(from, from + 16)) {
      continue;
    }
    float p[2][4] = {}, ds[2][4] = {};
    [[maybe_unused]] constexpr int kTimes = kKeep ? kD / 16 : 2;
#pragma unroll kTimes
    for (int step = 0; step < kD / 16; ++step) {
      k.multiply(p, q, 16 * j, step);
      v.multiply(ds, dout, 16 * j, step);
    }
    const bool masked = !rows.all_see(from, from + 16);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const device::Bytes8* const pair = statistics + 16 * j + 8 * i + column;
      const auto both = std::bit_cast<StatisticPair>(load(reinterpret_cast<const device::Bytes16*>(pair)));
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = from + 8 * i + column + e % 2, r = e / 2;
        const bool seen = !masked || (row >= rows.thread[r].begin && row < rows.thread[r].end);
        const float value = device::exp2_fast(device::fused_multiply_add(p[i][e], scale_log2, -both.row[e % 2].lse));
        p[i][e] = seen ? value : 0.0f;
        ds[i][e] = seen ? value * (ds[i][e] - both.row[e % 2].delta) : 0.0f;
      }
    }
    std::uint32_t rounded[4];
    round_to_a(rounded, p);
    multiply_columns<kD>(dv, rounded, dout, 16 * j);
    round_to_a(rounded, ds);
    multiply_columns<kD>(dk, rounded, q, 16 * j);
  }
}

/// Starts the copy of kRows rows' statistics, from an even row on; those from `end` on are 0.
template <int kRows>
ATTAMBA_DEVICE void copy_statistics(device::Bytes8* to, const Backward<bf16>& a, const Head& head, int first, int end) {
  const device::Bytes8* const from = a.statistics + head.index * padded_rows(a.sizes) + first;
  const int row = 2 * device::thread_index();
  if (row < kRows) {
    device::copy_async_16(to + row, from + row, first + row < end);
  }
}

/// Query rows [first_row, end_row) with their statistics, on their way through two stages of kRows rows; first_row is even, as
/// statistics travel in pairs.
template <int kD, int kRows, int kThreads>
struct RowStages {
  static constexpr int kStage = 2 * kRows * kD;
  bf16* stages;                ///< [2, 2, kRows, kD]: q and dout
  device::Bytes8* statistics;  ///< [2, kRows]
  int first_row, end_row;

  ATTAMBA_DEVICE int first(int tile) const { return first_row + tile * kRows; }
  ATTAMBA_DEVICE void copy(const Backward<bf16>& a, const Head& head, int tile) const {
    bf16* const q = stages + tile % 2 * kStage;
    const auto place_of = [&](int, int row) { return place_of_row(a.sizes, head, first(tile) + row, end_row); };
    copy_rows<kD, kRows, kThreads>(q, a.q, a.sizes.d, place_of);
    copy_rows<kD, kRows, kThreads>(q + kRows * kD, a.dout, a.sizes.d, place_of);
    copy_statistics<kRows>(statistics + tile % 2 * kRows, a, head, first(tile), end_row);
    device::copy_async_commit();
  }
  /// Adds all rows to dk and dv of the warp's keys. The first stage is there.
  template <bool kKeep>
  ATTAMBA_DEVICE void add_to(float (&dk)[kD / 8][4], float (&dv)[kD / 8][4], OwnRows<kD, kKeep>& k, OwnRows<kD, kKeep>& v,
                             const Backward<bf16>& a, const Head& head, const WarpRows& rows) const {
    for (int tile = 0; first(tile) < end_row; ++tile) {
      if (first(tile + 1) < end_row) {
        copy(a, head, tile + 1);
      }
      add_to_dk_dv<kD, kKeep, kRows>(dk, dv, k, v, stages + tile % 2 * kStage, statistics + tile % 2 * kRows, first(tile), rows,
                                     a.sizes.scale * kLog2E);
      device::copy_async_wait<0>();
      device::sync_block();
    }
  }
};

/// Adds value * factor of the warp's 16 keys to what `to` holds; place_of(r) says where key r lies.
template <int kD, class PlaceOf>
ATTAMBA_DEVICE void add_rows_to(bf16* to, const float (&value)[kD / 8][4], float factor, int d, const PlaceOf& place_of) {
  const int g = device::lane_index() / 4, column = device::lane_index() % 4 * 2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const Place place = place_of(g + 8 * r);
#pragma unroll
    for (int i = 0; i < kD / 8; ++i) {
      if (place.exists && 8 * i < d) {
        auto* const both = reinterpret_cast<std::uint32_t*>(to + place.element + 8 * i + column);
        const std::uint32_t old = load(both);
        const float low = device::to_float(bf16{static_cast<std::uint16_t>(old & 0xffffu)});
        const float high = device::to_float(bf16{static_cast<std::uint16_t>(old >> 16)});
        store(both, device::pack_bf16(low + value[i][2 * r] * factor, high + value[i][2 * r + 1] * factor));
      }
    }
  }
}

}  // namespace attamba::kernels::cuda::attention_parts
