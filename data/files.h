// Files as this project writes them: whole or not at all. Every error names the operation, the path and the system's reason.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <span>
#include <string>
#include <string_view>

namespace attamba {

/// Owns a POSIX file descriptor.
class FileDescriptor {
 public:
  FileDescriptor() = default;
  explicit FileDescriptor(int fd) : fd_(fd) {}
  FileDescriptor(FileDescriptor&& other) noexcept : fd_(other.release()) {}
  FileDescriptor& operator=(FileDescriptor&& other) noexcept;
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  ~FileDescriptor() { close(); }

  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  int release();
  void close();

 private:
  int fd_ = -1;
};

/// Opens for reading; throws naming the path.
FileDescriptor open_for_reading(const std::filesystem::path& path);
/// The size of an open regular file; throws when it is something else.
std::uint64_t file_size_of(const FileDescriptor& file, const std::filesystem::path& path);
/// Fills `bytes` from `offset`; throws when the file ends before, or on a read error.
void read_at(const FileDescriptor& file, std::uint64_t offset, std::span<std::byte> bytes, const std::filesystem::path& path);
/// Writes all bytes at the descriptor's position.
void write_all(const FileDescriptor& file, std::span<const std::byte> bytes, const std::filesystem::path& path);

std::string read_whole_file(const std::filesystem::path& path);

/// Writes `path` so that after any crash it is either the old file, absent, or the whole new one: a temporary file beside it,
/// fsync, rename, fsync of the folder. On an error the temporary file is removed.
void write_file_atomically(const std::filesystem::path& path, std::span<const std::byte> bytes);
void write_file_atomically(const std::filesystem::path& path, std::string_view text);
/// The same for what is written piece by piece: `write` gets the open temporary file and its path.
void write_file_atomically(const std::filesystem::path& path,
                           const std::function<void(const FileDescriptor&, const std::filesystem::path&)>& write);

/// Makes the folder and its parents.
void make_folder(const std::filesystem::path& path);

/// What the temporary files of write_file_atomically() end in; such a file is never a whole one.
inline constexpr std::string_view kTemporarySuffix = ".tmp";

}  // namespace attamba
