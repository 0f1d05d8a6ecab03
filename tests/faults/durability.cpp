#include "tests/faults/durability.h"

#include <fstream>
#include <set>
#include <sstream>

#include "src/core/error.h"

namespace attamba::faults {

namespace {

using Paths = std::set<std::string>;

bool is_at_or_below(const std::string& path, const std::string& folder) {
  return path.starts_with(folder) && (path.size() == folder.size() || path[folder.size()] == '/');
}

std::string parent(const std::string& path) {
  return std::filesystem::path(path).parent_path();
}

bool is_temporary(const std::string& path) {
  return path.find(".tmp") != std::string::npos;
}

bool is_finished_checkpoint(const std::string& path) {
  return path.find("/step-") != std::string::npos && !is_temporary(path);
}

void forget(Paths& paths, const std::string& folder) {
  std::erase_if(paths, [&](const std::string& path) { return is_at_or_below(path, folder); });
}

/// What is known of `from` and what lies below is now known of `to`; the other way round, too, when they are exchanged.
void move(Paths& paths, const std::string& from, const std::string& to, bool exchanged) {
  Paths moved;
  for (const std::string& path : paths) {
    if (is_at_or_below(path, from)) {
      moved.insert(to + path.substr(from.size()));
    } else if (!is_at_or_below(path, to)) {
      moved.insert(path);
    } else if (exchanged) {
      moved.insert(from + path.substr(to.size()));
    }
  }
  paths = std::move(moved);
}

/// A line of a trace.
struct Call {
  std::string rank, number, name, path, to;
};

std::vector<Call> read_calls(const std::filesystem::path& trace) {
  std::vector<Call> calls;
  std::ifstream lines(trace);
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    Call call;
    std::string arrow;
    words >> call.rank >> call.number >> call.name >> call.path >> arrow >> call.to;
    if (call.name != "failed") {
      calls.push_back(call);
      continue;
    }
    for (std::size_t i = calls.size(); i-- > 0;) {
      if (calls[i].rank == call.rank && calls[i].number == call.number) {
        calls.erase(calls.begin() + static_cast<std::ptrdiff_t>(i));
        break;
      }
    }
  }
  return calls;
}

/// What a power cut could take, as of some call.
class Unsynced {
 public:
  /// What the call makes possible that must not be; empty when it is harmless.
  std::string see(const Call& call) {
    static const std::set<std::string> writes{"write",           "pwrite",    "writev",    "pwritev", "sendfile",
                                              "copy_file_range", "ftruncate", "fallocate", "truncate"};
    if (call.name == "rename" || call.name == "exchange" || call.name == "link") {
      return rename(call);
    }
    if (call.name == "fsync") {
      contents_.erase(call.path);
      new_names_.erase(call.path);
    } else if (writes.contains(call.name)) {
      contents_.insert(call.path);
    } else if (call.name == "open") {
      contents_.insert(call.path);
      contents_.insert(parent(call.path));
    } else if (call.name == "mkdir" || call.name == "symlink") {
      contents_.insert(parent(call.path));
    } else if (call.name == "unlink" || call.name == "rmdir") {
      return remove(call.path);
    }
    return {};
  }

 private:
  std::string rename(const Call& call) {
    const bool exchanged = call.name == "exchange";
    std::string found = named_too_early(call.path, call.to);
    if (found.empty() && exchanged) {
      found = named_too_early(call.to, call.path);
    }
    if (call.name != "link") {
      if (is_finished_checkpoint(call.path) && is_temporary(call.to)) {
        found = found.empty() ? removed_too_early(call.path) : found;
        aside_.insert(call.path);
      }
      if (exchanged && is_finished_checkpoint(call.to)) {
        aside_.insert(call.to);
      }
      for (Paths* paths : {&contents_, &new_names_, &aside_}) {
        move(*paths, call.path, call.to, exchanged);
      }
      std::erase_if(aside_, [](const std::string& path) { return !is_temporary(path); });
    }
    contents_.insert(parent(call.path));
    contents_.insert(parent(call.to));
    for (const std::string& name : {call.to, exchanged ? call.path : call.to}) {
      if (!is_temporary(name)) {
        new_names_.insert(parent(name));
      }
    }
    return found;
  }

  std::string remove(const std::string& path) {
    bool counts = is_finished_checkpoint(path);
    for (const std::string& folder : aside_) {
      counts = counts || is_at_or_below(path, folder);
    }
    const std::string found = counts ? removed_too_early(path) : "";
    for (Paths* paths : {&contents_, &new_names_, &aside_}) {
      forget(*paths, path);
    }
    contents_.insert(parent(path));
    return found;
  }

  std::string named_too_early(const std::string& from, const std::string& to) const {
    for (const std::string& path : contents_) {
      if (!is_temporary(to) && is_at_or_below(path, from)) {
        return concat(to, " gets its name before ", path, " is synced");
      }
    }
    return {};
  }

  /// Whether a new name in a folder above `path` may still be lost. Names in folders beside it, and temporary ones, do not
  /// count.
  std::string removed_too_early(const std::string& path) const {
    for (std::string folder = parent(path); folder.size() > 1; folder = parent(folder)) {
      if (new_names_.contains(folder)) {
        return concat(path, " is removed before the newest checkpoint's name is synced");
      }
    }
    return {};
  }

  Paths contents_;   ///< files and folders whose contents could be lost
  Paths new_names_;  ///< folders in which a name could be lost that is not temporary
  Paths aside_;      ///< checkpoints that were finished and have a temporary name now
};

}  // namespace

std::vector<std::string> find_unsynced(const std::filesystem::path& trace) {
  std::vector<std::string> found;
  Unsynced unsynced;
  for (const Call& call : read_calls(trace)) {
    if (const std::string what = unsynced.see(call); !what.empty()) {
      found.push_back(concat("rank ", call.rank, ", call ", call.number, ": ", what));
    }
  }
  return found;
}

}  // namespace attamba::faults
