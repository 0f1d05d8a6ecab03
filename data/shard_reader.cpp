#include <sys/stat.h>

#include <algorithm>
#include <cstring>

#include "data/hdf5_handle.h"
#include "data/shard.h"
#include "src/core/crc32c.h"
#include "src/core/error.h"

namespace attamba {
namespace {

/// Document starts are read from the file a page at a time; the first of every page is kept in memory.
constexpr std::uint64_t kStartsPage = 512;

std::int64_t get_number(const Hdf5File& file, const char* name) {
  const Hdf5Attribute attribute(H5Aopen(file.get(), name, H5P_DEFAULT), "read ", name);
  std::int64_t value = 0;
  require(H5Aread(attribute.get(), H5T_NATIVE_INT64, &value) >= 0, "HDF5: cannot read ", name);
  return value;
}

std::string get_string(const Hdf5File& file, const char* name) {
  const Hdf5Attribute attribute(H5Aopen(file.get(), name, H5P_DEFAULT), "read ", name);
  const Hdf5Type type(H5Aget_type(attribute.get()), "read ", name);
  require(H5Tget_class(type.get()) == H5T_STRING && H5Tis_variable_str(type.get()) == 0, "HDF5: ", name, " is not a string");
  std::string value(H5Tget_size(type.get()), '\0');
  require(H5Aread(attribute.get(), type.get(), value.data()) >= 0, "HDF5: cannot read ", name);
  value.resize(std::strlen(value.c_str()));
  return value;
}

struct StoredDataset {
  std::uint64_t count = 0;
  std::uint64_t offset = 0;  ///< 0 when empty
};

/// Where a contiguous one-dimensional dataset of this type lies.
StoredDataset find_dataset(const Hdf5File& file, const char* name, hid_t type) {
  const Hdf5Dataset dataset(H5Dopen2(file.get(), name, H5P_DEFAULT), "open ", name);
  const Hdf5Type stored(H5Dget_type(dataset.get()), "read the type of ", name);
  require(H5Tequal(stored.get(), type) > 0, name, " has an unexpected type");
  const Hdf5Space space(H5Dget_space(dataset.get()), "read the extent of ", name);
  const hssize_t count = H5Sget_simple_extent_npoints(space.get());
  require(count >= 0, name, " has an unexpected extent");
  if (count == 0) {
    return {};
  }
  const haddr_t offset = H5Dget_offset(dataset.get());
  require(offset != HADDR_UNDEF, name, " is not stored in one piece");
  return {static_cast<std::uint64_t>(count), offset};
}

}  // namespace

template <class... Parts>
void ShardReader::fail(const Parts&... why) const {
  throw Error(concat("shard '", path_.string(), "': ", why...));
}

ShardReader::ShardReader(std::filesystem::path path, const std::vector<ShardEntry>& all, std::size_t index,
                         const VocabularyFacts& vocabulary)
    : path_(std::move(path)), all_(&all), index_(index), vocabulary_(&vocabulary), width_(vocabulary.token_bytes()) {}

void ShardReader::check_size() const {
  struct stat status {};
  if (::stat(path_.c_str(), &status) != 0) {
    fail(errno == ENOENT ? "it is missing" : std::strerror(errno), "; restore it or prepare the data set again");
  }
  if (static_cast<std::uint64_t>(status.st_size) != entry().bytes) {
    fail("it has ", status.st_size, " bytes where the manifest says ", entry().bytes, ": ",
         static_cast<std::uint64_t>(status.st_size) < entry().bytes ? "it is truncated" : "it is another file",
         "; restore it or prepare the data set again");
  }
}

void ShardReader::open() {
  if (!file_) {
    check_size();
    file_ = open_for_reading(path_);
  }
  if (!checked_) {
    check_header();
    try {
      parse_header();
    } catch (const Error& error) {
      fail(error.what(), "; prepare the data set again");
    }
    checked_ = true;
  }
}

void ShardReader::check_header() {
  const std::uint64_t token_end = entry().token_offset + token_bytes();
  if (token_end > entry().bytes) {
    fail("the manifest places its tokens outside the file; prepare the data set again");
  }
  std::vector<std::byte> before(entry().token_offset);
  std::vector<std::byte> after(entry().bytes - token_end);
  read_at(file_, 0, before, path_);
  read_at(file_, token_end, after, path_);
  const std::uint32_t found = crc32c(after, crc32c(before));
  if (found == entry().header_crc32c) {
    return;
  }
  for (const ShardEntry& other : *all_) {
    if (other.bytes == entry().bytes && other.token_offset == entry().token_offset &&
        other.counts.tokens == entry().counts.tokens && other.header_crc32c == found) {
      fail("it holds what the manifest lists as ", other.file, ": the files were swapped; put them back");
    }
  }
  fail("the checksum of its header is ", found, " where the manifest says ", entry().header_crc32c,
       ": it is damaged or belongs to another data set; restore it or prepare the data set again");
}

void ShardReader::parse_header() {
  const Hdf5Quiet quiet;
  const Hdf5Properties access(H5Pcreate(H5P_FILE_ACCESS), "make properties");
  // Shards are never written in place, and some network file systems have no locks.
  H5Pset_file_locking(access.get(), false, true);
  const Hdf5File file(H5Fopen(path_.c_str(), H5F_ACC_RDONLY, access.get()), "open the file");
  require(get_string(file, "format") == "attamba-tokens", "it holds no tokens");
  const auto expect = [&](const char* name, std::int64_t expected) {
    const std::int64_t found = get_number(file, name);
    require(found == expected, "its ", name, " is ", found, " where the data set's is ", expected);
  };
  expect("format_version", kDataFormatVersion);
  const std::string tokenizer = get_string(file, "tokenizer_sha256");
  require(tokenizer == vocabulary_->tokenizer_sha256, "it was made with another tokenizer (sha256 ", tokenizer.substr(0, 12),
          "..., the data set's is ", vocabulary_->tokenizer_sha256.substr(0, 12), "...)");
  expect("vocabulary_size", vocabulary_->vocabulary_size);
  expect("bos", vocabulary_->bos);
  expect("eos", vocabulary_->eos);
  expect("unknown", vocabulary_->unknown);
  expect("shard_index", static_cast<std::int64_t>(index_));
  expect("block_bytes", kBlockBytes);

  const StoredDataset tokens = find_dataset(file, "tokens", width_ == 2 ? H5T_STD_U16LE : H5T_STD_U32LE);
  const StoredDataset starts = find_dataset(file, "document_starts", H5T_STD_U64LE);
  const StoredDataset blocks = find_dataset(file, "block_crc32c", H5T_STD_U32LE);
  require(tokens.count == entry().counts.tokens && tokens.offset == entry().token_offset &&
              starts.count == entry().counts.documents && blocks.count == (token_bytes() + kBlockBytes - 1) / kBlockBytes,
          "its extents are not those of the manifest");
  starts_offset_ = starts.offset;
  block_crc32c_.resize(blocks.count);
  block_checked_.assign(blocks.count, false);
  read_at(file_, blocks.offset, std::as_writable_bytes(std::span(block_crc32c_)), path_);
  sparse_starts_.clear();
  std::vector<std::uint64_t> all_starts(starts.count);
  read_at(file_, starts.offset, std::as_writable_bytes(std::span(all_starts)), path_);
  for (std::uint64_t i = 0; i < starts.count; i += kStartsPage) {
    sparse_starts_.push_back(all_starts[i]);
  }
}

void ShardReader::check_block(std::uint64_t block) {
  const std::uint64_t begin = block * kBlockBytes;
  scratch_.resize(std::min<std::uint64_t>(kBlockBytes, token_bytes() - begin));
  read_at(file_, entry().token_offset + begin, scratch_, path_);
  if (crc32c(scratch_) != block_crc32c_[block]) {
    fail("the checksum of its tokens from ", begin / width_, " to ", (begin + scratch_.size()) / width_, " (file bytes from ",
         entry().token_offset + begin, ") is wrong: it is damaged; restore it or prepare the data set again");
  }
  block_checked_[block] = true;
}

void ShardReader::read(std::uint64_t begin, std::span<std::int32_t> tokens) {
  if (tokens.empty()) {
    return;
  }
  require(begin + tokens.size() <= entry().counts.tokens, "shard '", path_.string(), "': tokens ", begin, " to ",
          begin + tokens.size(), " are outside its ", entry().counts.tokens);
  open();
  const std::uint64_t first = begin * width_;
  const std::uint64_t size = tokens.size() * width_;
  for (std::uint64_t block = first / kBlockBytes; block <= (first + size - 1) / kBlockBytes; ++block) {
    if (!block_checked_[block]) {
      check_block(block);
    }
  }
  scratch_.resize(size);
  read_at(file_, entry().token_offset + first, scratch_, path_);
  if (width_ == 2) {
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      std::uint16_t token = 0;
      std::memcpy(&token, scratch_.data() + 2 * i, sizeof(token));
      tokens[i] = token;
    }
  } else {
    std::memcpy(tokens.data(), scratch_.data(), size);
  }
}

std::uint64_t ShardReader::document_start(std::uint64_t i) {
  open();
  std::uint64_t start = 0;
  read_at(file_, starts_offset_ + i * sizeof(start), std::as_writable_bytes(std::span(&start, 1)), path_);
  return start;
}

std::uint64_t ShardReader::first_start_at_or_after(std::uint64_t position) {
  open();
  // The page before the first page that begins at or after the position holds the answer, or the answer is that page's head.
  const auto after = std::lower_bound(sparse_starts_.begin(), sparse_starts_.end(), position);
  if (after == sparse_starts_.begin()) {
    return 0;
  }
  const std::uint64_t page = static_cast<std::uint64_t>(after - sparse_starts_.begin() - 1) * kStartsPage;
  std::vector<std::uint64_t> starts(std::min(kStartsPage, entry().counts.documents - page));
  read_at(file_, starts_offset_ + page * sizeof(std::uint64_t), std::as_writable_bytes(std::span(starts)), path_);
  return page + static_cast<std::uint64_t>(std::lower_bound(starts.begin(), starts.end(), position) - starts.begin());
}

void ShardReader::document_starts(std::uint64_t begin, std::uint64_t end, std::uint64_t shift,
                                  std::vector<std::uint64_t>& starts) {
  for (std::uint64_t i = first_start_at_or_after(begin); i < entry().counts.documents;) {
    std::vector<std::uint64_t> page(std::min(kStartsPage, entry().counts.documents - i));
    read_at(file_, starts_offset_ + i * sizeof(std::uint64_t), std::as_writable_bytes(std::span(page)), path_);
    for (const std::uint64_t start : page) {
      if (start >= end) {
        return;
      }
      starts.push_back(start + shift);
    }
    i += page.size();
  }
}

bool ShardReader::last_document_start(std::uint64_t position, std::uint64_t& start) {
  const std::uint64_t i = first_start_at_or_after(position + 1);
  if (i == 0) {
    return false;
  }
  start = document_start(i - 1);
  return true;
}

void ShardReader::verify() {
  checked_ = false;
  file_.close();
  open();
  for (std::uint64_t block = 0; block < block_crc32c_.size(); ++block) {
    check_block(block);
    for (std::size_t at = 0; at < scratch_.size(); at += width_) {
      std::uint32_t token = 0;
      std::memcpy(&token, scratch_.data() + at, width_);
      if (token >= static_cast<std::uint32_t>(vocabulary_->vocabulary_size)) {
        fail("its token ", (block * kBlockBytes + at) / width_, " is ", token, ", outside the vocabulary of ",
             vocabulary_->vocabulary_size);
      }
    }
  }
  std::vector<std::uint64_t> starts(entry().counts.documents);
  read_at(file_, starts_offset_, std::as_writable_bytes(std::span(starts)), path_);
  for (std::size_t i = 0; i < starts.size(); ++i) {
    if (starts[i] >= entry().counts.tokens || (i > 0 && starts[i] <= starts[i - 1])) {
      fail("its document starts are not in order; prepare the data set again");
    }
  }
}

}  // namespace attamba
