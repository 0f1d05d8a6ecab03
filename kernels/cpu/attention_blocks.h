// What both directions of attention share: sizes, the checked table, blocks of queries, and moving rows in and out of scratch.
#pragma once

#include <atomic>

#include "kernels/attention_checks.h"
#include "kernels/cpu/attention_tiles.h"
#include "src/core/parallel.h"

namespace attamba::kernels::cpu::tiles {

struct Sizes {
  std::int64_t tokens, n, heads, kv_heads, d;
  std::int64_t group, block_heads, block_tokens, head_blocks;  ///< rows of a block: block_tokens x block_heads query heads

  Sizes(const TensorType& q, const TensorType& k, std::int64_t sequence_length) {
    check_attention_shapes(q, k, sequence_length);
    tokens = q.shape[0];
    n = sequence_length;
    heads = q.shape[1];
    kv_heads = k.shape[1];
    d = q.shape[2];
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
inline TablePointers checked(const AttentionTable& table, const Sizes& sizes) {
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

/// Rows of one head lie far apart in memory, where the processor foresees nothing: they are asked for this many rows ahead.
inline constexpr std::int64_t kRowsAhead = 8;

/// to[i] = from row index(i), i < count, converted and scaled.
template <class T, class A, class Index>
void load_rows(A* to, std::int64_t distance, const T* from, std::int64_t d, std::int64_t count, A factor, const Index& index) {
  for (std::int64_t i = 0; i < count; ++i) {
    prefetch_row<false>(from + index(std::min(i + kRowsAhead, count - 1)) * d, d);
    load_row(to + i * distance, from + index(i) * d, d, factor);
  }
}

/// Row index(i) of `to` = from[i] * factor(i), i < count, rounded.
template <class T, class A, class Factor, class Index>
void store_rows(T* to, std::int64_t d, const A* from, std::int64_t distance, std::int64_t count, const Factor& factor,
                const Index& index) {
  for (std::int64_t i = 0; i < count; ++i) {
    prefetch_row<true>(to + index(std::min(i + kRowsAhead, count - 1)) * d, d);
    T* row = to + index(i) * d;
    const A* values = from + i * distance;
    const A scale = factor(i);
    for (std::int64_t c = 0; c < d; ++c) {
      row[c] = convert<T>(values[c] * scale);
    }
  }
}

template <class T, class A>
void load_queries(A* to, std::int64_t distance, const T* from, const Block& block, const Sizes& sizes, A factor) {
  load_rows(to, distance, from, sizes.d, block.rows, factor, [&](std::int64_t r) { return block.index(r, sizes.heads); });
  for (std::int64_t r = block.rows; r < padded<A>(block.rows); ++r) {
    std::fill_n(to + r * distance, padded<A>(sizes.d), A(0));
  }
}

/// Local keys are rows themselves; compact ones are looked up in `ends`.
template <class T, class A>
void load_keys(A* to, std::int64_t distance, const T* from, const KeyTile& tile, const std::int32_t* ends, std::int64_t kv_head,
               const Sizes& sizes) {
  load_rows(to, distance, from, sizes.d, tile.count, A(1), [&](std::int64_t i) {
    return (ends != nullptr ? ends[tile.first + i] : tile.first + i) * sizes.kv_heads + kv_head;
  });
}

/// Calls body(tile, is_compact) for each tile of the block's keys: local ones first, whose scores include the query's own.
/// scratch.k and scratch.v then hold the tile's rows of k and v.
template <class T, class Scratch, class Body>
void for_each_tile(const Block& block, const Sizes& sizes, const TablePointers& table, const T* k, const T* v,
                   const Scratch& scratch, const Body& body) {
  KeyTile tile;
  for (const bool is_compact : {false, true}) {
    const RowKeys& keys = is_compact ? block.compact : block.local;
    const std::int32_t* ends = is_compact ? table.ends : nullptr;
    const std::int64_t end = keys.end[block.rows - 1];
    for (std::int64_t first = keys.begin[0]; first < end; first += kMaxKeys) {
      tile.set(keys, block.rows, first, std::min(kMaxKeys, end - first));
      load_keys(scratch.k, scratch.distance, k, tile, ends, block.kv_head, sizes);
      load_keys(scratch.v, scratch.distance, v, tile, ends, block.kv_head, sizes);
      body(tile, is_compact);
    }
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

}  // namespace attamba::kernels::cpu::tiles
