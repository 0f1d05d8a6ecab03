// The scan in one kernel each way, for bfloat16 and the models' shapes: matrix products on tensor cores, sums in float32.
//
// A block owns the chunks that begin in its ranges of kRange rows. It walks them in tiles of up to kTileRows rows, so that no
// state passes between blocks; a chunk longer than a tile hands its state on inside the block, through workspace. Where chunks
// may be longer than kLongestWalk, tiles after a walk's first one are shared out instead: each goes to the range in which it
// begins, and states at their entries are made before, in two launches (chunk_scan_fused_long.cu). So it is with labels, where
// each tile may hand a state on to the next one. Warps are laid out as strips of 16 rows by halves of the heads: a strip's
// scores C B^T serve all heads of a group.
//
// A tile is worked on a slice of columns at a time, those of several heads, in units of kUnit. A wide SSM has several slices,
// which a block does one after the other; what couples them, sums of the norm over a row and of the scores' gradients over the
// heads, it adds up on its way. So the norm's sums are made before gradients are, and the forward kernel scales what it wrote.
//
// Headers, in the order in which they build on each other: _tile.h has a tile in shared memory, convolved, and _walk.h where
// tiles lie; _mix.h makes Y and states, and _output.h the rest of the forward pass of a tile. Backwards, _gate.h goes through
// norm and gate, _pairs.h through pairs of rows, _convolve.h through the convolution, and _gradient.h puts them together for a
// tile.
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

constexpr int kWholeSlice = 256;  ///< columns of a slice, but for large states
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
/// Whether there are fused kernels for this shape: 4 taps, rows of zxbcdt that are multiples of 16 bytes, and one of
///  - 8 heads of 32 with N 32 in one or two groups, or with N 128 in one,
///  - E a multiple of 256, one group, heads of 32 with N 32, or of 64 with N 32, 64 or 128,
///  - heads of 64 with N 128 and a group each;
/// the last two with 256 heads at most, of which shared memory holds sums.
bool is_fused(const ScanShape& shape);
std::size_t fused_workspace(const ScanShape& shape, std::int64_t rows, bool shared_out);
std::size_t fused_backward_workspace(const ScanShape& shape, std::int64_t rows, bool shared_out);
void fused_forward(const Launch& launch, bf16* out, const Sizes& s, const Inputs<bf16>& in, bool shared_out);
void fused_backward(const Launch& launch, bf16* dzxbcdt, const WeightGradients& gradients, const bf16* dout, const Sizes& s,
                    const Inputs<bf16>& in, bool shared_out);

/// fused_backward of shapes that have slices (chunk_scan_fused_backward_sliced.cu).
void sliced_backward(const Launch& launch, bf16* dzxbcdt, const WeightGradients& gradients, const bf16* dout, const Sizes& s,
                     const Inputs<bf16>& in, bool shared_out);

// chunk_scan_fused_long.cu: between the launches of walks that are shared out. `kept` [slots, Hs] is the decay of the whole
// tile before, where one chunk fills it, or 0.
/// Fills states [slots, E N] at the entries of all tiles, and kept.
void long_states(const Launch& launch, const Sizes& s, const Inputs<bf16>& in, float* states, float* kept);
/// What each tile adds to the gradient of the state at its entry becomes that gradient.
void pass_gradients(const Launch& launch, const Sizes& s, const Inputs<bf16>& in, float* gradients, float* kept);
/// dxBC of the last rows before each tile: `rests` [slots, kEdge, channels], and what `edges` [slots, kEdge, channels] add.
void join_edges(const Launch& launch, const Sizes& s, const Inputs<bf16>& in, const float* rests, const float* edges,
                bf16* dzxbcdt);

// label_scan_fused.cu, label_scan_fused_backward.cu: the same with labels.
/// Whether there are fused kernels with labels for this shape: 4 taps, 8 heads of 32, one group, N 32 or 128.
bool is_fused_by_label(const ScanShape& shape);
std::size_t fused_label_workspace(const ScanShape& shape, std::int64_t rows);
std::size_t fused_label_backward_workspace(const ScanShape& shape, std::int64_t rows);
void fused_label_forward(const Launch& launch, bf16* out, const Sizes& s, const Inputs<bf16>& in);
void fused_label_backward(const Launch& launch, bf16* dzxbcdt, const WeightGradients& gradients, const bf16* dout,
                          const Sizes& s, const Inputs<bf16>& in);
/// As long_states: states [slots, E N] at the entries of all tiles but the first one, and kept [slots, Hs].
void label_states(const Launch& launch, const Sizes& s, const Inputs<bf16>& in, float* states, float* kept);
/// As pass_gradients.
void pass_label_gradients(const Launch& launch, const Sizes& s, float* gradients, const float* kept);

/// How an SSM that is wider than a slice is cut: B and C are those of all slices, or each head has its own.
enum class Slices { none, of_one_group, of_own_groups };

/// What a fused kernel is compiled for: N, the groups and units of a head in a slice, slices, and whether rows mix by labels.
template <int kState_, int kGroups_, int kUnitsOfHead_, Slices kSlices, bool kByLabel_ = false>
struct Form {
  static constexpr int kState = kState_, kGroups = kGroups_, kUnitsOfHead = kUnitsOfHead_;
  static constexpr bool kSliced = kSlices != Slices::none, kOwnGroups = kSlices == Slices::of_own_groups;
  static constexpr bool kByLabel = kByLabel_;
  static constexpr int kRows = kByLabel ? int{kLabelBlock} : kTileRows, kStrips = kRows / kStripRows;
  static constexpr int kThreads = kStrips * kHalves * device::kWarp, kWarps = kThreads / device::kWarp;
  static constexpr int kBlocks = kByLabel || kOwnGroups ? 1 : 2;  ///< of a multiprocessor, at least
  static constexpr int kTapParts = kOwnGroups ? 2 : 1;            ///< in which the taps' gradients of a slice are made
  /// With a large state slices are narrow: registers are few, and shared memory of sm_86 is small.
  static constexpr int kSlice = kSliced && kState > 64 ? kWholeSlice / 2 : kWholeSlice;
  static constexpr int kUnits = kSlice / kUnit, kSliceStride = kSlice + kPadding;
  static constexpr int kHalf = kSlice / kHalves, kWarpUnits = kHalf / kUnit;  ///< of a warp: columns and units
  static constexpr int kSliceState = kSlice * kState;

  // What passes between tiles lies in workspace, in the slot of the rows where a tile begins; tiles of one walk are kRows
  // apart.
  ATTAMBA_HOST_DEVICE static int slot_of(int begin) { return begin / kRows; }
  static std::size_t slots(std::int64_t rows) { return static_cast<std::size_t>(rows / kRows + 1); }
  static std::int64_t blocks(std::int64_t rows) {
    constexpr std::int64_t kOwn = kByLabel ? kRows : kRange;
    return std::min((rows + kOwn - 1) / kOwn, kMostFusedBlocks / (kByLabel ? 2 : 1));  // of two ranges
  }
};

/// Sizes of one slice, and where it lies in rows of the whole. All but the rows and what follows from the number of slices are
/// constants: places in shared memory become constants.
template <class F>
struct SliceSizes : Sizes {
  Sizes all;  ///< of the whole
  int units;  ///< of a head
  int slice;

  ATTAMBA_HOST_DEVICE explicit SliceSizes(const Sizes& given) : Sizes(given), all(given), units(F::kUnitsOfHead), slice(0) {
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
  /// Channels to convolve for the slice: B and C that are every slice's come with the first one.
  ATTAMBA_HOST_DEVICE int new_channels() const { return F::kOwnGroups || slice == 0 ? channels : hidden; }
  /// Whether no later slice has the same B and C.
  ATTAMBA_HOST_DEVICE bool ends_group() const { return F::kOwnGroups || column() + F::kSlice == all.hidden; }
  /// Of a channel among those of the whole.
  ATTAMBA_HOST_DEVICE int channel_of(int own) const {
    if (own < F::kSlice) {
      return column() + own;
    }
    if constexpr (!F::kOwnGroups) {
      return all.hidden - F::kSlice + own;
    }
    constexpr int kBOfSlice = F::kGroups * F::kState, kEndOfB = F::kSlice + kBOfSlice;
    const int b = all.hidden + slice * kBOfSlice, c = b + all.groups * F::kState;
    return own < kEndOfB ? b + own - F::kSlice : c + own - kEndOfB;
  }
};

/// A body that only asks.
struct AnyForm {
  template <class F>
  void operator()() const {}
};
/// Calls body.operator()<Form>() for a shape that there are fused kernels for, of one slice; returns whether there are.
template <class Body>
bool dispatch_whole(const Sizes& s, const Body& body) {
  const bool whole = s.hidden == kWholeSlice && s.head == kUnit;
  if (whole && s.state == 32 && s.groups == 1) {
    body.template operator()<Form<32, 1, 1, Slices::none>>();
  } else if (whole && s.state == 32 && s.groups == 2) {
    body.template operator()<Form<32, 2, 1, Slices::none>>();
  } else if (whole && s.state == 128 && s.groups == 1) {
    body.template operator()<Form<128, 1, 1, Slices::none>>();
  } else {
    return false;
  }
  return true;
}
/// The same of several slices, or of one whose heads are wide.
template <class Body>
bool dispatch_sliced(const Sizes& s, const Body& body) {
  constexpr int kMostHeads = 256;
  const bool few = s.heads <= kMostHeads, wide = few && s.head == 2 * kUnit;
  const bool one_group = few && s.groups == 1 && s.hidden % kWholeSlice == 0;
  if (one_group && s.head == kUnit && s.state == 32) {
    body.template operator()<Form<32, 1, 1, Slices::of_one_group>>();
  } else if (one_group && wide && s.state == 32) {
    body.template operator()<Form<32, 1, 2, Slices::of_one_group>>();
  } else if (one_group && wide && s.state == 64) {
    body.template operator()<Form<64, 1, 2, Slices::of_one_group>>();
  } else if (one_group && wide && s.state == 128) {
    body.template operator()<Form<128, 1, 2, Slices::of_one_group>>();
  } else if (s.groups == s.heads && wide && s.heads % 2 == 0 && s.state == 128) {
    body.template operator()<Form<128, 2, 2, Slices::of_own_groups>>();
  } else {
    return false;
  }
  return true;
}
template <class Body>
bool dispatch_fused(const Sizes& s, const Body& body) {
  return dispatch_whole(s, body) || dispatch_sliced(s, body);
}
/// The same with labels.
template <class Body>
bool dispatch_by_label(const Sizes& s, const Body& body) {
  const bool whole = s.hidden == kWholeSlice && s.head == kUnit && s.groups == 1;
  if (whole && s.state == 32) {
    body.template operator()<Form<32, 1, 1, Slices::none, true>>();
  } else if (whole && s.state == 128) {
    body.template operator()<Form<128, 1, 1, Slices::of_one_group, true>>();
  } else {
    return false;
  }
  return true;
}

/// Of workspace that Memory(s, arguments..., take) takes.
template <class Memory, class... Arguments>
std::size_t bytes_of_memory(const Sizes& s, Arguments... arguments) {
  std::size_t bytes = 0;
  Memory(s, arguments..., [&](std::size_t count) -> float* {
    bytes += ScratchAllocator::aligned_bytes<float>(count);
    return nullptr;
  });
  return bytes;
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

/// Rows of one tile; every warp knows them.
struct Tile {
  int begin, rows;  ///< first row of the window; none: the walk is over
  bool last;        ///< the next row is not the block's
};

ATTAMBA_HOST_DEVICE int strip_count(int rows) {
  return (rows + kStripRows - 1) / kStripRows;
}

}  // namespace attamba::kernels::cuda::scan
