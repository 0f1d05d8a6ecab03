// Tiles of bfloat16 rows in shared memory, and the tensor core products on them.
//
// A tile is [rows, kD], where 16-byte chunks of a row change places by row, so that the eight rows of a matrix that is loaded
// lie in different banks. Products follow the register layout of mma_16x8x16: a thread holds columns 2q, 2q+1 of rows g and g+8
// of its warp's 16 rows, g = lane / 4, q = lane % 4.
#pragma once

#include "kernels/cuda/attention_places.h"

namespace attamba::kernels::cuda::attention_parts {

/// Where chunk even + odd of row `row` lies in a tile. In products `even` is a constant, 2 step, and `odd` 0 or 1 by lane: then
/// all steps share a few addresses.
template <int kD>
ATTAMBA_DEVICE int in_tile(int row, int even, int odd = 0) {
  const int turn = kD >= 64 ? row & 7 : row >> 1 & 3;
  return row * kD + 8 * ((even & ~7) + ((even & 7) ^ odd ^ turn));
}

/// A operand: tile rows [row, row + 16), columns [16 step, 16 step + 16).
template <int kD>
ATTAMBA_DEVICE void load_a(std::uint32_t (&a)[4], const bf16* tile, int row, int step) {
  const int lane = device::lane_index();
  device::load_matrix_x4(a, tile + in_tile<kD>(row + lane % 16, 2 * step, lane / 16));
}

/// sum[i] += a b, a [16, 16], b = the transpose of tile rows [row + 8i, row + 8i + 8), columns [16 step, 16 step + 16).
template <int kD>
ATTAMBA_DEVICE void multiply_rows(float (&sum)[2][4], const std::uint32_t (&a)[4], const bf16* tile, int row, int step) {
  const int lane = device::lane_index();
  std::uint32_t b[4];
  device::load_matrix_x4(b, tile + in_tile<kD>(row + lane / 16 * 8 + lane % 8, 2 * step, lane / 8 % 2));
  device::mma_16x8x16(sum[0], a, {b[0], b[1]});
  device::mma_16x8x16(sum[1], a, {b[2], b[3]});
}

/// sum[i] += a b, a [16, 16], b = tile rows [row, row + 16), columns [8i, 8i + 8).
template <int kD>
ATTAMBA_DEVICE void multiply_columns(float (&sum)[kD / 8][4], const std::uint32_t (&a)[4], const bf16* tile, int row) {
  const int lane = device::lane_index();
#pragma unroll
  for (int step = 0; step < kD / 16; ++step) {
    std::uint32_t b[4];
    device::load_matrix_x4_transposed(b, tile + in_tile<kD>(row + lane % 16, 2 * step, lane / 16));
    device::mma_16x8x16(sum[2 * step], a, {b[0], b[1]});
    device::mma_16x8x16(sum[2 * step + 1], a, {b[2], b[3]});
  }
}

/// Two 16x8 results side by side, rounded, as an A operand.
ATTAMBA_DEVICE void round_to_a(std::uint32_t (&a)[4], const float (&value)[2][4]) {
  a[0] = device::pack_bf16(value[0][0], value[0][1]);
  a[1] = device::pack_bf16(value[0][2], value[0][3]);
  a[2] = device::pack_bf16(value[1][0], value[1][1]);
  a[3] = device::pack_bf16(value[1][2], value[1][3]);
}

/// Which rows of a tile a thread copies: chunk `chunk()` of rows row(0), row(1), ...
template <int kD, int kThreads>
struct CopyPlan {
  static constexpr unsigned kChunks = kD / 8, kStep = kThreads / kChunks;
  static constexpr int passes(int rows) { return (rows + int{kStep} - 1) / int{kStep}; }
  ATTAMBA_DEVICE static int chunk() { return static_cast<int>(static_cast<unsigned>(device::thread_index()) % kChunks); }
  ATTAMBA_DEVICE static int row(int pass) {
    return static_cast<int>(static_cast<unsigned>(device::thread_index()) / kChunks) + pass * int{kStep};
  }
};

/// Where a row lies in memory, from `element` on; what does not exist is read as 0 and not written.
struct Place {
  std::int64_t element;
  bool exists;
};

/// A query row, which exists if it lies before `end`.
ATTAMBA_DEVICE Place place_of_row(const Sizes& sizes, const Head& head, int row, int end) {
  return {head.query_element(sizes, row), row < end};
}

/// Starts the copy of kRows rows into a tile; place_of(pass, row) says where each one comes from. Columns from d on are 0.
template <int kD, int kRows, int kThreads, class PlaceOf>
ATTAMBA_DEVICE void copy_rows(bf16* tile, const bf16* from, int d, const PlaceOf& place_of) {
  using Plan = CopyPlan<kD, kThreads>;
  const int chunk = Plan::chunk();
#pragma unroll
  for (int pass = 0; pass < Plan::passes(kRows); ++pass) {
    const int row = Plan::row(pass);
    if (kRows % Plan::kStep == 0 || row < kRows) {
      const Place place = place_of(pass, row);
      device::copy_async_16(tile + in_tile<kD>(row, chunk), from + place.element + chunk * 8, place.exists && chunk * 8 < d);
    }
  }
}

/// Writes value * factor, rounded, of the warp's 16 rows: through `tile`, the warp's own 16 rows of shared memory, so that
/// memory is written in whole chunks. place_of(r) says where row r goes in `to`.
template <int kD, class PlaceOf>
ATTAMBA_DEVICE void write_rows(bf16* to, bf16* tile, const float (&value)[kD / 8][4], float factor0, float factor1, int d,
                               const PlaceOf& place_of) {
  const int lane = device::lane_index(), g = lane / 4, q = lane % 4;
  device::sync_warp();  // the tile's readers are done
#pragma unroll
  for (int i = 0; i < kD / 8; ++i) {
    auto* row0 = reinterpret_cast<std::uint32_t*>(tile + in_tile<kD>(g, i));
    auto* row1 = reinterpret_cast<std::uint32_t*>(tile + in_tile<kD>(g + 8, i));
    store(row0 + q, device::pack_bf16(value[i][0] * factor0, value[i][1] * factor0));
    store(row1 + q, device::pack_bf16(value[i][2] * factor1, value[i][3] * factor1));
  }
  device::sync_warp();
  constexpr int kChunks = kD / 8;
  const int chunk = lane % kChunks;
#pragma unroll
  for (int row = lane / kChunks; row < 16; row += kWarp / kChunks) {
    const Place place = place_of(row);
    if (place.exists && chunk * 8 < d) {
      store(reinterpret_cast<device::Bytes16*>(to + place.element + chunk * 8),
            load(reinterpret_cast<const device::Bytes16*>(tile + in_tile<kD>(row, chunk))));
    }
  }
}

/// The keys that a tile of query rows sees, in tiles of kKeys: local ones before `local_end` first, then compact ones.
template <int kKeys>
struct KeyTiles {
  Range local, compact;
  int local_tiles, count;

  ATTAMBA_DEVICE KeyTiles(const Table& table, int first_token, int last_token, int local_end)
      : local{keys_of(table, false, first_token).begin, local_end},
        compact{keys_of(table, true, first_token).begin, keys_of(table, true, last_token).end},
        local_tiles(local.end > local.begin ? (local.end - local.begin + kKeys - 1) / kKeys : 0),
        count(local_tiles + (compact.end - compact.begin + kKeys - 1) / kKeys) {}

  ATTAMBA_DEVICE bool is_compact(int tile) const { return tile >= local_tiles; }
  ATTAMBA_DEVICE int first(int tile) const {
    return is_compact(tile) ? compact.begin + (tile - local_tiles) * kKeys : local.begin + tile * kKeys;
  }
  ATTAMBA_DEVICE int end(int tile) const { return is_compact(tile) ? compact.end : local.end; }
};

/// Copies tiles of keys and values. Chunk ends are looked up one tile ahead of the copy, so that it need not wait for them.
template <int kD, int kKeys, int kThreads>
class KeyCopier {
 public:
  /// Beyond the last tile there are no keys.
  ATTAMBA_DEVICE void look_up(const KeyTiles<kKeys>& keys, int tile, const Table& table) {
    const int first = keys.first(tile), end = keys.end(tile);
    const bool compact = keys.is_compact(tile);
#pragma unroll
    for (int pass = 0; pass < Plan::passes(kKeys); ++pass) {
      const int key = first + Plan::row(pass);
      exists_[pass] = key < end;
      token_[pass] = key >= end ? 0 : compact ? load(table.ends + key) : key;
    }
  }
  /// Into one stage, [2, kKeys, kD]: keys, then values.
  ATTAMBA_DEVICE void copy(bf16* stage, const bf16* k, const bf16* v, const Sizes& sizes, const Head& head) const {
    const auto place_of = [&](int pass, int) { return Place{head.key_element(sizes, token_[pass]), exists_[pass]}; };
    copy_rows<kD, kKeys, kThreads>(stage, k, sizes.d, place_of);
    copy_rows<kD, kKeys, kThreads>(stage + kKeys * kD, v, sizes.d, place_of);
  }

 private:
  using Plan = CopyPlan<kD, kThreads>;
  int token_[Plan::passes(kKeys)];
  bool exists_[Plan::passes(kKeys)];
};

/// Which keys of one kind the 16 rows of a warp see.
struct WarpKeys {
  Range thread[2];  ///< this thread's rows
  Range any, all;   ///< seen by at least one row, by every row

  /// Rows from `row` on; beyond the last one they count as that one.
  ATTAMBA_DEVICE WarpKeys(const Sizes& sizes, const Table& table, const Head& head, bool compact, int row) {
    const int own = row + device::lane_index() % 16, g = device::lane_index() / 4;
    const Range of_own = keys_of(table, compact, head.token(sizes, own < sizes.rows ? own : sizes.rows - 1));
    const auto keys_of_row = [&](int r) {
      return Range{static_cast<int>(device::shuffle(static_cast<std::uint32_t>(of_own.begin), r)),
                   static_cast<int>(device::shuffle(static_cast<std::uint32_t>(of_own.end), r))};
    };
    thread[0] = keys_of_row(g);
    thread[1] = keys_of_row(g + 8);
    const Range first = keys_of_row(0), last = keys_of_row(15);
    any = {first.begin, last.end};
    all = {last.begin, first.end};
  }
  ATTAMBA_DEVICE bool see_any(int from, int to) const { return from < any.end && to > any.begin; }
  ATTAMBA_DEVICE bool see_all(int from, int to) const { return from >= all.begin && to <= all.end; }
};

}  // namespace attamba::kernels::cuda::attention_parts
