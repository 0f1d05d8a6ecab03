#include <algorithm>
#include <bit>
#include <cstring>

#include "data/hdf5_handle.h"
#include "data/shard.h"
#include "src/core/crc32c.h"
#include "src/core/error.h"

namespace attamba {
namespace {

static_assert(std::endian::native == std::endian::little, "shards are little-endian and written as they lie in memory");

/// Files are put together in memory, so that HDF5 never meets a full disk; they grow in steps of this size.
constexpr std::size_t kImageStep = std::size_t{1} << 20;

void put_attribute(const Hdf5File& file, const char* name, std::int64_t value) {
  const Hdf5Space scalar(H5Screate(H5S_SCALAR), "make a scalar");
  const Hdf5Attribute attribute(H5Acreate2(file.get(), name, H5T_STD_I64LE, scalar.get(), H5P_DEFAULT, H5P_DEFAULT), "make ",
                                name);
  require(H5Awrite(attribute.get(), H5T_NATIVE_INT64, &value) >= 0, "HDF5: cannot write ", name);
}

void put_attribute(const Hdf5File& file, const char* name, const std::string& value) {
  const Hdf5Type type(H5Tcopy(H5T_C_S1), "copy a type");
  H5Tset_size(type.get(), value.size() + 1);
  const Hdf5Space scalar(H5Screate(H5S_SCALAR), "make a scalar");
  const Hdf5Attribute attribute(H5Acreate2(file.get(), name, type.get(), scalar.get(), H5P_DEFAULT, H5P_DEFAULT), "make ",
                                name);
  require(H5Awrite(attribute.get(), type.get(), value.c_str()) >= 0, "HDF5: cannot write ", name);
}

/// Writes a contiguous one-dimensional dataset and returns where its bytes begin in the file (0 when it is empty).
std::uint64_t put_dataset(const Hdf5File& file, const char* name, hid_t type, const void* data, std::uint64_t count) {
  const hsize_t extent = count;
  const Hdf5Space space(H5Screate_simple(1, &extent, nullptr), "make the extent of ", name);
  const Hdf5Properties properties(H5Pcreate(H5P_DATASET_CREATE), "make properties");
  H5Pset_obj_track_times(properties.get(), false);
  const Hdf5Dataset dataset(H5Dcreate2(file.get(), name, type, space.get(), H5P_DEFAULT, properties.get(), H5P_DEFAULT),
                            "make ", name);
  if (count == 0) {
    return 0;
  }
  require(H5Dwrite(dataset.get(), type, H5S_ALL, H5S_ALL, H5P_DEFAULT, data) >= 0, "HDF5: cannot write ", name);
  const haddr_t offset = H5Dget_offset(dataset.get());
  require(offset != HADDR_UNDEF, "HDF5: ", name, " has no address");
  return offset;
}

template <class Stored>
void append_as(std::vector<std::byte>& bytes, std::span<const std::int32_t> tokens) {
  const std::size_t before = bytes.size();
  bytes.resize(before + tokens.size() * sizeof(Stored));
  std::byte* at = bytes.data() + before;
  for (const std::int32_t token : tokens) {
    const auto stored = static_cast<Stored>(token);
    std::memcpy(at, &stored, sizeof(stored));
    at += sizeof(stored);
  }
}

}  // namespace

void ShardWriter::append(std::span<const std::int32_t> tokens) {
  for (const std::int32_t token : tokens) {
    require(token >= 0 && token < vocabulary_.vocabulary_size, "shard: token ", token, " is outside the vocabulary of ",
            vocabulary_.vocabulary_size);
  }
  bytes_.reserve(expected_tokens_ * vocabulary_.token_bytes());
  if (vocabulary_.token_bytes() == 2) {
    append_as<std::uint16_t>(bytes_, tokens);
  } else {
    append_as<std::uint32_t>(bytes_, tokens);
  }
  counts_.tokens += tokens.size();
}

void ShardWriter::count_text(const TextCounts& counts) {
  counts_.empty_documents += counts.empty_documents;
  counts_.text_bytes += counts.text_bytes;
  counts_.text_words += counts.text_words;
}

ShardEntry ShardWriter::write(const std::filesystem::path& folder, std::size_t index) {
  counts_.documents = document_starts_.size();
  ShardEntry entry{.file = shard_name(index), .counts = counts_};
  const std::uint64_t token_bytes = bytes_.size();
  const Hdf5Quiet quiet;
  std::vector<std::byte> image;
  {
    const Hdf5Properties access(H5Pcreate(H5P_FILE_ACCESS), "make properties");
    H5Pset_fapl_core(access.get(), kImageStep, false);
    const Hdf5File file(H5Fcreate(entry.file.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, access.get()), "make ", entry.file);
    put_attribute(file, "format", "attamba-tokens");
    put_attribute(file, "format_version", kDataFormatVersion);
    put_attribute(file, "tokenizer_sha256", vocabulary_.tokenizer_sha256);
    put_attribute(file, "vocabulary_size", vocabulary_.vocabulary_size);
    put_attribute(file, "bos", vocabulary_.bos);
    put_attribute(file, "eos", vocabulary_.eos);
    put_attribute(file, "unknown", vocabulary_.unknown);
    put_attribute(file, "shard_index", static_cast<std::int64_t>(index));
    put_attribute(file, "block_bytes", kBlockBytes);
    put_attribute(file, "text_bytes", static_cast<std::int64_t>(counts_.text_bytes));
    put_attribute(file, "text_words", static_cast<std::int64_t>(counts_.text_words));

    std::vector<std::uint32_t> checksums;
    for (std::size_t at = 0; at < bytes_.size(); at += kBlockBytes) {
      checksums.push_back(crc32c(std::span(bytes_).subspan(at, std::min(kBlockBytes, bytes_.size() - at))));
    }
    put_dataset(file, "document_starts", H5T_STD_U64LE, document_starts_.data(), document_starts_.size());
    put_dataset(file, "block_crc32c", H5T_STD_U32LE, checksums.data(), checksums.size());
    entry.token_offset = put_dataset(file, "tokens", vocabulary_.token_bytes() == 2 ? H5T_STD_U16LE : H5T_STD_U32LE,
                                     bytes_.data(), counts_.tokens);
    // The library holds a copy now; a shard is never in memory three times.
    bytes_ = {};
    require(H5Fflush(file.get(), H5F_SCOPE_LOCAL) >= 0, "HDF5: cannot finish ", entry.file);
    const ssize_t size = H5Fget_file_image(file.get(), nullptr, 0);
    require(size > 0, "HDF5: cannot finish ", entry.file);
    image.resize(static_cast<std::size_t>(size));
    require(H5Fget_file_image(file.get(), image.data(), image.size()) == size, "HDF5: cannot finish ", entry.file);
  }
  const std::span<const std::byte> whole(image);
  entry.bytes = image.size();
  entry.header_crc32c = crc32c(whole.subspan(entry.token_offset + token_bytes), crc32c(whole.first(entry.token_offset)));
  write_file_atomically(folder / entry.file, whole);
  document_starts_.clear();
  counts_ = {};
  return entry;
}

}  // namespace attamba
