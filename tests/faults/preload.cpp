// faults.so, for LD_PRELOAD: counts the system calls that write below a folder, and makes one of them go wrong. What it does is
// said by environment variables, so that a program under test needs no code for it:
//
//   ATTAMBA_FAULT_FOLDER   the folder, as an absolute path without links
//   ATTAMBA_FAULT_RANK     only in this rank (by ATTAMBA_RANK, OMPI_COMM_WORLD_RANK or SLURM_PROCID; 0 without a launcher)
//   ATTAMBA_FAULT_KIND     kill: SIGKILL instead of the call; torn: half of a write, then SIGKILL; short: half of a write
//                          that says so; enospc, edquot, eio: the call fails; delay: the call comes late
//   ATTAMBA_FAULT_AT       number of the call, from 1
//   ATTAMBA_FAULT_COUNT    as many calls in a row (default 1; 0: all from there on)
//   ATTAMBA_FAULT_SCOPE    what SIGKILL hits: rank (default), or job: every process of the session
//   ATTAMBA_FAULT_DELAY    milliseconds
//   ATTAMBA_FAULT_LOG      a file to which every fault is appended as "RANK NUMBER CALL PATH"
//   ATTAMBA_FAULT_TRACE    a file to which every counted call is appended in the same form, and once more, as "failed", when it
//                          failed
//
// Calls are seen by their names in the C library. What that writes by itself is not (streams of stdio), nor are memory maps,
// modes, times and locks: training uses none of the first two for its folder, and the others change no contents.
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>

namespace {

template <class Function>
Function* next(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

enum class Kind { none, kill, torn, shorten, error, delay };

struct Settings {
  std::string folder = variable("ATTAMBA_FAULT_FOLDER"), log = variable("ATTAMBA_FAULT_LOG"),
              trace = variable("ATTAMBA_FAULT_TRACE");
  long rank = 0, at = std::atol(variable("ATTAMBA_FAULT_AT").c_str()), count = 1,
       delay = std::atol(variable("ATTAMBA_FAULT_DELAY").c_str());
  bool job = variable("ATTAMBA_FAULT_SCOPE") == "job", armed = false;
  Kind kind = Kind::none;
  int error = 0;

  Settings() {
    for (const char* name : {"ATTAMBA_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"}) {
      if (const std::string text = variable(name); !text.empty()) {
        rank = std::atol(text.c_str());
        break;
      }
    }
    const std::string only = variable("ATTAMBA_FAULT_RANK"), times = variable("ATTAMBA_FAULT_COUNT");
    armed = at > 0 && (only.empty() || std::atol(only.c_str()) == rank);
    count = times.empty() ? 1 : std::atol(times.c_str());
    struct Named {
      const char* name;
      Kind kind;
      int error;
    };
    for (const Named& named : {Named{"kill", Kind::kill, 0}, Named{"torn", Kind::torn, 0}, Named{"short", Kind::shorten, 0},
                               Named{"enospc", Kind::error, ENOSPC}, Named{"edquot", Kind::error, EDQUOT},
                               Named{"eio", Kind::error, EIO}, Named{"delay", Kind::delay, 0}}) {
      if (variable("ATTAMBA_FAULT_KIND") == named.name) {
        kind = named.kind;
        error = named.error;
      }
    }
  }
};

const Settings& settings() {
  static const Settings read;
  return read;
}

/// What is known of descriptors: opened to write below the folder, or a folder there; or opened there to read, or to sync.
enum class Use : char { other, reads, writes };
std::array<std::atomic<Use>, 65536> uses{};

void watch(int descriptor, Use use) {
  if (descriptor >= 0 && descriptor < static_cast<int>(uses.size())) {
    uses[static_cast<std::size_t>(descriptor)] = use;
  }
}

std::string path_of(int descriptor) {
  std::array<char, 4096> path{};
  const std::string link = "/proc/self/fd/" + std::to_string(descriptor);
  return readlink(link.c_str(), path.data(), path.size() - 1) > 0 ? path.data() : "";
}

std::string absolute(int folder, const char* path) {
  if (path == nullptr || *path == '/') {
    return path == nullptr ? "" : path;
  }
  std::array<char, 4096> working{};
  const std::string base = folder != AT_FDCWD                                  ? path_of(folder)
                           : getcwd(working.data(), working.size()) != nullptr ? working.data()
                                                                               : "";
  return base + '/' + path;
}

bool below(const std::string& path) {
  const std::string& folder = settings().folder;
  return !folder.empty() && path.starts_with(folder) && (path.size() == folder.size() || path[folder.size()] == '/');
}

/// A stream's descriptor may be closed behind our back and be something else by now, so its path decides.
bool is_watched(int descriptor, Use least = Use::writes) {
  return descriptor >= 0 && descriptor < static_cast<int>(uses.size()) &&
         uses[static_cast<std::size_t>(descriptor)].load() >= least && below(path_of(descriptor));
}

void append(const std::string& file, long number, const char* call, const std::string& path) {
  if (file.empty()) {
    return;
  }
  static const auto real_open = next<int(const char*, int, ...)>("open");
  static const auto real_write = next<ssize_t(int, const void*, size_t)>("write");
  static const auto real_close = next<int(int)>("close");
  const std::string line = std::to_string(settings().rank) + ' ' + std::to_string(number) + ' ' + call + ' ' + path + '\n';
  const int out = real_open(file.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  if (out >= 0) {
    [[maybe_unused]] const ssize_t written = real_write(out, line.data(), line.size());
    real_close(out);
  }
}

/// Session of a process, by /proc; -1 when it is gone.
pid_t session_of(const char* process) {
  const std::string path = std::string("/proc/") + process + "/stat";
  std::FILE* file = std::fopen(path.c_str(), "r");
  std::array<char, 1024> text{};
  if (file == nullptr) {
    return -1;
  }
  [[maybe_unused]] const std::size_t size = std::fread(text.data(), 1, text.size() - 1, file);
  std::fclose(file);
  const char* after_name = std::strrchr(text.data(), ')');
  int parent = 0, group = 0, session = -1;
  char state = 0;
  return after_name != nullptr && std::sscanf(after_name + 1, " %c %d %d %d", &state, &parent, &group, &session) == 4 ? session
                                                                                                                      : -1;
}

/// As if the machine went: no process of this session runs on.
[[noreturn]] void die() {
  if (settings().job) {
    const pid_t self = getpid(), session = getsid(0);
    if (DIR* processes = opendir("/proc")) {
      while (const dirent* entry = readdir(processes)) {
        const pid_t process = std::atoi(entry->d_name);
        if (process > 0 && process != self && session_of(entry->d_name) == session) {
          kill(process, SIGKILL);
        }
      }
    }
  }
  raise(SIGKILL);
  std::abort();  // not reached
}

enum Can : unsigned { can_be_torn = 1, can_lack_space = 2 };

struct Verdict {
  long number = 0;
  int error = 0;
  bool half = false, then_die = false;
};

/// Counts a call on a path below the folder, and says what becomes of it.
Verdict judge(const char* call, const std::string& path, unsigned can) {
  static std::atomic<long> calls{0}, faults{0};
  const Settings& s = settings();
  const long number = ++calls;
  append(s.trace, number, call, path);
  const bool no_space = s.error == ENOSPC || s.error == EDQUOT;
  // A call that cannot fail in this way passes the fault on to the next one that can.
  const bool possible = s.kind == Kind::error                             ? !no_space || (can & can_lack_space) != 0
                        : s.kind == Kind::torn || s.kind == Kind::shorten ? (can & can_be_torn) != 0
                                                                          : true;
  if (!s.armed || number < s.at || !possible || (s.count > 0 && faults >= s.count)) {
    return {.number = number};
  }
  ++faults;
  append(s.log, number, call, path);
  switch (s.kind) {
    case Kind::kill:
      die();
    case Kind::torn:
      return {.number = number, .half = true, .then_die = true};
    case Kind::shorten:
      return {.number = number, .half = true};
    case Kind::error:
      return {.number = number, .error = s.error};
    case Kind::delay:
      usleep(static_cast<useconds_t>(s.delay) * 1000);
      break;
    case Kind::none:
      break;
  }
  return {.number = number};
}

/// Runs `body` unless the call has to fail; -1 and errno then.
template <class Body>
int attempt(bool counts, const char* call, const std::string& path, unsigned can, const Body& body) {
  if (!counts) {
    return body();
  }
  const Verdict verdict = judge(call, path, can);
  const int result = verdict.error == 0 ? body() : -1;
  const int error = verdict.error == 0 ? errno : verdict.error;
  if (result < 0) {
    append(settings().trace, verdict.number, "failed", path);
  }
  errno = error;
  return result;
}

template <class Body>
ssize_t attempt_write(int descriptor, const char* call, std::size_t size, const Body& body) {
  if (!is_watched(descriptor)) {
    return body(size);
  }
  const Verdict verdict = judge(call, path_of(descriptor), can_be_torn | can_lack_space);
  if (verdict.error != 0) {
    errno = verdict.error;
    return -1;
  }
  const ssize_t written = body(verdict.half && size > 1 ? size / 2 : size);
  if (verdict.then_die) {
    die();
  }
  return written;
}

template <class Body>
int attempt_open(const char* call, int folder, const char* name, int flags, const Body& body) {
  const std::string path = absolute(folder, name);
  const bool ours = below(path), writes = (flags & (O_WRONLY | O_RDWR | O_CREAT)) != 0;
  const int descriptor = attempt(ours && writes, call, path, (flags & O_CREAT) != 0 ? can_lack_space : 0u, body);
  watch(descriptor, !ours ? Use::other : writes || (flags & O_DIRECTORY) != 0 ? Use::writes : Use::reads);
  return descriptor;
}

mode_t mode_argument(int flags, va_list arguments) {
  return (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(arguments, mode_t) : 0;
}

}  // namespace

#define ATTAMBA_OPEN(name)                                                                       \
  int name(const char* path, int flags, ...) {                                                   \
    static const auto real = next<int(const char*, int, ...)>(#name);                            \
    va_list arguments;                                                                           \
    va_start(arguments, flags);                                                                  \
    const mode_t mode = mode_argument(flags, arguments);                                         \
    va_end(arguments);                                                                           \
    return attempt_open("open", AT_FDCWD, path, flags, [&] { return real(path, flags, mode); }); \
  }
#define ATTAMBA_OPENAT(name)                                                                           \
  int name(int folder, const char* path, int flags, ...) {                                             \
    static const auto real = next<int(int, const char*, int, ...)>(#name);                             \
    va_list arguments;                                                                                 \
    va_start(arguments, flags);                                                                        \
    const mode_t mode = mode_argument(flags, arguments);                                               \
    va_end(arguments);                                                                                 \
    return attempt_open("open", folder, path, flags, [&] { return real(folder, path, flags, mode); }); \
  }
#define ATTAMBA_FOPEN(name)                                                                                          \
  FILE* name(const char* path, const char* how) {                                                                    \
    static const auto real = next<FILE*(const char*, const char*)>(#name);                                           \
    FILE* file = nullptr;                                                                                            \
    const int flags = std::strchr(how, 'w') != nullptr || std::strchr(how, 'a') != nullptr ? O_WRONLY | O_CREAT : 0; \
    attempt_open("open", AT_FDCWD, path, flags, [&] {                                                                \
      file = real(path, how);                                                                                        \
      return file == nullptr ? -1 : fileno(file);                                                                    \
    });                                                                                                              \
    return file;                                                                                                     \
  }
#define ATTAMBA_CREAT(name)                                                                            \
  int name(const char* path, mode_t mode) {                                                            \
    static const auto real = next<int(const char*, mode_t)>(#name);                                    \
    return attempt_open("open", AT_FDCWD, path, O_WRONLY | O_CREAT, [&] { return real(path, mode); }); \
  }
#define ATTAMBA_PWRITE(name)                                                                                              \
  ssize_t name(int descriptor, const void* bytes, size_t size, off_t offset) {                                            \
    static const auto real = next<ssize_t(int, const void*, size_t, off_t)>(#name);                                       \
    return attempt_write(descriptor, "pwrite", size, [&](size_t part) { return real(descriptor, bytes, part, offset); }); \
  }
#define ATTAMBA_PWRITEV(name)                                                                                  \
  ssize_t name(int descriptor, const iovec* pieces, int count, off_t offset) {                                 \
    static const auto real = next<ssize_t(int, const iovec*, int, off_t)>(#name);                              \
    return attempt_write(descriptor, "pwritev", 2,                                                             \
                         [&](size_t part) { return real(descriptor, pieces, part < 2 ? 1 : count, offset); }); \
  }
#define ATTAMBA_SENDFILE(name)                                                                             \
  ssize_t name(int out, int in, off_t* offset, size_t size) noexcept {                                     \
    static const auto real = next<ssize_t(int, int, off_t*, size_t)>(#name);                               \
    return attempt_write(out, "sendfile", size, [&](size_t part) { return real(out, in, offset, part); }); \
  }
#define ATTAMBA_FALLOCATE(name)                                                            \
  int name(int descriptor, int mode, off_t offset, off_t size) {                           \
    static const auto real = next<int(int, int, off_t, off_t)>(#name);                     \
    const bool counts = is_watched(descriptor);                                            \
    return attempt(counts, "fallocate", counts ? path_of(descriptor) : "", can_lack_space, \
                   [&] { return real(descriptor, mode, offset, size); });                  \
  }
#define ATTAMBA_POSIX_FALLOCATE(name)                                                                  \
  int name(int descriptor, off_t offset, off_t size) {                                                 \
    static const auto real = next<int(int, off_t, off_t)>(#name);                                      \
    const bool counts = is_watched(descriptor);                                                        \
    const int result = attempt(counts, "fallocate", counts ? path_of(descriptor) : "", can_lack_space, \
                               [&] { return real(descriptor, offset, size); });                        \
    return result < 0 ? errno : result;                                                                \
  }
#define ATTAMBA_FTRUNCATE(name)                                                                                        \
  int name(int descriptor, off_t size) noexcept {                                                                      \
    static const auto real = next<int(int, off_t)>(#name);                                                             \
    const bool counts = is_watched(descriptor);                                                                        \
    return attempt(counts, "ftruncate", counts ? path_of(descriptor) : "", 0, [&] { return real(descriptor, size); }); \
  }
#define ATTAMBA_FSYNC(name)                                                                       \
  int name(int descriptor) {                                                                      \
    static const auto real = next<int(int)>(#name);                                               \
    const bool counts = is_watched(descriptor, Use::reads);                                       \
    return attempt(counts, "fsync", counts ? path_of(descriptor) : std::string(), can_lack_space, \
                   [&] { return real(descriptor); });                                             \
  }
#define ATTAMBA_ON_PATH(name, call, can, folder, path, parameters, ...)              \
  int name parameters noexcept {                                                     \
    static const auto real = next<int parameters>(#name);                            \
    const std::string full = absolute(folder, path);                                 \
    return attempt(below(full), call, full, can, [&] { return real(__VA_ARGS__); }); \
  }

namespace {

/// The old name comes along, so that whoever reads a trace can follow the file.
template <class Body>
int attempt_rename(const char* call, const std::string& from, const std::string& to, const Body& body) {
  return attempt(below(from) || below(to), call, from + " -> " + to, can_lack_space, body);
}

}  // namespace

extern "C" {

ATTAMBA_OPEN(open)
ATTAMBA_OPEN(open64)
ATTAMBA_OPENAT(openat)
ATTAMBA_OPENAT(openat64)
ATTAMBA_FOPEN(fopen)
ATTAMBA_FOPEN(fopen64)

ATTAMBA_CREAT(creat)
ATTAMBA_CREAT(creat64)

ssize_t write(int descriptor, const void* bytes, size_t size) {
  static const auto real = next<ssize_t(int, const void*, size_t)>("write");
  return attempt_write(descriptor, "write", size, [&](size_t part) { return real(descriptor, bytes, part); });
}
ATTAMBA_PWRITE(pwrite)
ATTAMBA_PWRITE(pwrite64)
ATTAMBA_SENDFILE(sendfile)
ATTAMBA_SENDFILE(sendfile64)

ssize_t copy_file_range(int in, off64_t* in_offset, int out, off64_t* out_offset, size_t size, unsigned flags) {
  static const auto real = next<ssize_t(int, off64_t*, int, off64_t*, size_t, unsigned)>("copy_file_range");
  return attempt_write(out, "copy_file_range", size,
                       [&](size_t part) { return real(in, in_offset, out, out_offset, part, flags); });
}

/// Cut short, the first piece alone: that is what a short write may be.
ssize_t writev(int descriptor, const iovec* pieces, int count) {
  static const auto real = next<ssize_t(int, const iovec*, int)>("writev");
  return attempt_write(descriptor, "writev", 2, [&](size_t part) { return real(descriptor, pieces, part < 2 ? 1 : count); });
}
ATTAMBA_PWRITEV(pwritev)
ATTAMBA_PWRITEV(pwritev64)

ATTAMBA_FSYNC(fsync)
ATTAMBA_FSYNC(fdatasync)
ATTAMBA_FALLOCATE(fallocate)
ATTAMBA_FALLOCATE(fallocate64)
ATTAMBA_POSIX_FALLOCATE(posix_fallocate)
ATTAMBA_POSIX_FALLOCATE(posix_fallocate64)
ATTAMBA_FTRUNCATE(ftruncate)
ATTAMBA_FTRUNCATE(ftruncate64)

/// A close that fails has closed the file all the same.
int close(int descriptor) {
  static const auto real = next<int(int)>("close");
  if (!is_watched(descriptor)) {
    return real(descriptor);
  }
  const Verdict verdict = judge("close", path_of(descriptor), 0);
  watch(descriptor, Use::other);
  const int result = real(descriptor);
  if (verdict.error != 0) {
    errno = verdict.error;
    return -1;
  }
  return result;
}

int rename(const char* from, const char* to) noexcept {
  static const auto real = next<int(const char*, const char*)>("rename");
  return attempt_rename("rename", absolute(AT_FDCWD, from), absolute(AT_FDCWD, to), [&] { return real(from, to); });
}
int renameat(int from_folder, const char* from, int to_folder, const char* to) noexcept {
  static const auto real = next<int(int, const char*, int, const char*)>("renameat");
  return attempt_rename("rename", absolute(from_folder, from), absolute(to_folder, to),
                        [&] { return real(from_folder, from, to_folder, to); });
}
/// After an exchange there are both names, which a trace has to say.
int renameat2(int from_folder, const char* from, int to_folder, const char* to, unsigned flags) noexcept {
  static const auto real = next<int(int, const char*, int, const char*, unsigned)>("renameat2");
  return attempt_rename((flags & RENAME_EXCHANGE) != 0 ? "exchange" : "rename", absolute(from_folder, from),
                        absolute(to_folder, to), [&] { return real(from_folder, from, to_folder, to, flags); });
}
int link(const char* from, const char* to) noexcept {
  static const auto real = next<int(const char*, const char*)>("link");
  return attempt_rename("link", absolute(AT_FDCWD, from), absolute(AT_FDCWD, to), [&] { return real(from, to); });
}
int linkat(int from_folder, const char* from, int to_folder, const char* to, int flags) noexcept {
  static const auto real = next<int(int, const char*, int, const char*, int)>("linkat");
  return attempt_rename("link", absolute(from_folder, from), absolute(to_folder, to),
                        [&] { return real(from_folder, from, to_folder, to, flags); });
}

ATTAMBA_ON_PATH(symlink, "symlink", can_lack_space, AT_FDCWD, path, (const char* text, const char* path), text, path)
ATTAMBA_ON_PATH(symlinkat, "symlink", can_lack_space, folder, path, (const char* text, int folder, const char* path), text,
                folder, path)
ATTAMBA_ON_PATH(mkdir, "mkdir", can_lack_space, AT_FDCWD, path, (const char* path, mode_t mode), path, mode)
ATTAMBA_ON_PATH(mkdirat, "mkdir", can_lack_space, folder, path, (int folder, const char* path, mode_t mode), folder, path, mode)
ATTAMBA_ON_PATH(unlink, "unlink", 0, AT_FDCWD, path, (const char* path), path)
ATTAMBA_ON_PATH(unlinkat, "unlink", 0, folder, path, (int folder, const char* path, int flags), folder, path, flags)
ATTAMBA_ON_PATH(remove, "unlink", 0, AT_FDCWD, path, (const char* path), path)
ATTAMBA_ON_PATH(rmdir, "rmdir", 0, AT_FDCWD, path, (const char* path), path)
ATTAMBA_ON_PATH(truncate, "truncate", 0, AT_FDCWD, path, (const char* path, off_t size), path, size)
ATTAMBA_ON_PATH(truncate64, "truncate", 0, AT_FDCWD, path, (const char* path, off64_t size), path, size)

}  // extern "C"
