// Where the tiles of the fused scans lie, those of chunks, which a block walks, and those of labels; and sums of states along
// tiles.
#pragma once

#include "kernels/cuda/chunk_scan_fused.h"

namespace attamba::kernels::cuda::scan {

/// First row at which a chunk of this range begins, or -1. Called by whole warps.
ATTAMBA_DEVICE int first_chunk(const Sizes& s, const Inputs<bf16>& in, int range) {
  const int row = range * kRange + own_lane();
  static_assert(kRange == device::kWarp);
  const int first = first_bit(device::ballot(row < s.rows && chunk_start(s, in, row) == row));
  return first < kRange ? range * kRange + first : -1;
}

/// The tile that begins at `begin`, of a block whose chunks begin before `limit`. Called by whole warps; the first one stores
/// starts [kTileRows], counted from the tile's first row, rows after the tile being chunks of their own.
ATTAMBA_DEVICE Tile cut_tile(const Sizes& s, const Inputs<bf16>& in, int begin, int limit, int* starts) {
  static_assert(kTileRows <= 2 * device::kWarp);
  const int thread = own_thread(), lane = thread % device::kWarp;
  std::uint32_t ends[2];
  int start[2];
  for (int i = 0; i < 2; ++i) {
    const int t = i * device::kWarp + lane, row = begin + t;
    start[i] = t < kTileRows && row < s.rows ? chunk_start(s, in, row) - begin : t;
    const bool outside = t < kTileRows && (row >= s.rows || (row >= limit && start[i] == t));
    ends[i] = device::ballot(outside);
  }
  const int inside = ends[0] != 0 ? first_bit(ends[0]) : device::kWarp + first_bit(ends[1]);
  const Tile tile{begin, inside < kTileRows ? inside : kTileRows, inside < kTileRows || begin + kTileRows >= s.rows};
  if (thread < device::kWarp) {
    for (int i = 0; i < 2; ++i) {
      const int t = i * device::kWarp + lane;
      if (t < kTileRows) {
        device::store(starts + t, t < tile.rows ? start[i] : t);
      }
    }
  }
  return tile;
}

/// The tile of an earlier range's walk, after its first one, that begins in this range's rows: its first row, or -1. Its chunk
/// fills it up to its end. Called by whole warps.
ATTAMBA_DEVICE int shared_tile(const Sizes& s, const Inputs<bf16>& in, int range) {
  const int row = range * kRange, chunk = chunk_start(s, in, row);
  if (chunk == row) {
    return -1;
  }
  const int walk = first_chunk(s, in, chunk / kRange), tile = walk + (row - walk + kTileRows - 1) / kTileRows * kTileRows;
  return tile < row + kRange && tile < s.rows && chunk_start(s, in, tile) == chunk ? tile : -1;
}

/// Start of the chunk that goes on after a full tile, counted from the tile's first row; kTileRows when none does.
ATTAMBA_DEVICE int leaving_chunk(const Sizes& s, const Inputs<bf16>& in, const Tile& tile) {
  const int next = tile.begin + kTileRows, start = chunk_start(s, in, next);
  return start < next ? start - tile.begin : kTileRows;
}

/// Tile `index` of labels. Stores starts [-kEdge .. kRows), as in Shared, rows after the tile's last one being like no other.
template <class F>
ATTAMBA_DEVICE Tile label_tile(const Sizes& s, const Inputs<bf16>& in, int index, int* starts) {
  const int begin = index * F::kRows, rows = s.rows - begin < F::kRows ? s.rows - begin : F::kRows;
  const std::int32_t* labels = in.labels + begin;
  for (int t = own_thread() - kEdge; t < F::kRows; t += F::kThreads) {
    int start = t < 0 ? F::kRows : t;
    if (t < rows && begin + t >= 0) {
      const std::int32_t label = device::load(labels + t);
      if (begin > 0 && device::load(labels - 1) == label) {
        start = -1;
      } else {
        for (start = 0; start < rows && device::load(labels + start) != label;) {
          ++start;
        }
        start = start < rows ? start : F::kRows;
      }
    }
    device::store(starts + t, start);
  }
  return {begin, rows, begin + rows >= s.rows};
}

/// The start of the rows of a tile of labels whose state leaves it; kRows where none does. Its starts are there.
template <class F>
ATTAMBA_DEVICE int leaving_label(const Tile& tile, const int* starts) {
  return tile.last ? F::kRows : device::load(starts + F::kRows - 1);
}

// ------------------------------------------------------------------------------------------------ sums along tiles
constexpr int kPassThreads = 256, kPassElements = 4, kPassBatch = 8;
/// Blocks for the elements of a state.
inline int pass_pieces(const Sizes& s) {
  constexpr int kPiece = kPassThreads * kPassElements;
  return (s.state_size() + kPiece - 1) / kPiece;
}

/// kPassElements elements of states, from `element` on: value_i += kept * value_{i - 1} over `tiles` slots from `slot` on, or,
/// backwards, kept * value_{i + 1}, several tiles' values being read at once. `kept` of a slot belongs to the step into it from
/// the tile before; into the first one nothing is taken over.
ATTAMBA_DEVICE void pass_along(const Sizes& s, float* values, const float* kept, int slot, int tiles, int element,
                               bool backwards) {
  const int head = element / (s.state_size() / s.heads);
  float carry[kPassElements] = {};
  for (int first = 0; first < tiles; first += kPassBatch) {
    device::Pack<float> pack[kPassBatch];
    float decay[kPassBatch];
#pragma unroll
    for (int i = 0; i < kPassBatch; ++i) {
      if (first + i < tiles) {
        const int at = slot + (backwards ? tiles - 1 - first - i : first + i);
        pack[i] = device::Pack<float>::read(values + static_cast<std::int64_t>(at) * s.state_size() + element);
        const bool chained = first + i > 0;  // the first one takes over nothing
        decay[i] = chained ? device::load(kept + (backwards ? at + 1 : at) * s.heads + head) : 0.0f;
      }
    }
#pragma unroll
    for (int i = 0; i < kPassBatch; ++i) {
      if (first + i < tiles) {
        const int at = slot + (backwards ? tiles - 1 - first - i : first + i);
#pragma unroll
        for (int e = 0; e < kPassElements; ++e) {
          carry[e] = pack[i].value[e] + decay[i] * carry[e];
          pack[i].value[e] = carry[e];
        }
        pack[i].write(values + static_cast<std::int64_t>(at) * s.state_size() + element);
      }
    }
  }
}

}  // namespace attamba::kernels::cuda::scan
