#include "src/train/checkpoint_file.h"

#include <fcntl.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <vector>

#include "data/files.h"
#include "src/core/crc32c.h"
#include "src/core/error.h"
#include "src/core/parallel.h"
#include "src/train/hdf5_layout.h"

namespace attamba {

namespace {

namespace fs = std::filesystem;

constexpr std::size_t kBlock = std::size_t{4} << 20;
constexpr std::size_t kReadBlock = std::size_t{512} << 10;  // is still in the cache when it is summed

/// A file that is written from its beginning to its end, small pieces gathered into blocks.
class Sink {
 public:
  Sink(fs::path path, std::uint64_t bytes, const std::atomic<bool>* cancelled)
      : path_(std::move(path)), bytes_(bytes), cancelled_(cancelled) {
    file_ = FileDescriptor(::open(path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
    if (!file_) {
      fail(errno);
    }
    // Takes the space now, so that a full disk is noticed at once; file systems that cannot are written to all the same.
    if (::fallocate(file_.get(), 0, 0, static_cast<off_t>(bytes)) != 0 && errno != EOPNOTSUPP && errno != ENOSYS &&
        errno != EINTR) {
      fail(errno);
    }
    block_.reserve(kBlock);
  }

  /// Returns the checksum of these bytes.
  std::uint32_t append(std::span<const std::byte> bytes) {
    const std::uint64_t size = bytes.size();
    std::uint32_t crc = 0;
    while (!bytes.empty()) {
      const std::span<const std::byte> part = bytes.first(std::min(bytes.size(), kBlock - block_.size()));
      crc = crc32c(part, crc);
      if (block_.empty() && part.size() == kBlock) {
        write(part);
      } else {
        block_.insert(block_.end(), part.begin(), part.end());
        if (block_.size() == kBlock) {
          flush();
        }
      }
      bytes = bytes.subspan(part.size());
    }
    crc_ = crc32c_combine(crc_, crc, size);
    return crc;
  }

  /// Returns the checksum of all that was appended.
  std::uint32_t finish() {
    flush();
    if (::fsync(file_.get()) != 0) {
      fail(errno);
    }
    // Network file systems report some errors only here.
    if (::close(file_.release()) != 0) {
      fail(errno);
    }
    return crc_;
  }

 private:
  void flush() {
    write(block_);
    block_.clear();
  }

  void write(std::span<const std::byte> bytes) {
    while (!bytes.empty()) {
      require(cancelled_ == nullptr || !*cancelled_, path_.string(), ": given up");
      const ssize_t count = ::write(file_.get(), bytes.data(), bytes.size());
      if (count < 0 && errno != EINTR) {
        fail(errno);
      }
      bytes = bytes.subspan(static_cast<std::size_t>(std::max<ssize_t>(count, 0)));
    }
  }

  [[noreturn]] void fail(int error) {
    const bool exists = static_cast<bool>(file_);
    file_.close();
    std::error_code ignored;
    if (exists) {
      fs::remove(path_, ignored);
    }
    throw Error(concat(path_.string(), ": ", std::strerror(error), ", ", bytes_, " bytes needed, ",
                       free_bytes(path_.parent_path()), " free"));
  }

  fs::path path_;
  std::uint64_t bytes_;
  const std::atomic<bool>* cancelled_;
  FileDescriptor file_;
  std::vector<std::byte> block_;
  std::uint32_t crc_ = 0;
};

std::span<const std::byte> bytes_of(const StateSlice& slice) {
  return {static_cast<const std::byte*>(slice.values.data), slice.bytes()};
}

/// Kernels copy whole pages several times as fast to where a page begins as to a little behind it, where malloc puts large
/// blocks.
constexpr std::size_t kPage = 4096;
struct FreePages {
  void operator()(std::byte* memory) const { ::operator delete (memory, std::align_val_t{kPage}); }
};

/// The CRC-32C of `size` bytes of a file from `offset`: a range per thread, put together.
std::uint32_t sum_range(const FileDescriptor& file, const fs::path& path, std::uint64_t offset, std::uint64_t size) {
  const auto ranges = static_cast<std::uint64_t>(thread_count());
  const auto begin_of = [&](std::uint64_t range) { return size / ranges * range + std::min(range, size % ranges); };
  std::vector<std::uint32_t> sums(ranges);
  std::mutex mutex;
  std::optional<std::string> error;
  parallel_for(thread_count(), [&](std::int64_t i) {
    try {
      const auto range = static_cast<std::uint64_t>(i);
      const std::uint64_t end = begin_of(range + 1);
      const std::unique_ptr<std::byte, FreePages> block(
          static_cast<std::byte*>(::operator new (kReadBlock, std::align_val_t{kPage})));
      for (std::uint64_t at = begin_of(range); at < end; at += kReadBlock) {
        const std::span bytes(block.get(), std::min<std::uint64_t>(kReadBlock, end - at));
        read_at(file, offset + at, bytes, path);
        sums[range] = crc32c(bytes, sums[range]);
      }
    } catch (const std::exception& failure) {
      const std::lock_guard lock(mutex);
      error = failure.what();
    }
  });
  require(!error.has_value(), error.value_or(""));
  std::uint32_t sum = 0;
  for (std::uint64_t range = 0; range < ranges; ++range) {
    sum = crc32c_combine(sum, sums[range], begin_of(range + 1) - begin_of(range));
  }
  return sum;
}

/// Says where a file whose checksum is wrong is damaged.
[[noreturn]] void name_damage(const FileDescriptor& file, const fs::path& path, const SavedFile& saved) {
  for (const SavedSlice& piece : saved.slices) {
    if (sum_range(file, path, piece.offset, piece.slice.bytes()) != piece.crc) {
      throw Error(concat(path.string(), ": damaged between bytes ", piece.offset, " and ", piece.offset + piece.slice.bytes(),
                         ", in ", piece.slice.name, " (elements ", piece.slice.begin, " to ", piece.slice.end, ")"));
    }
  }
  throw Error(concat(path.string(), ": damaged outside of its tensors' values (HDF5 headers)"));
}

/// What a file that is too short lacks first.
std::string first_missing(const SavedFile& saved, std::uint64_t size) {
  const SavedSlice* first = nullptr;
  for (const SavedSlice& piece : saved.slices) {
    const bool missing = piece.offset + piece.slice.bytes() > size;
    first = missing && (first == nullptr || piece.offset < first->offset) ? &piece : first;
  }
  return first == nullptr ? std::string() : concat("; it ends before or within ", first->slice.name);
}

}  // namespace

std::uint64_t free_bytes(const fs::path& path) {
  struct statvfs status {};
  const bool known = ::statvfs(path.c_str(), &status) == 0 && status.f_blocks > 0;
  return known ? static_cast<std::uint64_t>(status.f_bavail) * status.f_frsize : std::numeric_limits<std::uint64_t>::max();
}

std::uint64_t checkpoint_file_bytes(std::span<const StateSlice> slices) {
  return slices.empty() ? 0 : Hdf5Layout(slices).bytes();
}

SavedFile write_checkpoint_file(const fs::path& path, std::span<const StateSlice> slices, const std::atomic<bool>* cancelled) {
  const Hdf5Layout layout(slices);
  SavedFile saved{.name = path.filename(), .bytes = layout.bytes()};
  for (std::size_t i = 0; i < slices.size(); ++i) {
    require(slices[i].values.device == Device::cpu, "checkpoint: ", slices[i].name, " is not in host memory");
    saved.slices.push_back({.slice = slices[i], .offset = layout.offsets()[i]});
    saved.slices.back().slice.values = {};
  }
  std::vector<std::size_t> order(slices.size());
  for (std::size_t i = 0; i < order.size(); ++i) {
    order[i] = i;
  }
  std::sort(order.begin(), order.end(), [&](auto a, auto b) { return layout.offsets()[a] < layout.offsets()[b]; });
  Sink sink(path, layout.bytes(), cancelled);
  std::uint64_t at = 0;
  const auto fill_up_to = [&](std::uint64_t end) {
    std::vector<std::byte> bytes(end - at);
    layout.between().read(at, bytes);
    sink.append(bytes);
  };
  for (const std::size_t i : order) {
    fill_up_to(layout.offsets()[i]);
    saved.slices[i].crc = sink.append(bytes_of(slices[i]));
    at = layout.offsets()[i] + slices[i].bytes();
  }
  fill_up_to(layout.bytes());
  saved.crc = sink.finish();
  return saved;
}

void check_checkpoint_file(const fs::path& folder, const SavedFile& saved) {
  const fs::path path = folder / saved.name;
  const FileDescriptor file = open_for_reading(path);
  const std::uint64_t size = file_size_of(file, path);
  require(size == saved.bytes, path.string(), ": damaged, ", size, " bytes instead of ", saved.bytes,
          first_missing(saved, size));
  if (sum_range(file, path, 0, size) != saved.crc) {
    name_damage(file, path, saved);
  }
}

}  // namespace attamba
