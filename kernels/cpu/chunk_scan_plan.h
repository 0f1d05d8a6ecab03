// How the scan cuts its work (by the problem's size alone) and where everything lies in scratch.
//
// Rows are processed in windows of whole sequences, windows in blocks. A block is either a run of whole short chunks or a piece
// of one chunk longer than a block. Only such pieces hand a state on: the block after the cut owns a slot for its entry state.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/cpu/chunk_scan_simd.h"
#include "kernels/kernels.h"
#include "src/core/parallel.h"

namespace attamba::kernels::cpu::scan {

/// Widths of one SSM, padded to whole vectors: X is kept as Hs heads of head_pad, B and C as G groups of state_pad.
struct Geometry {
  std::int64_t hidden, state, heads, groups, conv;
  std::int64_t head, head_pad, state_pad;
  std::int64_t x_columns;   ///< Hs * head_pad
  std::int64_t columns;     ///< x_columns + 2 G state_pad: padded xBC
  std::int64_t projection;  ///< columns of zxbcdt
  std::int64_t block;       ///< Q, the most rows of a block
  std::int64_t block_pad;   ///< stride of per-head vectors over a block's rows: Q and one vector to read past it

  std::int64_t state_size() const { return heads * state * head_pad; }
  std::int64_t heads_per_group() const { return heads / groups; }
  std::int64_t b_column(std::int64_t group) const { return x_columns + group * state_pad; }
  std::int64_t c_column(std::int64_t group) const { return x_columns + (groups + group) * state_pad; }
  bool dense() const { return head == head_pad && state == state_pad; }
};

Geometry make_geometry(const ScanShape& shape, std::int64_t lanes);

/// Calls body(column of zxbcdt, padded column of xBC, count) for every contiguous run of channels of X, B and (if asked) C.
template <class Body>
void for_channels(const Geometry& g, bool with_c, const Body& body) {
  if (g.dense()) {
    body(g.hidden, std::int64_t{0}, with_c ? g.columns : g.c_column(0));
    return;
  }
  for (std::int64_t h = 0; h < g.heads; ++h) {
    body(g.hidden + h * g.head, h * g.head_pad, g.head);
  }
  for (std::int64_t j = 0; j < (with_c ? 2 : 1) * g.groups; ++j) {
    body(2 * g.hidden + j * g.state, g.b_column(j), g.state);
  }
}

/// Calls body(column of a [E] row, padded column, count) for every contiguous run of X's channels.
template <class Body>
void for_hidden(const Geometry& g, const Body& body) {
  if (g.head == g.head_pad) {
    body(std::int64_t{0}, std::int64_t{0}, g.hidden);
    return;
  }
  for (std::int64_t h = 0; h < g.heads; ++h) {
    body(h * g.head, h * g.head_pad, g.head);
  }
}

struct Block {
  std::int32_t begin, end;
  std::int32_t carry_in;   ///< slot of the state at its entry; -1 when its first row starts a chunk
  std::int32_t carry_out;  ///< slot of the next block, when this block's (one) chunk goes on there; or -1
};

/// Most rows of a window of a problem with `rows` rows, and what it can be cut into.
struct WindowLimits {
  std::int64_t rows, blocks, slots, ranges;
};
WindowLimits window_limits(const Geometry& g, std::int64_t rows, std::int64_t sequence_length, std::size_t accumulator_size);

/// Cuts rows [begin, end) into blocks; returns their number and the number of slots. slot_blocks[s] is the block that enters
/// with slot s. Throws when `starts` is not a table of chunk starts.
struct Cut {
  std::int64_t blocks, slots;
};
Cut cut_blocks(const Geometry& g, std::int64_t begin, std::int64_t end, std::int64_t sequence_length,
               const std::int32_t* starts, Block* blocks, std::int32_t* slot_blocks);

/// Hands out 64-byte aligned pieces of memory; without memory it only counts.
class Carver {
 public:
  explicit Carver(std::byte* memory) : memory_(memory) {}
  template <class V>
  V* take(std::int64_t count) {
    V* piece = memory_ == nullptr ? nullptr : reinterpret_cast<V*>(memory_ + used_);
    used_ += ScratchAllocator::aligned_bytes<V>(static_cast<std::size_t>(count));
    return piece;
  }
  std::size_t used() const { return used_; }

 private:
  std::byte* memory_;
  std::size_t used_ = 0;
};

/// What one thread needs for one block. Vectors over rows are [Hs, block_pad].
template <class A>
struct BlockScratch {
  A *active = nullptr, *y, *delta, *decay, *entry, *exit;  ///< active: xBC after the convolution [Q, columns]; y [Q, x_columns]
  A *transposed, *scores, *strict, *mixing, *scaled;
  A *slope, *dactive, *dy, *sigma, *ddelta, *dscores, *dmixing, *row_sums, *state_transposed;  ///< backward only

  static std::int64_t matrix(const Geometry& g) { return round_up(g.block, kLanes<A>) * round_up(g.block, kLanes<A>); }
  BlockScratch() = default;
  BlockScratch(Carver& carver, const Geometry& g, bool backward) {
    const std::int64_t rows = round_up(g.block, kLanes<A>), widest = std::max(g.state_pad, g.head_pad);
    active = carver.take<A>(g.block * g.columns);
    y = carver.take<A>(g.block * g.x_columns);
    for (A** piece : {&delta, &decay, &entry, &exit}) {
      *piece = carver.take<A>(g.heads * g.block_pad);
    }
    transposed = carver.take<A>(widest * rows);
    scaled = carver.take<A>(widest * rows);
    for (A** piece : {&scores, &strict, &mixing}) {
      *piece = carver.take<A>(matrix(g));
    }
    if (backward) {
      slope = carver.take<A>(g.block * g.columns);
      dactive = carver.take<A>(g.block * g.columns);
      dy = carver.take<A>(g.block * g.x_columns);
      sigma = carver.take<A>(g.heads * g.block_pad);
      ddelta = carver.take<A>(g.heads * g.block_pad);
      dscores = carver.take<A>(matrix(g));
      dmixing = carver.take<A>(matrix(g));
      row_sums = carver.take<A>(3 * g.block_pad);
      state_transposed = carver.take<A>(g.head_pad * round_up(g.state, kLanes<A>));
    }
  }
};

/// Gradients of the weights summed over one range of blocks, in padded layout.
template <class A>
struct Partial {
  A *conv, *norm, *a_log, *d_skip, *dt_bias;  ///< conv [W, columns], norm [x_columns], the others [Hs]

  static std::int64_t size(const Geometry& g) { return g.conv * g.columns + g.x_columns + 3 * round_up(g.heads, kLanes<A>); }
  Partial(A* memory, const Geometry& g) {
    conv = memory;
    norm = conv + g.conv * g.columns;
    a_log = norm + g.x_columns;
    d_skip = a_log + round_up(g.heads, kLanes<A>);
    dt_bias = d_skip + round_up(g.heads, kLanes<A>);
  }
};

/// Everything that is shared by the threads.
template <class A>
struct WindowScratch {
  Block* blocks;
  std::int32_t* slot_blocks;
  A *conv, *rate, *norm;    ///< taps [W, columns], A = -exp(A_log) [Hs], norm weight [x_columns], zero where padded
  A *states, *decays;       ///< entry states [slots, Hs, N, head_pad]; decay [slots, Hs] of the block before the slot
  A *dstates, *dy, *edges;  ///< backward: their gradients; dY of carried blocks [slots, Q, x_columns]; see conv_edges
  A* partials;              ///< backward: [ranges, Partial::size]

  WindowScratch(Carver& carver, const Geometry& g, const WindowLimits& limits, bool backward) {
    blocks = carver.take<Block>(limits.blocks);
    slot_blocks = carver.take<std::int32_t>(limits.slots);
    conv = carver.take<A>(g.conv * g.columns);
    rate = carver.take<A>(g.heads);
    norm = carver.take<A>(g.x_columns);
    states = carver.take<A>(limits.slots * g.state_size());
    decays = carver.take<A>(limits.slots * g.heads);
    if (backward) {
      dstates = carver.take<A>(limits.slots * g.state_size());
      dy = carver.take<A>(limits.slots * g.block * g.x_columns);
      edges = carver.take<A>(limits.slots * 2 * std::max<std::int64_t>(g.conv - 1, 0) * g.columns);
      partials = carver.take<A>(limits.ranges * Partial<A>::size(g));
    }
  }
};

/// Runs body(task, lane): tasks on the threads, a lane being a thread's own piece of scratch.
template <class Body>
void for_tasks(std::int64_t count, std::int64_t lanes, const Body& body) {
  const std::int64_t threads = omp_in_parallel() ? 1 : std::min({count, lanes, std::int64_t{thread_count()}});
  if (threads <= 1) {
    for (std::int64_t i = 0; i < count; ++i) {
      body(i, 0);
    }
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(static_cast <int>(threads))
  for (std::int64_t i = 0; i < count; ++i) {
    body(i, omp_get_thread_num());
  }
}

/// Bytes of scratch for a problem of `rows` rows: the shared part and one lane per thread.
template <class A>
std::size_t scratch_bytes(const ScanShape& shape, std::int64_t rows, std::int64_t sequence_length, bool backward) {
  const Geometry g = make_geometry(shape, kLanes<A>);
  Carver shared(nullptr), lane(nullptr);
  WindowScratch<A>(shared, g, window_limits(g, rows, sequence_length, sizeof(A)), backward);
  BlockScratch<A>(lane, g, backward);
  return shared.used() + static_cast<std::size_t>(thread_count()) * lane.used();
}

}  // namespace attamba::kernels::cpu::scan
