#include "data/files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <system_error>
#include <utility>

#include "src/core/error.h"

namespace attamba {
namespace {

[[noreturn]] void throw_system_error(std::string_view operation, const std::filesystem::path& path, int error) {
  std::string advice;
  if (error == ENOSPC || error == EDQUOT) {
    advice = "; free some space there or choose another place";
  } else if (error == EACCES || error == EPERM || error == EROFS) {
    advice = "; check the permissions";
  }
  throw Error(concat("cannot ", operation, " '", path.string(), "': ", std::generic_category().message(error), advice));
}

FileDescriptor open_file(const std::filesystem::path& path, int flags, std::string_view operation) {
  int fd = -1;
  do {
    fd = ::open(path.c_str(), flags | O_CLOEXEC, 0666);
  } while (fd < 0 && errno == EINTR);
  if (fd < 0) {
    throw_system_error(operation, path, errno);
  }
  return FileDescriptor(fd);
}

void sync_folder(const std::filesystem::path& folder) {
  const FileDescriptor fd = open_file(folder, O_RDONLY | O_DIRECTORY, "open");
  // Some file systems cannot sync folders and say EINVAL; the rename is then as durable as they make it.
  if (::fsync(fd.get()) != 0 && errno != EINVAL) {
    throw_system_error("write", folder, errno);
  }
}

}  // namespace

FileDescriptor& FileDescriptor::operator=(FileDescriptor&& other) noexcept {
  if (this != &other) {
    close();
    fd_ = other.release();
  }
  return *this;
}

int FileDescriptor::release() {
  return std::exchange(fd_, -1);
}

void FileDescriptor::close() {
  if (fd_ >= 0) {
    ::close(std::exchange(fd_, -1));
  }
}

FileDescriptor open_for_reading(const std::filesystem::path& path) {
  return open_file(path, O_RDONLY, "open");
}

std::uint64_t file_size_of(const FileDescriptor& file, const std::filesystem::path& path) {
  struct stat status {};
  if (::fstat(file.get(), &status) != 0) {
    throw_system_error("read", path, errno);
  }
  require(S_ISREG(status.st_mode), "cannot read '", path.string(), "': it is not a regular file");
  return static_cast<std::uint64_t>(status.st_size);
}

void read_at(const FileDescriptor& file, std::uint64_t offset, std::span<std::byte> bytes, const std::filesystem::path& path) {
  while (!bytes.empty()) {
    const ssize_t count = ::pread(file.get(), bytes.data(), bytes.size(), static_cast<off_t>(offset));
    if (count < 0) {
      if (errno == EINTR) {
        continue;
      }
      throw_system_error("read", path, errno);
    }
    require(count > 0, "cannot read '", path.string(), "': it ends at byte ", offset, ", ", bytes.size(),
            " bytes before the data that it should hold");
    offset += static_cast<std::uint64_t>(count);
    bytes = bytes.subspan(static_cast<std::size_t>(count));
  }
}

void write_all(const FileDescriptor& file, std::span<const std::byte> bytes, const std::filesystem::path& path) {
  while (!bytes.empty()) {
    const ssize_t count = ::write(file.get(), bytes.data(), bytes.size());
    if (count < 0) {
      if (errno == EINTR) {
        continue;
      }
      throw_system_error("write", path, errno);
    }
    bytes = bytes.subspan(static_cast<std::size_t>(count));
  }
}

std::string read_whole_file(const std::filesystem::path& path) {
  const FileDescriptor file = open_for_reading(path);
  std::string text(file_size_of(file, path), '\0');
  read_at(file, 0, std::as_writable_bytes(std::span(text)), path);
  return text;
}

void write_file_atomically(const std::filesystem::path& path,
                           const std::function<void(const FileDescriptor&, const std::filesystem::path&)>& write) {
  const std::filesystem::path temporary = path.string() + std::string(kTemporarySuffix);
  try {
    FileDescriptor file = open_file(temporary, O_WRONLY | O_CREAT | O_TRUNC, "write");
    write(file, temporary);
    if (::fsync(file.get()) != 0) {
      throw_system_error("write", temporary, errno);
    }
    // Network file systems report some errors only here.
    if (::close(file.release()) != 0) {
      throw_system_error("write", temporary, errno);
    }
    if (::rename(temporary.c_str(), path.c_str()) != 0) {
      throw_system_error("write", path, errno);
    }
  } catch (...) {
    ::unlink(temporary.c_str());
    throw;
  }
  sync_folder(path.has_parent_path() ? path.parent_path() : std::filesystem::path("."));
}

void write_file_atomically(const std::filesystem::path& path, std::span<const std::byte> bytes) {
  write_file_atomically(
      path, [&](const FileDescriptor& file, const std::filesystem::path& temporary) { write_all(file, bytes, temporary); });
}

void write_file_atomically(const std::filesystem::path& path, std::string_view text) {
  write_file_atomically(path, std::as_bytes(std::span(text)));
}

void make_folder(const std::filesystem::path& path) {
  std::error_code error;
  std::filesystem::create_directories(path, error);
  if (error) {
    throw_system_error("make the folder", path, error.value());
  }
  require(std::filesystem::is_directory(path, error), "cannot use '", path.string(), "' as a folder: it is a file");
}

}  // namespace attamba
