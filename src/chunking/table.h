// From chunk ends to what the kernels read: int32 arrays over the packed rows of a batch (docs/architecture.md).
#pragma once

#include <cstdint>
#include <span>

#include "src/chunking/chunking.h"

namespace attamba {

/// Views of B n elements each; row = sequence * n + position. See kernels::AttentionTable and kernels::chunk_scan.
struct ChunkTable {
  std::span<std::int32_t> ends, key_begin, key_end, local_begin;
  std::span<std::int32_t> starts;       ///< row at which each token's chunk begins
  std::span<std::int32_t> labels = {};  ///< each token's position in its chunk (kernels::label_scan); may be empty
};

/// Which rows of a batch belong together.
struct BatchLayout {
  std::int64_t sequences = 1;
  std::int64_t length = 0;                             ///< n
  std::span<const std::int32_t> document_starts = {};  ///< [B n] position in its sequence at which each token's document begins
  std::span<const std::int64_t> samples = {};          ///< [B] global sample indices; empty: 0, 1, ...
  std::uint64_t seed = 0;
  std::int64_t step = 0;
};

/// Query t sees chunk ends before its window one by one, and its window: the last `leading` tokens, its own among them, or with
/// leading = 0 its own chunk so far (eq. 5). Everything restarts at a document's start.
void fill_chunk_table(const ChunkTable& table, const ChunkingStrategy& strategy, std::int64_t layer, std::int64_t leading,
                      const BatchLayout& layout);

/// Plain causal attention: every earlier token of the document, or the last `window` of them when window > 0. A document is one
/// chunk.
void fill_causal_table(const ChunkTable& table, std::int64_t window, const BatchLayout& layout);

/// Keys that a query sees on average.
double average_keys(const ChunkTable& table);

}  // namespace attamba
