// Text as it is found: plain files, .jsonl, either also as .gz or .zst, and folders of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "data/files.h"
#include "data/tokenizer.h"

namespace attamba {

enum class Compression { none, gzip, zstd };

struct InputFile {
  std::filesystem::path path;
  std::uint64_t bytes = 0;    ///< on disk
  std::int64_t modified = 0;  ///< nanoseconds; with `bytes`, tells whether a file changed between two runs
  bool jsonl = false;         ///< one JSON object a line; otherwise the file is one document
  Compression compression = Compression::none;
};

/// The files named, and those inside the folders named (by extension, sorted by path; hidden ones are left out).
std::vector<InputFile> list_inputs(std::span<const std::filesystem::path> paths);

/// The decompressed bytes of a file, in order.
class TextStream {
 public:
  explicit TextStream(const InputFile& file);
  ~TextStream();
  TextStream(TextStream&&) noexcept;

  /// Fills as much of `bytes` as there is; 0 at the end. Throws on damaged or truncated compressed data.
  std::size_t read(std::span<char> bytes);
  /// Leaves out the next `count` bytes; throws when there are fewer.
  void skip(std::uint64_t count);
  /// Bytes of the file on disk consumed so far.
  std::uint64_t disk_position() const;

 private:
  class Decoder;
  std::unique_ptr<Decoder> decoder_;
};

/// A part of an input file that is tokenised by itself.
struct TextUnit {
  std::string raw;           ///< a line of JSON, or text
  std::uint64_t offset = 0;  ///< of raw in the decompressed file
  std::uint64_t end = 0;     ///< where the next unit begins
  bool begins_document = true;
  bool ends_document = true;
  bool inside_word = false;  ///< the byte before the unit belongs to a word
};

/// Cuts a file into units: one per line of a .jsonl file (blank lines are left out); about a megabyte each of a plain text
/// file, which is one document. The units are a function of the file and the tokenizer alone, also when reading begins at one
/// of them.
class UnitReader {
 public:
  /// `tokenizer` tells where plain text may be cut and must outlive the reader; without one, cuts are after newlines where
  /// there are any. `begin`: the offset of the first unit to read.
  UnitReader(const InputFile& file, const Tokenizer* tokenizer, std::uint64_t begin = 0);

  bool next(TextUnit& unit);
  std::uint64_t disk_position() const { return stream_.disk_position(); }

 private:
  bool next_line(TextUnit& unit);
  bool next_piece(TextUnit& unit);
  std::size_t cut_point(std::string_view text) const;
  /// Reads on until `size` bytes are buffered or the file ends.
  void fill(std::size_t size);

  const InputFile file_;
  const Tokenizer* tokenizer_;
  TextStream stream_;
  std::string buffer_;  ///< bytes read and not yet handed out, from buffer_[used_]
  std::size_t used_ = 0;
  std::uint64_t offset_;  ///< of buffer_[used_] in the file
  bool at_end_ = false;   ///< the stream has no more
  bool finished_ = false;
  bool inside_word_ = false;
};

/// The text of a line of JSON: its field `field`. Throws naming file and byte offset.
std::string text_of_json_line(const TextUnit& unit, const std::string& field, const std::filesystem::path& path);

/// Throws naming the file and the offset of the first byte that is not UTF-8.
void require_utf8(const TextUnit& unit, const std::filesystem::path& path);

}  // namespace attamba
