// The scan in one kernel each way, for bfloat16 and the models' shapes: matrix products on tensor cores, sums in float32.
//
// A block owns the chunks that begin in its ranges of kRange rows. It walks them in tiles of up to kRows rows, so that no state
// passes between blocks; a chunk longer than a tile hands its state on inside the block, through workspace. Where chunks may be
// longer than kLongestWalk, tiles after a walk's first one are shared out instead: each goes to the range in which it begins,
// and states at their entries are made before, in two launches (chunk_scan_fused_long.cu). Warps are laid out as strips of 16
// rows by halves of the heads: a strip's scores C B^T serve all heads of a group.
//
// A tile is worked on kWholeSlice columns at a time, those of several heads, in units of kUnit. A wider SSM has more such
// slices, which a block does one after the other; what couples them, sums of the norm over a row and of the scores' gradients
// over the heads, it adds up on its way. So the norm's sums are made before gradients are, and the forward kernel scales what
// it wrote.
//
// Matrix fragments are those of mma_16x8x16: with g = lane / 4 and q = lane % 4 a lane holds rows g and g + 8 and columns 2q,
// 2q + 1 of every 8. An accumulator's columns of 16 are the next product's operand as they lie.
#pragma once

#include <algorithm>
#include <bit>

#include "kernels/cuda/chunk_scan_plain.h"
#include "kernels/device/activations.h"

namespace attamba::kernels::cuda::scan {

using device::bf16;
using device::Bytes16;

constexpr int kWholeSlice = 256;  ///< columns of a slice of scans by chunks
constexpr int kUnit = 32;         ///< columns of a head that are worked on at a time
constexpr int kFusedTaps = 4;
constexpr int kRange = 32;                      ///< one ballot finds the first chunk
constexpr int kStripRows = 16, kTileRows = 48;  ///< most rows of a tile of scans by chunks
constexpr int kHalves = 2;
constexpr int kPadding = 8;                     ///< of rows in shared memory: those of a matrix load lie in different banks
constexpr int kConvRows = 8;                    ///< rows of a thread's piece of the convolution
constexpr std::int64_t kMostFusedBlocks = 512;  ///< each with the partial gradients of its ranges
constexpr std::int64_t kLongestWalk = 4 * kTileRows;
constexpr int kEdge = kFusedTaps - 1;  ///< rows that the convolution reaches back, or its gradient ahead

/// Whether tiles of a walk are shared out among blocks, for sequences of n rows.
inline bool shares_walks(const ScanShape& shape, std::int64_t n) {
  return (shape.longest_chunk > 0 ? std::min(shape.longest_chunk, n) : n) > kLongestWalk;
}
/// Whether the fused kernels serve this shape, for sequences of n rows: 4 taps, and 8 heads of 32 with N 32 in one or two
/// groups or N 128; or, where walks are not shared out, any number of slices in one group with heads of 32 and N 32, or heads
/// of 64 and N 32 or 64.
bool is_fused(const ScanShape& shape, std::int64_t n);
std::size_t fused_workspace(const ScanShape& shape, std::int64_t rows, bool shared_out);
std::size_t fused_backward_workspace(const ScanShape& shape, std::int64_t rows, bool shared_out);
void fused_forward(const Launch& launch, bf16* out, const Sizes& s, const Inputs<bf16>& in, bool shared_out);
void fused_backward(const Launch& launch, bf16* dzxbcdt, const WeightGradients& gradients, const bf16* dout, const Sizes& s,
                    const Inputs<bf16>& in, const ScanShape& shape, bool shared_out);

// What passes between tiles lies in workspace, in the slot of the rows where a tile begins; tiles of one walk are kTileRows
// apart.
inline std::size_t slots_of(std::int64_t rows) {
  return static_cast<std::size_t>(rows / kTileRows + 1);
}

// chunk_scan_fused_long.cu: between the launches of walks that are shared out. `kept` [slots, Hs] is the decay of the whole
// tile before, where one chunk fills it, or 0.
/// Fills states [slots, E N] at the entries of all tiles, and kept.
void long_states(const Launch& launch, const Sizes& s, const Inputs<bf16>& in, float* states, float* kept);
/// What each tile adds to the gradient of the state at its entry becomes that gradient.
void pass_gradients(const Launch& launch, const Sizes& s, const Inputs<bf16>& in, float* gradients, float* kept);
/// dxBC of the last rows before each tile: `rests` [slots, kEdge, channels], and what `edges` [slots, kEdge, channels] add.
void join_edges(const Launch& launch, const Sizes& s, const Inputs<bf16>& in, const float* rests, const float* edges,
                bf16* dzxbcdt);

inline std::int64_t fused_blocks(std::int64_t rows) {
  const std::int64_t ranges = (rows + kRange - 1) / kRange;
  return ranges < kMostFusedBlocks ? ranges : kMostFusedBlocks;
}

/// What a fused kernel is compiled for: N, G, the units of a head, and whether there may be several slices.
template <int kState_, int kGroups_, int kUnitsOfHead_, bool kSliced_>
struct Form {
  static constexpr int kState = kState_, kGroups = kGroups_, kUnitsOfHead = kUnitsOfHead_;
  static constexpr bool kSliced = kSliced_;
  static constexpr int kRows = kTileRows, kStrips = kRows / kStripRows;
  static constexpr int kThreads = kStrips * kHalves * device::kWarp, kWarps = kThreads / device::kWarp;
  static constexpr int kSlice = kWholeSlice, kUnits = kSlice / kUnit, kSliceStride = kSlice + kPadding;
  static constexpr int kHalf = kSlice / kHalves, kWarpUnits = kHalf / kUnit;  ///< of a warp: columns and units
  static constexpr int kSliceState = kSlice * kState;

  ATTAMBA_HOST_DEVICE static int slot_of(int begin) { return begin / kRows; }
};

/// Sizes of one slice, and where it lies in rows of the whole. All but the rows and what follows from the number of slices are
/// constants: places in shared memory become constants.
template <class F>
struct SliceSizes : Sizes {
  Sizes all;  ///< of the whole
  int units;  ///< of a head
  bool sliced;
  int slice;

  ATTAMBA_HOST_DEVICE explicit SliceSizes(const Sizes& given)
      : Sizes(given), all(given), units(F::kUnitsOfHead), sliced(F::kSliced), slice(0) {
    hidden = F::kSlice;
    state = F::kState;
    heads = F::kUnits / F::kUnitsOfHead;
    groups = F::kGroups;
    conv = kFusedTaps;
    head = kUnit * F::kUnitsOfHead;
    channels = hidden + 2 * F::kGroups * F::kState;
    first = 0;
    if constexpr (!F::kSliced) {
      projection = hidden + channels + heads;
      all = *this;
    }
  }

  /// Column in z, and in X.
  ATTAMBA_HOST_DEVICE int column() const { return slice * F::kSlice; }
  /// Among all heads.
  ATTAMBA_HOST_DEVICE int head_of(int own) const { return slice * heads + own; }
  /// Channels to convolve for the slice: B and C come with the first one.
  ATTAMBA_HOST_DEVICE int new_channels() const { return slice == 0 ? channels : hidden; }
  ATTAMBA_HOST_DEVICE bool is_last() const { return column() + F::kSlice == all.hidden; }
  /// Of a channel among those of the whole; B and C are every slice's.
  ATTAMBA_HOST_DEVICE int channel_of(int own) const { return own + (own < F::kSlice ? column() : all.hidden - F::kSlice); }
};

inline bool is_sliced(const Sizes& s) {
  return s.hidden != kWholeSlice || s.head != kUnit;
}
/// Calls body.operator()<Form>() for a shape that is_fused.
template <class Body>
void dispatch_whole(const Sizes& s, const Body& body) {
  if (s.state == 128) {
    body.template operator()<Form<128, 1, 1, false>>();
  } else if (s.groups == 1) {
    body.template operator()<Form<32, 1, 1, false>>();
  } else {
    body.template operator()<Form<32, 2, 1, false>>();
  }
}
template <class Body>
void dispatch_fused(const Sizes& s, const Body& body) {
  if (!is_sliced(s)) {
    dispatch_whole(s, body);
  } else if (s.head == kUnit) {
    body.template operator()<Form<32, 1, 1, true>>();
  } else if (s.state == 32) {
    body.template operator()<Form<32, 1, 2, true>>();
  } else {
    body.template operator()<Form<64, 1, 2, true>>();
  }
}

#ifdef __CUDACC__
/// The lowest bit that is set, 32 when none is.
ATTAMBA_DEVICE int first_bit(std::uint32_t bits) {
  return bits == 0 ? 32 : __ffs(static_cast<int>(bits)) - 1;
}
#else
inline int first_bit(std::uint32_t bits) {
  return std::countr_zero(bits);
}
#endif

// A thread's place, made anew for each part of a tile's work: what follows from it would otherwise be kept from part to part,
// in more registers than there are.
ATTAMBA_DEVICE int own_thread() {
  return device::opaque(device::thread_index());
}
ATTAMBA_DEVICE int own_lane() {
  return own_thread() % device::kWarp;
}
ATTAMBA_DEVICE int own_warp() {
  return own_thread() / device::kWarp;
}

/// Never true, which the compiler does not know. It moves no loads across a branch on it, so that unrolled work is read and
/// done part by part: all parts' values at once do not fit the registers. Each part asks with a number of its own, lest its
/// branch be taken for an earlier one's.
ATTAMBA_DEVICE bool never(const Sizes& s, int part) {
  return device::opaque(s.rows) == -1 - part;
}

constexpr float kLog2E = 1.442695040888963f;
ATTAMBA_DEVICE float sigmoid_fast(float x) {
  return device::sigmoid<bf16>(x);
}
ATTAMBA_DEVICE float low_half(std::uint32_t pair) {
  return device::to_float(bf16{static_cast<std::uint16_t>(pair & 0xffffu)});
}
ATTAMBA_DEVICE float high_half(std::uint32_t pair) {
  return device::to_float(bf16{static_cast<std::uint16_t>(pair >> 16)});
}
ATTAMBA_DEVICE std::uint32_t load_pair(const bf16* p) {
  return device::load(reinterpret_cast<const std::uint32_t*>(p));
}
ATTAMBA_DEVICE void store_pair(bf16* p, float low, float high) {
  device::store(reinterpret_cast<std::uint32_t*>(p), device::pack_bf16(low, high));
}

// ------------------------------------------------------------------------------------------------ fragments of stored matrices
/// First operand [16, 16] at (row, column) of a matrix with rows of `stride`.
ATTAMBA_DEVICE void load_left(std::uint32_t (&r)[4], const bf16* m, int stride, int row, int column, int lane) {
  device::load_matrix_x4(r, m + (row + lane % 16) * stride + column + lane / 16 * 8);
}
/// The same of the transposed matrix: operand (i, k) is stored (k, i), `row` and `column` being the stored one's.
ATTAMBA_DEVICE void load_left_transposed(std::uint32_t (&r)[4], const bf16* m, int stride, int row, int column, int lane) {
  device::load_matrix_x4_transposed(r, m + (row + lane % 8 + lane / 16 * 8) * stride + column + lane / 8 % 2 * 8);
}
/// Second operand [16, 16], two products' worth: r[0], r[1] for columns 0..7, r[2], r[3] for columns 8..15.
ATTAMBA_DEVICE void load_right(std::uint32_t (&r)[4], const bf16* m, int stride, int row, int column, int lane) {
  device::load_matrix_x4_transposed(r, m + (row + lane % 16) * stride + column + lane / 16 * 8);
}
ATTAMBA_DEVICE void load_right_transposed(std::uint32_t (&r)[4], const bf16* m, int stride, int row, int column, int lane) {
  device::load_matrix_x4(r, m + (row + lane % 8 + lane / 16 * 8) * stride + column + lane / 8 % 2 * 8);
}
/// d [16, 16] += a b, d's columns 0..7 in d[0] and 8..15 in d[1].
ATTAMBA_DEVICE void multiply(float (&d0)[4], float (&d1)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[4]) {
  device::mma_16x8x16(d0, a, {b[0], b[1]});
  device::mma_16x8x16(d1, a, {b[2], b[3]});
}
/// Accumulators [16, 16] as a first operand.
ATTAMBA_DEVICE void as_left(std::uint32_t (&r)[4], const float (&d0)[4], const float (&d1)[4]) {
  r[0] = device::pack_bf16(d0[0], d0[1]);
  r[1] = device::pack_bf16(d0[2], d0[3]);
  r[2] = device::pack_bf16(d1[0], d1[1]);
  r[3] = device::pack_bf16(d1[2], d1[3]);
}

// ------------------------------------------------------------------------------------------------ a block's walk
/// Rows of one tile; every warp knows them.
struct Tile {
  int begin, rows;  ///< first row of the window; none: the walk is over
  bool last;        ///< the next row is not the block's
};

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

ATTAMBA_HOST_DEVICE int strip_count(int rows) {
  return (rows + kStripRows - 1) / kStripRows;
}

// ------------------------------------------------------------------------------------------------ convolution and steps
/// Shared memory that both directions use. Rows after the tile's last one up to the end of their strip hold zeros.
template <class F>
struct Shared {
  bf16* active;  ///< [kRows, stride]: X, B, C
  int stride;
  float* conv;   ///< [kFusedTaps, channels]
  float* norm;   ///< [E]
  float* delta;  ///< [Hs, kRows]
  float* decay;  ///< [Hs, kRows], sum of log2 of the decays of rows 0..t
  int* starts;   ///< [kRows]

  ATTAMBA_DEVICE void take(const SliceSizes<F>& s, device::SharedMemory& shared) {
    stride = s.channels + kPadding;
    active = shared.take<bf16>(F::kRows * stride);
    conv = shared.take<float>(kFusedTaps * s.channels);
    norm = shared.take<float>(s.hidden);
    delta = shared.take<float>(s.heads * F::kRows);
    decay = shared.take<float>(s.heads * F::kRows);
    starts = shared.take<int>(F::kRows);
  }
  static std::size_t bytes(const SliceSizes<F>& s) {
    using device::SharedMemory;
    return SharedMemory::bytes_of<bf16>(F::kRows * (s.channels + kPadding)) +
           SharedMemory::bytes_of<float>(kFusedTaps * s.channels) + SharedMemory::bytes_of<float>(s.hidden) +
           2 * SharedMemory::bytes_of<float>(s.heads * F::kRows) + SharedMemory::bytes_of<int>(F::kRows);
  }
};

/// The slice's.
template <class F>
ATTAMBA_DEVICE void load_weights(const SliceSizes<F>& s, const Inputs<bf16>& in, const Shared<F>& shared) {
  for (int i = own_thread(); i < s.channels * kFusedTaps; i += F::kThreads) {
    const int channel = i / kFusedTaps, tap = i % kFusedTaps;
    device::store(shared.conv + tap * s.channels + channel, device::load(in.conv + s.channel_of(channel) * kFusedTaps + tap));
  }
  for (int i = own_thread(); i < s.hidden; i += F::kThreads) {
    device::store(shared.norm + i, device::load(in.norm + s.column() + i));
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
    const int channel = item % packs * kWide, first = item / packs * kConvRows, chunk = device::load(shared.starts + first);
    Bytes8 raw[kHistory + kConvRows];
#pragma unroll
    for (int i = 0; i < kHistory + kConvRows; ++i) {
      const int t = first - kHistory + i;
      raw[i] = Bytes8{};
      if (t >= chunk && t < tile.rows) {
        raw[i] = device::load(
            reinterpret_cast<const Bytes8*>(input_row(s, in, tile.begin + t) + s.all.hidden + s.channel_of(channel)));
      }
    }
    float weight[kFusedTaps][kWide], x[kFusedTaps][kWide] = {};  // x[j] is that of j rows before
    const auto unpack = [](float(&to)[kWide], const Bytes8& from) {
      to[0] = low_half(from.word[0]);
      to[1] = high_half(from.word[0]);
      to[2] = low_half(from.word[1]);
      to[3] = high_half(from.word[1]);
    };
#pragma unroll
    for (int j = 0; j < kFusedTaps; ++j) {
      const auto w = device::Pack<float>::read(shared.conv + (kFusedTaps - 1 - j) * s.channels + channel);
#pragma unroll
      for (int c = 0; c < kWide; ++c) {
        weight[j][c] = w.value[c];
      }
      if (j < kHistory) {
        unpack(x[j], raw[kHistory - 1 - j]);
      }
    }
#pragma unroll
    for (int i = 0; i < kConvRows; ++i) {
      const bool begins = device::load(shared.starts + first + i) == first + i;
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
          value[c] += weight[j][c] * x[j][c];
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

// ------------------------------------------------------------------------------------------------ states of long chunks
// A unit's state S [kUnit, N] lies in workspace as accumulators, so that a lane reads back what a second operand takes: per 16
// rows of S by 16 columns, per lane, columns 0..7's and 8..15's four values.
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
