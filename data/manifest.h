// The manifest of a data set: what its folder must hold for it to be whole. Written last, as JSON.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

namespace attamba {

inline constexpr int kDataFormatVersion = 1;
inline constexpr std::string_view kManifestName = "manifest.json";
/// The same list while a data set is being prepared: the shards that are whole so far.
inline constexpr std::string_view kUnfinishedName = "unfinished.json";
inline constexpr std::string_view kTokenizerName = "tokenizer.model";

/// Facts that all shards of a data set share.
struct VocabularyFacts {
  std::string tokenizer_sha256;
  std::int32_t vocabulary_size = 0;
  std::int32_t bos = -1;  ///< -1: none
  std::int32_t eos = -1;
  std::int32_t unknown = -1;

  /// Bytes of a stored token: 2 when every token fits, else 4.
  std::size_t token_bytes() const { return vocabulary_size <= 65536 ? 2 : 4; }
  friend bool operator==(const VocabularyFacts&, const VocabularyFacts&) = default;
};

struct TextCounts {
  std::uint64_t tokens = 0;
  std::uint64_t documents = 0;  ///< that begin here; empty ones are left out
  std::uint64_t empty_documents = 0;
  std::uint64_t text_bytes = 0;  ///< UTF-8 bytes of the documents
  std::uint64_t text_words = 0;  ///< maximal runs without ASCII whitespace

  TextCounts& operator+=(const TextCounts& other);
  friend bool operator==(const TextCounts&, const TextCounts&) = default;
};

struct ShardEntry {
  std::string file;                 ///< inside the data set's folder
  std::uint64_t bytes = 0;          ///< of the whole file
  std::uint64_t token_offset = 0;   ///< where the token bytes begin in the file
  std::uint32_t header_crc32c = 0;  ///< of everything but the token bytes, whose checksums the header carries
  TextCounts counts;

  friend bool operator==(const ShardEntry&, const ShardEntry&) = default;
};

/// A place in the input of a preparation: before the unit at `offset` of file `file`, the `document`-th to begin in that file.
struct InputPosition {
  std::uint64_t file = 0;
  std::uint64_t offset = 0;
  std::uint64_t document = 0;
};

struct Manifest {
  VocabularyFacts vocabulary;
  TextCounts counts;
  std::vector<ShardEntry> shards;
  std::string fingerprint;           ///< of the content: equal for equal tokens, documents and tokenizer
  std::string plan;                  ///< of the preparation that wrote the set (hash), to recognise a repeated one
  std::vector<std::string> sources;  ///< the files that it was made from, for people

  InputPosition resume;  ///< of an unfinished set: where the next shard's text begins

  /// Sums the shards' counts and computes the fingerprint.
  void finish();
};

/// The JSON of a manifest, with a checksum over itself.
std::string to_json(const Manifest& manifest);
/// Reads `folder`/manifest.json; throws when it is absent, damaged, of another format version or contradicts itself.
Manifest read_manifest(const std::filesystem::path& folder);
/// The same for any file with the text of to_json().
Manifest read_manifest_file(const std::filesystem::path& path);

std::string shard_name(std::size_t index);

}  // namespace attamba
