// Data sets whose tokens are their own positions, 0, 1, 2, ..., so that a test sees which ones it has read.
#pragma once

#include <cstdint>
#include <filesystem>
#include <set>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "data/sha256.h"
#include "data/shard.h"
#include "tests/data/data_test_support.h"

namespace attamba::testing {

/// Stands where a tokenizer lies: opening a data set compares its checksum and looks no further.
inline constexpr std::string_view kNoTokenizer = "no tokenizer";

/// Of tokens below 65,536.
inline const VocabularyFacts& numbered_vocabulary() {
  static const VocabularyFacts facts{.tokenizer_sha256 = sha256(kNoTokenizer), .vocabulary_size = 65536};
  return facts;
}

/// Writes the shard of this index with the tokens [first, first + count). `documents`: the positions, counted from the data
/// set's first token, at which documents begin.
inline ShardEntry write_numbered_shard(const std::filesystem::path& folder, std::size_t index, std::uint64_t first,
                                       std::uint64_t count, const std::set<std::uint64_t>& documents) {
  ShardWriter writer(numbered_vocabulary(), count);
  for (std::uint64_t position = first; position < first + count; ++position) {
    if (documents.contains(position)) {
      writer.begin_document();
    }
    const auto token = static_cast<std::int32_t>(position);
    writer.append(std::span(&token, 1));
  }
  return writer.write(folder, index);
}

/// Writes what makes a folder of shards a data set.
inline void write_numbered_manifest(const std::filesystem::path& folder, std::vector<ShardEntry> shards) {
  Manifest manifest;
  manifest.vocabulary = numbered_vocabulary();
  manifest.shards = std::move(shards);
  manifest.finish();
  write_text(folder / kTokenizerName, kNoTokenizer);
  write_text(folder / kManifestName, to_json(manifest));
}

}  // namespace attamba::testing
