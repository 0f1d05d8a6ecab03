// Attention over compact and local keys (SPEC 3.2; DESIGN 3), forward and backward, in blocks of queries against tiles of keys
// with online softmax. Work and memory follow the keys that the table allows; nothing of size n x n exists.
//
//   S = q k^T / sqrt(d);  P = exp(S - lse);  out = P v
//   delta = rowsum(dout * out);  dS = P * (dout v^T - delta);  dq = dS k / sqrt(d);  dk = dS^T q / sqrt(d);  dv = P^T dout
//
// Forward: one task per (block of queries, key/value head). Backward: one per (sequence, key/value head), which alone
// accumulates that head's dk and dv. Threads only choose which scratch slot a task runs in.
#include <atomic>
#include <cmath>
#include <limits>

#include "kernels/cpu/attention_tiles.h"
#include "kernels/kernels.h"
#include "src/core/parallel.h"

namespace attamba::kernels {
namespace {

using namespace tiles;

/// Below this a score is masked: far under any real score, yet differences with it stay finite.
template <class A>
constexpr A kMasked = std::numeric_limits<A>::lowest() / 4;

struct Sizes {
  std::int64_t tokens, n, heads, kv_heads, d;
  std::int64_t group, block_heads, block_tokens, head_blocks;  ///< rows of a block: block_tokens x block_heads query heads

  Sizes(const TensorType& q, const TensorType& k, std::int64_t sequence_length) {
    const Shape &qs = q.shape, &ks = k.shape;
    require(qs.rank() == 3 && ks.rank() == 3, "attention: q and k must be [T, H, d], got ", q, " and ", k);
    tokens = qs[0];
    n = sequence_length;
    heads = qs[1];
    kv_heads = ks[1];
    d = qs[2];
    require(ks[0] == tokens && ks[2] == d && q.dtype == k.dtype, "attention: q ", q, " does not fit k ", k);
    require(d > 0 && kv_heads > 0 && heads > 0 && heads % kv_heads == 0, "attention: ", kv_heads,
            " key/value heads must divide ", heads, " heads, head size ", d);
    require(n > 0 && tokens % n == 0, "attention: sequence length ", n, " must divide ", tokens, " tokens");
    group = heads / kv_heads;
    block_heads = std::min(group, kMaxRows);
    block_tokens = kMaxRows / block_heads;
    head_blocks = (group + block_heads - 1) / block_heads;
  }
  std::int64_t sequences() const { return tokens / n; }
  std::int64_t blocks() const { return (n + block_tokens - 1) / block_tokens; }
};

struct TablePointers {
  const std::int32_t *ends, *key_begin, *key_end, *local_begin;
};

/// Checks that the table stays inside its sequences: a wrong one would otherwise read or write foreign memory.
TablePointers checked(const AttentionTable& table, const Sizes& sizes) {
  for (const Tensor* part : {&table.ends, &table.key_begin, &table.key_end, &table.local_begin}) {
    require(part->elements() == sizes.tokens, "attention: a table of ", part->type, " for ", sizes.tokens, " tokens");
  }
  const TablePointers p = {table.ends.as<std::int32_t>(), table.key_begin.as<std::int32_t>(), table.key_end.as<std::int32_t>(),
                           table.local_begin.as<std::int32_t>()};
  for (std::int64_t start = 0; start < sizes.tokens; start += sizes.n) {
    std::int64_t begin = start, end = start, local = start;
    for (std::int64_t t = start; t < start + sizes.n; ++t) {
      require(p.key_begin[t] >= begin && p.key_end[t] >= end && p.local_begin[t] >= local && p.key_begin[t] <= p.key_end[t] &&
                  p.key_end[t] <= start + sizes.n && p.local_begin[t] <= t,
              "attention: token ", t, " has compact keys [", p.key_begin[t], ", ", p.key_end[t], ") and local keys from ",
              p.local_begin[t], "; these must not decrease or leave the sequence that starts at ", start);
      begin = p.key_begin[t];
      end = p.key_end[t];
      local = p.local_begin[t];
    }
    for (std::int64_t j = p.key_begin[start]; j < end; ++j) {
      require(p.ends[j] >= start && p.ends[j] < start + sizes.n, "attention: chunk end ", j, " is row ", p.ends[j],
              ", outside the sequence that starts at ", start);
    }
  }
  return p;
}

/// The queries of one block: `tokens` tokens from row `token`, query heads [head, head + heads) of key/value head kv_head.
struct Block {
  std::int64_t token, tokens, head, heads, kv_head, rows;
  RowKeys compact, local;

  Block(const Sizes& sizes, const TablePointers& table, std::int64_t sequence, std::int64_t kv, std::int64_t index,
        std::int64_t head_block) {
    const std::int64_t position = index * sizes.block_tokens;
    token = sequence * sizes.n + position;
    tokens = std::min(sizes.block_tokens, sizes.n - position);
    head = kv * sizes.group + head_block * sizes.block_heads;
    heads = std::min(sizes.block_heads, sizes.group - head_block * sizes.block_heads);
    kv_head = kv;
    rows = tokens * heads;
    for (std::int64_t i = 0; i < tokens; ++i) {
      for (std::int64_t r = i * heads; r < (i + 1) * heads; ++r) {
        compact.begin[r] = table.key_begin[token + i];
        compact.end[r] = table.key_end[token + i];
        local.begin[r] = table.local_begin[token + i];
        local.end[r] = static_cast<std::int32_t>(token + i + 1);
      }
    }
  }
  /// Index of row r in a [T, H] tensor.
  std::int64_t index(std::int64_t r, std::int64_t all_heads) const {
    return (token + r / heads) * all_heads + head + r % heads;
  }
  std::int64_t last_row(std::int64_t panel_begin, std::int64_t panel) const { return std::min(panel_begin + panel, rows) - 1; }
};

/// Calls body(tile, is_compact) for each tile of the block's keys: local ones first, whose scores include the query's own.
template <class Body>
void for_each_tile(const Block& block, KeyTile& tile, const Body& body) {
  for (const bool is_compact : {false, true}) {
    const RowKeys& keys = is_compact ? block.compact : block.local;
    const std::int64_t end = keys.end[block.rows - 1];
    for (std::int64_t first = keys.begin[0]; first < end; first += kMaxKeys) {
      tile.set(keys, block.rows, first, std::min(kMaxKeys, end - first));
      body(tile, is_compact);
    }
  }
}

template <class T, class A>
void load_queries(A* to, std::int64_t distance, const T* from, const Block& block, const Sizes& sizes, A factor) {
  for (std::int64_t r = 0; r < block.rows; ++r) {
    load_row(to + r * distance, from + block.index(r, sizes.heads) * sizes.d, sizes.d, factor);
  }
  for (std::int64_t r = block.rows; r < padded<A>(block.rows); ++r) {
    std::fill_n(to + r * distance, padded<A>(sizes.d), A(0));
  }
}

template <class T, class A>
void load_keys(A* to, std::int64_t distance, const T* from, const KeyTile& tile, const std::int32_t* ends, std::int64_t kv_head,
               const Sizes& sizes) {
  for (std::int64_t i = 0; i < tile.count; ++i) {
    const std::int64_t row = ends != nullptr ? ends[tile.first + i] : tile.first + i;
    load_row(to + i * distance, from + (row * sizes.kv_heads + kv_head) * sizes.d, sizes.d, A(1));
  }
}

/// Lanes [lane, lane + kPanel) of the tile's keys outside `keys`: not computed, so set to 0.
template <class A>
void clear_outside(A* scores, const KeyTile& tile, const KeyRange& keys, std::int64_t lane) {
  for (std::int64_t i = 0; i < tile.count; ++i) {
    if (i < keys.from || i >= keys.to) {
      std::fill_n(scores + i * kScoreDistance<A> + lane, kPanel<A>, A(0));
    }
  }
}

/// Runs tasks 0..count-1, each with a scratch slot of `slot_bytes` that no other running task has.
template <class Body>
void run_in_slots(const Launch& launch, std::size_t slot_bytes, std::int64_t count, const Body& body) {
  const auto available = static_cast<std::int64_t>(launch.scratch.size() / slot_bytes);
  require(available > 0 || count == 0, "attention: needs ", slot_bytes, " bytes of scratch per thread, has ",
          launch.scratch.size());
  std::atomic<std::int64_t> next{0};
  parallel_for(std::min({available, count, std::int64_t{thread_count()}}), [&](std::int64_t slot) {
    Launch own = launch;
    own.scratch = launch.scratch.subspan(static_cast<std::size_t>(slot) * slot_bytes, slot_bytes);
    for (std::int64_t task = next.fetch_add(1); task < count; task = next.fetch_add(1)) {
      body(task, own);
    }
  });
}

// ---------------------------------------------------------------------------------------------------------------- forward

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
  KeyTile tile;
  Strips strips;
  for_each_tile(block, tile, [&](const KeyTile&, bool is_compact) {
    const std::int32_t* ends = is_compact ? table.ends : nullptr;
    load_keys(scratch.k, distance, arguments.k, tile, ends, block.kv_head, sizes);
    load_keys(scratch.v, distance, arguments.v, tile, ends, block.kv_head, sizes);
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
  for (std::int64_t r = 0; r < block.rows; ++r) {
    const std::int64_t index = block.index(r, sizes.heads);
    const A factor = A(1) / sum[r];
    for (std::int64_t c = 0; c < sizes.d; ++c) {
      arguments.out[index * sizes.d + c] = convert<T>(scratch.output[r * distance + c] * factor);
    }
    arguments.lse[index] = maximum[r] + std::log(sum[r]);
  }
}

// --------------------------------------------------------------------------------------------------------------- backward

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
  std::fill_n(scratch.dq, block.rows * distance, A(0));
  alignas(64) A lse[kMaxRows] = {}, delta[kMaxRows] = {};
  for (std::int64_t r = 0; r < block.rows; ++r) {
    const std::int64_t index = block.index(r, sizes.heads);
    const T* out = arguments.out + index * sizes.d;
    const A* dout = scratch.dout + r * distance;
    A total = 0;
#pragma omp simd reduction(+ : total)
    for (std::int64_t c = 0; c < sizes.d; ++c) {
      total += dout[c] * convert<A>(out[c]);
    }
    lse[r] = arguments.lse[index];
    delta[r] = total;
  }
  KeyTile tile;
  Strips strips;
  for_each_tile(block, tile, [&](const KeyTile&, bool is_compact) {
    const std::int32_t* ends = is_compact ? table.ends : nullptr;
    load_keys(scratch.k, distance, arguments.k, tile, ends, block.kv_head, sizes);
    load_keys(scratch.v, distance, arguments.v, tile, ends, block.kv_head, sizes);
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
  for (std::int64_t r = 0; r < block.rows; ++r) {
    T* dq = arguments.dq + block.index(r, sizes.heads) * sizes.d;
    for (std::int64_t c = 0; c < sizes.d; ++c) {
      dq[c] = convert<T>(scratch.dq[r * distance + c] * scale);
    }
  }
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
    for (std::int64_t t = 0; t < sizes.n; ++t) {
      for (std::int64_t c = 0; c < sizes.d; ++c) {
        out[((start + t) * sizes.kv_heads + kv_head) * sizes.d + c] = convert<T>(sums[0][t * columns + c]);
      }
    }
  }
}

/// Sizes of scratch, by taking nothing.
template <class A>
struct Counter {
  std::size_t* bytes;
  A* operator()(std::int64_t count) const {
    *bytes += ScratchAllocator::aligned_bytes<A>(static_cast<std::size_t>(count));
    return nullptr;
  }
};
template <class A>
struct Taker {
  ScratchAllocator* allocator;
  A* operator()(std::int64_t count) const { return allocator->take<A>(static_cast<std::size_t>(count)); }
};

std::size_t forward_slot(const TensorType& q, const Sizes& sizes) {
  std::size_t bytes = 0;
  dispatch_floating(q.dtype, "attention", [&]<class T>() {
    using A = Accumulator<T>;
    ForwardScratch<A, Counter<A>>(sizes.d, Counter<A>{&bytes});
  });
  return bytes;
}

std::size_t backward_slot(const TensorType& q, const Sizes& sizes) {
  std::size_t bytes = 0;
  dispatch_floating(q.dtype, "attention_backward", [&]<class T>() {
    using A = Accumulator<T>;
    BackwardScratch<A, Counter<A>>(sizes.d, sizes.n, Counter<A>{&bytes});
  });
  return bytes;
}

void check_like(const char* name, const Tensor& tensor, const TensorType& expected) {
  require(tensor.type == expected, "attention: ", name, " is ", tensor.type, ", expected ", expected);
}

TensorType lse_type(const TensorType& q) {
  return {accumulator_of(q.dtype), {q.shape[0], q.shape[1]}};
}

}  // namespace

void attention(const Launch& launch, const Tensor& out, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
               const AttentionTable& table, std::int64_t sequence_length) {
  const Sizes sizes(q.type, k.type, sequence_length);
  check_like("v", v, k.type);
  check_like("out", out, q.type);
  check_like("lse", lse, lse_type(q.type));
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

void attention_backward(const Launch& launch, const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& dout,
                        const Tensor& out, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
                        const AttentionTable& table, std::int64_t sequence_length) {
  const Sizes sizes(q.type, k.type, sequence_length);
  check_like("dq", dq, q.type);
  check_like("dout", dout, q.type);
  check_like("out", out, q.type);
  check_like("v", v, k.type);
  check_like("dk", dk, k.type);
  check_like("dv", dv, k.type);
  check_like("lse", lse, lse_type(q.type));
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

std::size_t attention_workspace(const TensorType& q, const TensorType& k, std::int64_t sequence_length) {
  return forward_slot(q, Sizes(q, k, sequence_length)) * static_cast<std::size_t>(thread_count());
}

std::size_t attention_backward_workspace(const TensorType& q, const TensorType& k, std::int64_t sequence_length) {
  return backward_slot(q, Sizes(q, k, sequence_length)) * static_cast<std::size_t>(thread_count());
}

}  // namespace attamba::kernels
