// One HDF5 file of tokens.
//
// Attributes of the root group: format, format_version, tokenizer_sha256, vocabulary_size, bos, eos, unknown, shard_index, and
// the counts of the text. Datasets, all contiguous and little-endian:
//   tokens           uint16 or uint32 [tokens]
//   document_starts  uint64 [documents]   positions in this shard at which documents begin
//   block_crc32c     uint32 [blocks]      checksums of the token bytes in blocks of kBlockBytes, the last one shorter
// The manifest holds the file's size and the checksum of everything but the token bytes. A reader compares both before HDF5
// sees the file (its parser can hang on damaged ones), and a block's checksum before the block's first use.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "data/files.h"
#include "data/manifest.h"

namespace attamba {

/// Small enough that checking a block to read one window costs microseconds; 4 bytes of checksum each.
inline constexpr std::size_t kBlockBytes = std::size_t{1} << 16;

/// Collects the tokens of one shard in memory and writes the file at once.
class ShardWriter {
 public:
  /// Room for `expected_tokens` is set aside at once, so that growing never copies.
  ShardWriter(const VocabularyFacts& vocabulary, std::uint64_t expected_tokens)
      : vocabulary_(vocabulary), expected_tokens_(expected_tokens) {}

  void begin_document() { document_starts_.push_back(counts_.tokens); }
  /// Throws when a token is outside the vocabulary.
  void append(std::span<const std::int32_t> tokens);
  /// Adds to the counts of text; tokens and documents are counted by the two functions above.
  void count_text(const TextCounts& counts);
  std::uint64_t tokens() const { return counts_.tokens; }

  /// Writes folder/shard_name(index) atomically, returns its entry for the manifest, and starts the next shard.
  ShardEntry write(const std::filesystem::path& folder, std::size_t index);

 private:
  VocabularyFacts vocabulary_;
  std::uint64_t expected_tokens_;
  std::vector<std::byte> bytes_;
  std::vector<std::uint64_t> document_starts_;
  TextCounts counts_;
};

/// Reads one shard of a data set. Not thread-safe. Every error names the file.
class ShardReader {
 public:
  /// Touches no file yet. `all` are the data set's shards, this one at `index`; both references must outlive the reader.
  ShardReader(std::filesystem::path path, const std::vector<ShardEntry>& all, std::size_t index,
              const VocabularyFacts& vocabulary);

  /// Throws when the file is missing or has another size than the manifest says. One stat.
  void check_size() const;
  /// Copies the tokens [begin, begin + tokens.size()) of this shard. Checks what has not been checked.
  void read(std::uint64_t begin, std::span<std::int32_t> tokens);
  /// The positions in [begin, end) at which documents begin, appended to `starts`, each plus `shift`.
  void document_starts(std::uint64_t begin, std::uint64_t end, std::uint64_t shift, std::vector<std::uint64_t>& starts);
  /// The last document start at or before `position`; false when there is none in this shard.
  bool last_document_start(std::uint64_t position, std::uint64_t& start);
  /// The position of the i-th document start of this shard.
  std::uint64_t document_start(std::uint64_t i);
  /// Checks all of the file, and that the document starts and the tokens make sense.
  void verify();

  bool is_open() const { return static_cast<bool>(file_); }
  /// Gives the descriptor back; what has been checked stays so.
  void close() { file_.close(); }

  const std::filesystem::path& path() const { return path_; }
  const ShardEntry& entry() const { return (*all_)[index_]; }

 private:
  void open();
  void check_header();
  void parse_header();
  void check_block(std::uint64_t block);
  std::uint64_t token_bytes() const { return entry().counts.tokens * width_; }
  std::uint64_t first_start_at_or_after(std::uint64_t position);
  template <class... Parts>
  [[noreturn]] void fail(const Parts&... why) const;

  std::filesystem::path path_;
  const std::vector<ShardEntry>* all_;
  std::size_t index_;
  const VocabularyFacts* vocabulary_;
  std::size_t width_;
  FileDescriptor file_;
  bool checked_ = false;                      ///< the header is the one that the manifest lists, and parsed
  std::uint64_t starts_offset_ = 0;           ///< of document_starts in the file
  std::vector<std::uint64_t> sparse_starts_;  ///< every kStartsPage-th document start
  std::vector<std::uint32_t> block_crc32c_;
  std::vector<bool> block_checked_;
  std::vector<std::byte> scratch_;
};

}  // namespace attamba
