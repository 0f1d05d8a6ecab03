// Attention over compact and local keys (kernels::AttentionTable) in blocks of queries against tiles of keys, with online
// softmax:
//
//   S = q k^T / sqrt(d);  P = exp(S - lse);  out = P v
//
// Work and memory follow the keys that the table allows; nothing of size n x n exists. One task per (block of queries,
// key/value head); threads only choose which scratch slot a task runs in.
#include <cmath>
#include <limits>

#include "kernels/cpu/attention_blocks.h"

namespace attamba::kernels::cpu {
namespace {

using namespace tiles;

/// Below this a score is masked: far under any real score, yet differences with it stay finite.
template <class A>
constexpr A kMasked = std::numeric_limits<A>::lowest() / 4;

/// Scratch of one running forward task, also what its size is computed from.
template <class A, class Take>
struct ForwardScratch {
  std::int64_t distance;                 ///< of rows of d elements
  A *queries, *k, *v, *scores, *output;  ///< transposed panels [d] x rows; [keys, d]; [keys, d]; [keys, rows]; [rows, d]

  ForwardScratch(std::int64_t d, Take&& take) : distance(row_distance<A>(d)) {
    queries = take(kMaxRows * padded<A>(d));
    k = take(kMaxKeys * distance);
    v = take(kMaxKeys * distance);
    scores = take(kMaxKeys * kScoreDistance<A>);
    output = take(kMaxRows * distance);
  }
};

/// One online-softmax step of the lanes [lane, lane + kPanel): turns scores into P = exp(S - maximum), and sets `rescale` to
/// what earlier sums and outputs must be multiplied with.
template <class A>
void softmax_step(A* scores, const KeyTile& tile, const KeyRange& keys, std::int64_t lane, A* maximum, A* sum, A* rescale) {
  constexpr std::int64_t kLanes = kPanel<A>;
  A highest[kLanes], total[kLanes];
  std::copy_n(maximum + lane, kLanes, highest);
  for (std::int64_t i = keys.from; i < keys.to; ++i) {
    A* s = scores + i * kScoreDistance<A> + lane;
    if (!tile.full(i, lane, kLanes)) {
      const auto from = static_cast<std::int32_t>(tile.row_from[i] - lane),
                 to = static_cast<std::int32_t>(tile.row_to[i] - lane);
#pragma omp simd
      for (std::int32_t l = 0; l < kLanes; ++l) {
        s[l] = l >= from && l < to ? s[l] : -std::numeric_limits<A>::infinity();
      }
    }
#pragma omp simd
    for (std::int64_t l = 0; l < kLanes; ++l) {
      highest[l] = s[l] > highest[l] ? s[l] : highest[l];
    }
  }
#pragma omp simd
  for (std::int64_t l = 0; l < kLanes; ++l) {
    rescale[lane + l] = fast_exp(maximum[lane + l] - highest[l]);
    total[l] = sum[lane + l] * rescale[lane + l];
  }
  for (std::int64_t i = keys.from; i < keys.to; ++i) {
    A* s = scores + i * kScoreDistance<A> + lane;
#pragma omp simd
    for (std::int64_t l = 0; l < kLanes; ++l) {
      const A p = fast_exp(s[l] - highest[l]);
      s[l] = s[l] < kMasked<A> ? A(0) : p;
      total[l] += s[l];
    }
  }
  std::copy_n(highest, kLanes, maximum + lane);
  std::copy_n(total, kLanes, sum + lane);
}

template <class T>
struct ForwardArguments {
  T* out;
  Accumulator<T>* lse;
  const T *q, *k, *v;
};

template <class T, class A, class Scratch>
void forward_block(const Block& block, const Sizes& sizes, const TablePointers& table, const ForwardArguments<T>& arguments,
                   const Scratch& scratch) {
  const std::int64_t distance = scratch.distance, columns = padded<A>(sizes.d);
  load_queries(scratch.output, distance, arguments.q, block, sizes, A(1) / std::sqrt(static_cast<A>(sizes.d)));
  transpose_panels(scratch.queries, scratch.output, distance, block.rows, sizes.d);
  std::fill_n(scratch.output, block.rows * distance, A(0));
  alignas(64) A maximum[kMaxRows], sum[kMaxRows] = {}, rescale[kMaxRows];
  std::fill_n(maximum, kMaxRows, kMasked<A>);
  Strips strips;
  for_each_tile(block, sizes, table, arguments.k, arguments.v, scratch, [&](const KeyTile& tile, bool /*is_compact*/) {
    for (std::int64_t lane = 0; lane < block.rows; lane += kPanel<A>) {
      const KeyRange keys = tile.keys_of(lane, block.last_row(lane, kPanel<A>));
      panel_product(keys.from, keys.to, scratch.scores + lane, kScoreDistance<A>, scratch.k, distance,
                    scratch.queries + lane * sizes.d, sizes.d);
      softmax_step(scratch.scores, tile, keys, lane, maximum, sum, rescale);
      clear_outside(scratch.scores, tile, keys, lane);
    }
    for (std::int64_t r = 0; r < block.rows; ++r) {
      if (rescale[r] != A(1)) {
        for (std::int64_t c = 0; c < columns; ++c) {
          scratch.output[r * distance + c] *= rescale[r];
        }
      }
    }
    strips.cut(block.rows, [&](std::int64_t first, std::int64_t last) { return tile.keys_of(first, last); });
    add_products<true>(strips, columns, scratch.output, distance, scratch.scores, kScoreDistance<A>, scratch.v, distance);
  });
  const auto index = [&](std::int64_t r) { return block.index(r, sizes.heads); };
  store_rows(
      arguments.out, sizes.d, scratch.output, distance, block.rows, [&](std::int64_t r) { return A(1) / sum[r]; }, index);
  for (std::int64_t r = 0; r < block.rows; ++r) {
    arguments.lse[index(r)] = maximum[r] + std::log(sum[r]);
  }
}

std::size_t forward_slot(const TensorType& q, const Sizes& sizes) {
  std::size_t bytes = 0;
  dispatch_floating(q.dtype, "attention", [&]<class T>() {
    using A = Accumulator<T>;
    ForwardScratch<A, Counter<A>>(sizes.d, Counter<A>{&bytes});
  });
  return bytes;
}

}  // namespace

void attention(const Launch& launch, const Tensor& out, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
               const AttentionTable& table, std::int64_t sequence_length) {
  check_attention(out, lse, q, k, v, table, sequence_length);
  const Sizes sizes(q.type, k.type, sequence_length);
  const TablePointers pointers = checked(table, sizes);
  dispatch_floating(q.dtype(), "attention", [&]<class T>() {
    using A = Accumulator<T>;
    const ForwardArguments<T> arguments = {out.as<T>(), lse.as<A>(), q.as<T>(), k.as<T>(), v.as<T>()};
    const std::int64_t blocks = sizes.blocks() * sizes.head_blocks;
    run_in_slots(launch, forward_slot(q.type, sizes), sizes.sequences() * sizes.kv_heads * blocks,
                 [&](std::int64_t task, const Launch& own) {
                   ScratchAllocator allocator(own);
                   const ForwardScratch<A, Taker<A>> scratch(sizes.d, Taker<A>{&allocator});
                   // Late blocks see the most keys: they start first, so that threads finish together.
                   const std::int64_t head = task / blocks, block = blocks - 1 - task % blocks;
                   forward_block<T, A>(Block(sizes, pointers, head / sizes.kv_heads, head % sizes.kv_heads,
                                             block / sizes.head_blocks, block % sizes.head_blocks),
                                       sizes, pointers, arguments, scratch);
                 });
  });
}

std::size_t attention_workspace(const TensorType& q, const TensorType& k, std::int64_t sequence_length) {
  return forward_slot(q, Sizes(q, k, sequence_length)) * static_cast<std::size_t>(thread_count());
}

}  // namespace attamba::kernels::cpu
