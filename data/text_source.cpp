#include "data/text_source.h"

#include <sys/stat.h>
#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <nlohmann/json.hpp>
#include <string_view>
#include <system_error>

#include "data/utf8.h"
#include "src/core/error.h"

namespace attamba {
namespace {

constexpr std::size_t kReadBytes = std::size_t{1} << 18;
/// A plain text file is handed out in pieces of at most this many bytes.
constexpr std::size_t kPieceBytes = std::size_t{1} << 20;
/// Bounds the memory that one document can take.
constexpr std::size_t kLongestLine = std::size_t{128} << 20;

InputFile describe(const std::filesystem::path& path) {
  struct stat status {};
  if (::stat(path.c_str(), &status) != 0) {
    throw Error(concat("cannot read '", path.string(), "': ", std::generic_category().message(errno)));
  }
  require(S_ISREG(status.st_mode), "cannot read '", path.string(), "': it is neither a file nor a folder");
  InputFile file{.path = path,
                 .bytes = static_cast<std::uint64_t>(status.st_size),
                 .modified = std::int64_t{status.st_mtim.tv_sec} * 1000000000 + status.st_mtim.tv_nsec};
  std::filesystem::path name = path.filename();
  if (name.extension() == ".gz") {
    file.compression = Compression::gzip;
    name.replace_extension();
  } else if (name.extension() == ".zst") {
    file.compression = Compression::zstd;
    name.replace_extension();
  }
  file.jsonl = name.extension() == ".jsonl";
  return file;
}

/// Whether a file found inside a folder holds text, by its name.
bool is_text_name(std::filesystem::path name) {
  if (name.string().starts_with('.')) {
    return false;
  }
  if (name.extension() == ".gz" || name.extension() == ".zst") {
    name.replace_extension();
  }
  constexpr std::array<std::string_view, 5> kExtensions = {".txt", ".text", ".raw", ".md", ".jsonl"};
  return std::find(kExtensions.begin(), kExtensions.end(), name.extension().string()) != kExtensions.end();
}

std::vector<std::filesystem::path> text_files_in(const std::filesystem::path& folder) {
  std::vector<std::filesystem::path> found;
  std::error_code error;
  auto entry = std::filesystem::recursive_directory_iterator(folder, error);
  for (; !error && entry != std::filesystem::recursive_directory_iterator(); entry.increment(error)) {
    if (entry->is_directory() && entry->path().filename().string().starts_with('.')) {
      entry.disable_recursion_pending();
    } else if (entry->is_regular_file() && is_text_name(entry->path().filename())) {
      found.push_back(entry->path());
    }
  }
  require(!error, "cannot read the folder '", folder.string(), "': ", error.message());
  require(!found.empty(), "the folder '", folder.string(),
          "' holds no text (.txt, .text, .raw, .md or .jsonl, also with .gz or .zst)");
  std::sort(found.begin(), found.end());
  return found;
}

}  // namespace

std::vector<InputFile> list_inputs(std::span<const std::filesystem::path> paths) {
  std::vector<InputFile> files;
  for (const auto& path : paths) {
    std::error_code error;
    if (std::filesystem::is_directory(path, error)) {
      for (const auto& found : text_files_in(path)) {
        files.push_back(describe(found));
      }
    } else {
      files.push_back(describe(path));
    }
  }
  return files;
}

/// Reads the file and decompresses it; the plain case copies.
class TextStream::Decoder {
 public:
  explicit Decoder(const InputFile& file)
      : path_(file.path), compression_(file.compression), file_(open_for_reading(file.path)) {
    file_bytes_ = file_size_of(file_, path_);
    if (compression_ == Compression::gzip) {
      require(inflateInit2(&gzip_, 15 + 16) == Z_OK, "cannot read '", path_.string(), "': zlib does not start");
    } else if (compression_ == Compression::zstd) {
      zstd_ = ZSTD_createDStream();
      require(zstd_ != nullptr, "cannot read '", path_.string(), "': zstd does not start");
    }
  }
  ~Decoder() {
    if (compression_ == Compression::gzip) {
      inflateEnd(&gzip_);
    }
    ZSTD_freeDStream(zstd_);
  }
  Decoder(const Decoder&) = delete;
  Decoder& operator=(const Decoder&) = delete;

  std::size_t read(std::span<char> bytes) {
    switch (compression_) {
      case Compression::none:
        return read_plain(bytes);
      case Compression::gzip:
        return read_compressed(bytes, [&](std::span<char> out) { return inflate_some(out); });
      case Compression::zstd:
        return read_compressed(bytes, [&](std::span<char> out) { return decompress_some(out); });
    }
    return 0;
  }

  void skip(std::uint64_t count) {
    if (compression_ == Compression::none) {
      require(count <= file_bytes_ - position_, "cannot read '", path_.string(), "': it is shorter than before");
      position_ += count;
      return;
    }
    std::vector<char> ignored(kReadBytes);
    while (count > 0) {
      const std::size_t got = read(std::span(ignored).first(std::min<std::uint64_t>(count, ignored.size())));
      require(got > 0, "cannot read '", path_.string(), "': it is shorter than before");
      count -= got;
    }
  }

  std::uint64_t disk_position() const { return position_ - (input_.size() - input_used_); }

 private:
  std::size_t read_plain(std::span<char> bytes) {
    const std::size_t count = std::min<std::uint64_t>(bytes.size(), file_bytes_ - position_);
    read_at(file_, position_, std::as_writable_bytes(bytes.first(count)), path_);
    position_ += count;
    return count;
  }

  /// Refills the input buffer; false at the end of the file.
  bool refill() {
    input_.resize(kReadBytes);
    input_used_ = 0;
    input_.resize(read_plain(input_));
    return !input_.empty();
  }

  template <class Step>
  std::size_t read_compressed(std::span<char> bytes, const Step& step) {
    std::size_t got = 0;
    while (got < bytes.size()) {
      if (input_used_ == input_.size() && !refill()) {
        // A decoder may still hold output for a frame whose bytes are all read; if it has none, the frame is cut off.
        const std::size_t held = inside_frame_ ? step(bytes.subspan(got)) : 0;
        require(held > 0 || !inside_frame_, "cannot read '", path_.string(),
                "': the compressed data end too early; the file is truncated");
        got += held;
        if (held == 0) {
          break;
        }
        continue;
      }
      got += step(bytes.subspan(got));
    }
    return got;
  }

  std::size_t inflate_some(std::span<char> out) {
    if (!inside_frame_) {
      inflateReset(&gzip_);
      inside_frame_ = true;
    }
    gzip_.next_in = reinterpret_cast<Bytef*>(input_.data() + input_used_);
    gzip_.avail_in = static_cast<uInt>(input_.size() - input_used_);
    gzip_.next_out = reinterpret_cast<Bytef*>(out.data());
    gzip_.avail_out = static_cast<uInt>(std::min<std::size_t>(out.size(), 1u << 30));
    const auto room = gzip_.avail_out;
    const int result = inflate(&gzip_, Z_NO_FLUSH);
    require(result == Z_OK || result == Z_STREAM_END || result == Z_BUF_ERROR, "cannot read '", path_.string(),
            "': damaged gzip data near byte ", disk_position(), gzip_.msg != nullptr ? concat(" (", gzip_.msg, ")") : "");
    input_used_ = input_.size() - gzip_.avail_in;
    inside_frame_ = result != Z_STREAM_END;
    return room - gzip_.avail_out;
  }

  std::size_t decompress_some(std::span<char> out) {
    ZSTD_inBuffer in{input_.data(), input_.size(), input_used_};
    ZSTD_outBuffer to{out.data(), out.size(), 0};
    const std::size_t result = ZSTD_decompressStream(zstd_, &to, &in);
    require(ZSTD_isError(result) == 0, "cannot read '", path_.string(), "': damaged zstd data near byte ", disk_position(),
            " (", ZSTD_getErrorName(result), ")");
    input_used_ = in.pos;
    inside_frame_ = result != 0;
    return to.pos;
  }

  std::filesystem::path path_;
  Compression compression_;
  FileDescriptor file_;
  std::uint64_t file_bytes_ = 0;
  std::uint64_t position_ = 0;  ///< read from the file
  std::vector<char> input_;
  std::size_t input_used_ = 0;
  bool inside_frame_ = false;
  z_stream gzip_{};
  ZSTD_DStream* zstd_ = nullptr;
};

TextStream::TextStream(const InputFile& file) : decoder_(std::make_unique<Decoder>(file)) {}
TextStream::~TextStream() = default;
TextStream::TextStream(TextStream&&) noexcept = default;
std::size_t TextStream::read(std::span<char> bytes) {
  return decoder_->read(bytes);
}
void TextStream::skip(std::uint64_t count) {
  decoder_->skip(count);
}
std::uint64_t TextStream::disk_position() const {
  return decoder_->disk_position();
}

UnitReader::UnitReader(const InputFile& file, const Tokenizer* tokenizer, std::uint64_t begin)
    : file_(file), tokenizer_(tokenizer), stream_(file), offset_(begin) {
  if (begin > 0) {
    stream_.skip(begin - 1);
    char before = 0;
    require(stream_.read(std::span(&before, 1)) == 1, "cannot read '", file.path.string(), "': it is shorter than before");
    inside_word_ = !is_space(before);
  }
}

void UnitReader::fill(std::size_t size) {
  if (buffer_.size() - used_ >= size || at_end_) {
    return;
  }
  buffer_.erase(0, used_);
  used_ = 0;
  while (buffer_.size() < size && !at_end_) {
    const std::size_t before = buffer_.size();
    buffer_.resize(before + kReadBytes);
    const std::size_t got = stream_.read(std::span(buffer_).subspan(before));
    buffer_.resize(before + got);
    at_end_ = got < kReadBytes;
  }
}

bool UnitReader::next(TextUnit& unit) {
  return file_.jsonl ? next_line(unit) : next_piece(unit);
}

bool UnitReader::next_line(TextUnit& unit) {
  for (;;) {
    std::size_t searched = 0;
    std::size_t newline = std::string::npos;
    for (;;) {
      fill(searched + 1);
      newline = buffer_.find('\n', used_ + searched);
      if (newline != std::string::npos || at_end_) {
        break;
      }
      searched = buffer_.size() - used_;
      require(searched <= kLongestLine, "'", file_.path.string(), "': the line at byte ", offset_, " is longer than ",
              kLongestLine >> 20, " MiB; put so large a document into a plain text file of its own");
    }
    const std::size_t size = (newline == std::string::npos ? buffer_.size() : newline) - used_;
    const std::string_view line = std::string_view(buffer_).substr(used_, size);
    unit.offset = offset_;
    const std::size_t taken = size + (newline == std::string::npos ? 0 : 1);
    const bool blank = std::all_of(line.begin(), line.end(), is_space);
    if (!blank) {
      unit.raw.assign(line);
    }
    used_ += taken;
    offset_ += taken;
    unit.end = offset_;
    if (!blank) {
      unit.begins_document = unit.ends_document = true;
      unit.inside_word = false;
      return true;
    }
    if (taken == 0) {
      return false;
    }
  }
}

std::size_t UnitReader::cut_point(std::string_view text) const {
  if (tokenizer_ != nullptr) {
    return tokenizer_->cut_point(text);
  }
  std::size_t cut = text.rfind('\n', text.size() - 2) + 1;
  for (std::size_t at = text.size() - 1; cut == 0 && at > 0; --at) {
    cut = begins_character(text[at]) ? at : 0;
  }
  return cut == 0 ? text.size() - 1 : cut;
}

bool UnitReader::next_piece(TextUnit& unit) {
  if (finished_) {
    return false;
  }
  fill(kPieceBytes + 1);
  const std::string_view rest = std::string_view(buffer_).substr(used_);
  if (rest.empty() && offset_ > 0) {
    return false;
  }
  // The last unit ends the document; an empty file is one empty unit.
  finished_ = rest.size() <= kPieceBytes;
  const std::string_view piece = finished_ ? rest : rest.substr(0, cut_point(rest.substr(0, kPieceBytes + 1)));
  unit.raw.assign(piece);
  unit.offset = offset_;
  unit.begins_document = offset_ == 0;
  unit.ends_document = finished_;
  unit.inside_word = inside_word_;
  if (!piece.empty()) {
    inside_word_ = !is_space(piece.back());
  }
  used_ += piece.size();
  offset_ += piece.size();
  unit.end = offset_;
  return true;
}

std::string text_of_json_line(const TextUnit& unit, const std::string& field, const std::filesystem::path& path) {
  const auto where = [&] { return concat("'", path.string(), "': the line at byte ", unit.offset); };
  nlohmann::json line;
  try {
    line = nlohmann::json::parse(unit.raw);
  } catch (const nlohmann::json::parse_error& error) {
    throw Error(concat(where(), " is not JSON (at byte ", unit.offset + (error.byte > 0 ? error.byte - 1 : 0), ")"));
  }
  require(line.is_object(), where(), " is not a JSON object with a field \"", field, "\"");
  const auto found = line.find(field);
  require(found != line.end(), where(), " has no field \"", field, "\"; name the right one with --text-field");
  require(found->is_string(), where(), ": its field \"", field, "\" is not a string");
  return std::move(found->get_ref<std::string&>());
}

void require_utf8(const TextUnit& unit, const std::filesystem::path& path) {
  const std::size_t invalid = first_invalid_utf8(unit.raw);
  require(invalid == unit.raw.size(), "'", path.string(), "': byte ", unit.offset + invalid,
          " is not UTF-8; convert the file first (for example with iconv)");
}

}  // namespace attamba
