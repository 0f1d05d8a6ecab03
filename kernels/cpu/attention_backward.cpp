// Gradients of attention (attention.cpp), with P recomputed from lse:
//
//   delta = rowsum(dout * out);  dS = P * (dout v^T - delta);  dq = dS k / sqrt(d);  dk = dS^T q / sqrt(d);  dv = P^T dout
//
// One task per (sequence, key/value head), which alone accumulates that head's dk and dv over the sequence's blocks of queries.
#include <cmath>

#include "kernels/cpu/attention_blocks.h"

namespace attamba::kernels::cpu {
namespace {

using namespace tiles;

/// Scratch of one running backward task.
template <class A, class Take>
struct BackwardScratch {
  std::int64_t distance, columns;  ///< of rows of d elements: their distance in tiles, and in the sums over the sequence
  A *q, *dout, *dq;                ///< [rows, d]
  A *q_panels, *dout_panels;       ///< transposed panels [d] x rows
  A *k, *v;                        ///< [keys, d]
  A *p, *ds;                       ///< [keys, rows]
  A *dk[2], *dv[2];                ///< sums of the whole sequence, [n, d]: over local keys, over compact keys

  BackwardScratch(std::int64_t d, std::int64_t n, Take&& take) : distance(row_distance<A>(d)), columns(padded<A>(d)) {
    for (A** rows : {&q, &dout, &dq}) {
      *rows = take(kMaxRows * distance);
    }
    for (A** panels : {&q_panels, &dout_panels}) {
      *panels = take(kMaxRows * columns);
    }
    for (A** keys : {&k, &v}) {
      *keys = take(kMaxKeys * distance);
    }
    for (A** scores : {&p, &ds}) {
      *scores = take(kMaxKeys * kScoreDistance<A>);
    }
    for (A** sums : {&dk[0], &dk[1], &dv[0], &dv[1]}) {
      *sums = take(n * columns);
    }
  }
};

/// p = exp(S - lse), ds = p * (dP - delta) in place, for the lanes [lane, lane + kPanel) of the tile's keys.
template <class A>
void softmax_gradient(A* p, A* ds, const KeyTile& tile, const KeyRange& keys, std::int64_t lane, const A* lse, const A* delta) {
  constexpr std::int64_t kLanes = kPanel<A>;
  for (std::int64_t i = keys.from; i < keys.to; ++i) {
    A* s = p + i * kScoreDistance<A> + lane;
    A* g = ds + i * kScoreDistance<A> + lane;
    if (!tile.full(i, lane, kLanes)) {
      const auto from = static_cast<std::int32_t>(tile.row_from[i] - lane),
                 to = static_cast<std::int32_t>(tile.row_to[i] - lane);
#pragma omp simd
      for (std::int32_t l = 0; l < kLanes; ++l) {
        const A value = fast_exp(s[l] - lse[lane + l]);
        const A gradient = value * (g[l] - delta[lane + l]);
        s[l] = l >= from && l < to ? value : A(0);
        g[l] = l >= from && l < to ? gradient : A(0);
      }
    } else {
#pragma omp simd
      for (std::int64_t l = 0; l < kLanes; ++l) {
        s[l] = fast_exp(s[l] - lse[lane + l]);
        g[l] = s[l] * (g[l] - delta[lane + l]);
      }
    }
  }
}

template <class T>
struct BackwardArguments {
  T *dq, *dk, *dv;
  const T *dout, *out;
  const Accumulator<T>* lse;
  const T *q, *k, *v;
};

/// lse and delta = rowsum(dout * out) of each row.
template <class T, class A, class Scratch>
void load_statistics(A* lse, A* delta, const Block& block, const Sizes& sizes, const BackwardArguments<T>& arguments,
                     const Scratch& scratch) {
  load_queries(scratch.dq, scratch.distance, arguments.out, block, sizes, A(1));  // dq is not needed yet
  for (std::int64_t r = 0; r < block.rows; ++r) {
    const A *out = scratch.dq + r * scratch.distance, *dout = scratch.dout + r * scratch.distance;
    A total = 0;
#pragma omp simd reduction(+ : total)
    for (std::int64_t c = 0; c < sizes.d; ++c) {
      total += dout[c] * out[c];
    }
    lse[r] = arguments.lse[block.index(r, sizes.heads)];
    delta[r] = total;
  }
}

/// dq of one block, and its share of the sums in scratch.dk and scratch.dv.
template <class T, class A, class Scratch>
void backward_block(const Block& block, const Sizes& sizes, const TablePointers& table, const BackwardArguments<T>& arguments,
                    const Scratch& scratch) {
  const std::int64_t distance = scratch.distance, columns = scratch.columns;
  const std::int64_t sequence_start = block.token / sizes.n * sizes.n;
  const A scale = A(1) / std::sqrt(static_cast<A>(sizes.d));
  load_queries(scratch.q, distance, arguments.q, block, sizes, scale);
  load_queries(scratch.dout, distance, arguments.dout, block, sizes, A(1));
  transpose_panels(scratch.q_panels, scratch.q, distance, block.rows, sizes.d);
  transpose_panels(scratch.dout_panels, scratch.dout, distance, block.rows, sizes.d);
  alignas(64) A lse[kMaxRows] = {}, delta[kMaxRows] = {};
  load_statistics(lse, delta, block, sizes, arguments, scratch);
  std::fill_n(scratch.dq, block.rows * distance, A(0));
  Strips strips;
  for_each_tile(block, sizes, table, arguments.k, arguments.v, scratch, [&](const KeyTile& tile, bool is_compact) {
    for (std::int64_t lane = 0; lane < block.rows; lane += kPanel<A>) {
      const KeyRange keys = tile.keys_of(lane, block.last_row(lane, kPanel<A>));
      panel_product(keys.from, keys.to, scratch.p + lane, kScoreDistance<A>, scratch.k, distance,
                    scratch.q_panels + lane * sizes.d, sizes.d);
      panel_product(keys.from, keys.to, scratch.ds + lane, kScoreDistance<A>, scratch.v, distance,
                    scratch.dout_panels + lane * sizes.d, sizes.d);
      softmax_gradient(scratch.p, scratch.ds, tile, keys, lane, lse, delta);
      clear_outside(scratch.p, tile, keys, lane);
      clear_outside(scratch.ds, tile, keys, lane);
    }
    const std::int64_t key = (tile.first - sequence_start) * columns;
    strips.cut(tile.count, [&](std::int64_t first, std::int64_t last) { return tile.rows_of(first, last); });
    add_products<false>(strips, columns, scratch.dv[is_compact] + key, columns, scratch.p, kScoreDistance<A>, scratch.dout,
                        distance);
    add_products<false>(strips, columns, scratch.dk[is_compact] + key, columns, scratch.ds, kScoreDistance<A>, scratch.q,
                        distance);
    strips.cut(block.rows, [&](std::int64_t first, std::int64_t last) { return tile.keys_of(first, last); });
    add_products<true>(strips, columns, scratch.dq, distance, scratch.ds, kScoreDistance<A>, scratch.k, distance);
  });
  store_rows(
      arguments.dq, sizes.d, scratch.dq, distance, block.rows, [&](std::int64_t) { return scale; },
      [&](std::int64_t r) { return block.index(r, sizes.heads); });
}

/// All blocks of one sequence and key/value head; then its dk and dv, each row rounded once.
template <class T, class A, class Scratch>
void backward_head(std::int64_t sequence, std::int64_t kv_head, const Sizes& sizes, const TablePointers& table,
                   const BackwardArguments<T>& arguments, const Scratch& scratch) {
  const std::int64_t start = sequence * sizes.n, last = start + sizes.n - 1, columns = scratch.columns;
  const std::int64_t first_end = table.key_begin[start], end = table.key_end[last];
  for (int i = 0; i < 2; ++i) {
    std::fill_n(i == 0 ? scratch.dk[0] : scratch.dv[0], sizes.n * columns, A(0));
    std::fill_n((i == 0 ? scratch.dk[1] : scratch.dv[1]) + (first_end - start) * columns, (end - first_end) * columns, A(0));
  }
  for (std::int64_t b = 0; b < sizes.blocks(); ++b) {
    for (std::int64_t h = 0; h < sizes.head_blocks; ++h) {
      backward_block<T, A>(Block(sizes, table, sequence, kv_head, b, h), sizes, table, arguments, scratch);
    }
  }
  for (int i = 0; i < 2; ++i) {
    A* const* sums = i == 0 ? scratch.dk : scratch.dv;
    T* out = i == 0 ? arguments.dk : arguments.dv;
    for (std::int64_t j = first_end; j < end; ++j) {
      for (std::int64_t c = 0; c < sizes.d; ++c) {
        sums[0][(table.ends[j] - start) * columns + c] += sums[1][(j - start) * columns + c];
      }
    }
    store_rows(
        out, sizes.d, sums[0], columns, sizes.n, [](std::int64_t) { return A(1); },
        [&](std::int64_t t) { return (start + t) * sizes.kv_heads + kv_head; });
  }
}

std::size_t backward_slot(const TensorType& q, const Sizes& sizes) {
  std::size_t bytes = 0;
  dispatch_floating(q.dtype, "attention_backward", [&]<class T>() {
    using A = Accumulator<T>;
    BackwardScratch<A, Counter<A>>(sizes.d, sizes.n, Counter<A>{&bytes});
  });
  return bytes;
}

}  // namespace

void attention_backward(const Launch& launch, const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& dout,
                        const Tensor& out, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
                        const AttentionTable& table, std::int64_t sequence_length) {
  check_attention_backward(dq, dk, dv, dout, out, lse, q, k, v, table, sequence_length);
  const Sizes sizes(q.type, k.type, sequence_length);
  const TablePointers pointers = checked(table, sizes);
  dispatch_floating(q.dtype(), "attention_backward", [&]<class T>() {
    using A = Accumulator<T>;
    const BackwardArguments<T> arguments = {dq.as<T>(),  dk.as<T>(), dv.as<T>(), dout.as<T>(), out.as<T>(),
                                            lse.as<A>(), q.as<T>(),  k.as<T>(),  v.as<T>()};
    run_in_slots(launch, backward_slot(q.type, sizes), sizes.sequences() * sizes.kv_heads,
                 [&](std::int64_t task, const Launch& own) {
                   ScratchAllocator allocator(own);
                   const BackwardScratch<A, Taker<A>> scratch(sizes.d, sizes.n, Taker<A>{&allocator});
                   backward_head<T, A>(task / sizes.kv_heads, task % sizes.kv_heads, sizes, pointers, arguments, scratch);
                 });
  });
}

std::size_t attention_backward_workspace(const TensorType& q, const TensorType& k, std::int64_t sequence_length) {
  return backward_slot(q, Sizes(q, k, sequence_length)) * static_cast<std::size_t>(thread_count());
}

}  // namespace attamba::kernels::cpu
