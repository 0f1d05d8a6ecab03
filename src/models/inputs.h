// The leaves that describe a batch to a model, and the host's side of filling them.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "src/chunking/table.h"
#include "src/core/storage.h"
#include "src/models/model_config.h"

namespace attamba {

inline constexpr const char* kTokensLeaf = "batch.tokens";        ///< int32 [T]
inline constexpr const char* kTargetsLeaf = "batch.targets";      ///< int32 [T]
inline constexpr const char* kPositionsLeaf = "batch.positions";  ///< int32 [T], counted from the document's start
inline constexpr const char* kRopeLeaf = "rope";                  ///< [n, d]: cos, sin pairs

/// Name of the table leaves of a layer; layers with equal tables share them.
std::string table_name(const ChunkingStrategy* chunking, std::int64_t layer);

/// The leaves of one batch shape; several layers may share the tables of one.
std::vector<Storage::Entry> batch_leaves(const ModelConfig& config, const ChunkingStrategy* chunking, std::int64_t sequences,
                                         std::int64_t n, DType dtype);

/// Keys per query of a layer's mask over n tokens, for FLOP counts.
double expected_keys(const ModelConfig& config, const ChunkingStrategy* chunking, std::int64_t layer, std::int64_t n);

/// Writes batches into the leaves of one batch shape.
class BatchWriter {
 public:
  /// One writer per Storage; leaves that it lacks are made. Tables that never change are filled here.
  BatchWriter(Storage& storage, const ModelConfig& config, const ChunkingStrategy* chunking, std::int64_t sequences,
              std::int64_t n, DType dtype);

  /// windows [B, n+1] row-major; document_starts [B, n] (may be empty); samples [B] global sample indices (may be empty).
  /// Sequences from `used` on (negative: none) have no targets, so their losses are 0. The copy to the device is enqueued.
  void write(std::span<const std::int32_t> windows, std::span<const std::int32_t> document_starts,
             std::span<const std::int64_t> samples, std::uint64_t seed, std::int64_t step, std::int64_t used = -1);

 private:
  std::span<std::int32_t> leaf(const std::string& name) { return storage_.mirror(name).span<std::int32_t>(); }
  void fill_tables(const BatchLayout& layout);

  Storage& storage_;
  const ModelConfig config_;
  const ChunkingStrategy* chunking_;
  std::int64_t sequences_, length_;
  std::span<std::int32_t> tokens_, targets_, positions_;
  std::vector<ChunkTable> tables_;
  std::vector<std::string> table_leaves_;  ///< names of the leaves of all tables, and of positions
  std::vector<std::int64_t> layer_of_table_;
  bool filled_for_documents_ = false;  ///< whether tables and positions are those of a batch with documents
};

}  // namespace attamba
