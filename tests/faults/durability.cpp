#include "tests/faults/durability.h"

#include <fstream>
#include <set>
#include <sstream>

#include "src/core/error.h"

namespace attamba::faults {

namespace {

bool is_at_or_below(const std::string& path, const std::string& folder) {
  return path.starts_with(folder) && (path.size() == folder.size() || path[folder.size()] == '/');
}

std::string parent(const std::string& path) {
  return std::filesystem::path(path).parent_path();
}

/// Files and folders whose contents a power cut could take, as of some call.
class Unsynced {
 public:
  void see(const std::string& call, const std::string& path) {
    if (call == "fsync") {
      contents_.erase(path);
      renamed_into_.erase(path);
    } else if (call == "write" || call == "pwrite" || call == "writev" || call == "ftruncate" || call == "fallocate") {
      contents_.insert(path);
    } else if (call == "open") {
      contents_.insert(path);
      contents_.insert(parent(path));
    } else if (call == "mkdir") {
      contents_.insert(parent(path));
    } else if (call == "unlink" || call == "rmdir") {
      forget(path);
      contents_.insert(parent(path));
    }
  }

  /// The first thing that is not on the disk although it gets its final name; empty when all is.
  std::string rename(const std::string& from, const std::string& to) {
    std::string lost;
    for (const std::string& path : contents_) {
      if (lost.empty() && is_at_or_below(path, from)) {
        lost = path;
      }
    }
    forget(from);
    forget(to);
    contents_.insert(parent(from));
    contents_.insert(parent(to));
    renamed_into_.insert(parent(to));
    return lost;
  }

  /// A folder above `path` in which a new name may still be lost, other than what lies in an unfinished folder.
  bool newest_name_unsynced_above(const std::string& path) const {
    for (std::string folder = parent(path); folder.size() > 1; folder = parent(folder)) {
      if (renamed_into_.contains(folder)) {
        return true;
      }
    }
    return false;
  }

 private:
  void forget(const std::string& folder) {
    std::erase_if(contents_, [&](const std::string& path) { return is_at_or_below(path, folder); });
    std::erase_if(renamed_into_, [&](const std::string& path) { return is_at_or_below(path, folder); });
  }

  std::set<std::string> contents_, renamed_into_;
};

}  // namespace

std::vector<std::string> find_unsynced(const std::filesystem::path& trace) {
  std::vector<std::string> found;
  Unsynced unsynced;
  std::ifstream lines(trace);
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    std::string rank, number, call, path, arrow, to;
    words >> rank >> number >> call >> path >> arrow >> to;
    const std::string where = concat("rank ", rank, ", call ", number, ": ");
    if (call == "rename") {
      if (const std::string lost = unsynced.rename(path, to); !lost.empty()) {
        found.push_back(concat(where, to, " gets its name before ", lost, " is synced"));
      }
      continue;
    }
    const bool finished = path.find("/step-") != std::string::npos && path.find(".tmp") == std::string::npos;
    if ((call == "unlink" || call == "rmdir") && finished && unsynced.newest_name_unsynced_above(path)) {
      found.push_back(concat(where, path, " is removed before the newest checkpoint's name is synced"));
    }
    unsynced.see(call, path);
  }
  return found;
}

}  // namespace attamba::faults
