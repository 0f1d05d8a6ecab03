#include "tests/faults/session.h"

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <sstream>

#include "src/core/error.h"

extern char** environ;

namespace attamba::faults {

namespace fs = std::filesystem;

namespace {

struct Status {
  char state = 'Z';
  pid_t session = -1;
};

Status status_of(const fs::path& process) {
  std::ifstream file(process / "stat");
  std::string text;
  std::getline(file, text);
  const std::size_t name_end = text.rfind(')');
  Status status;
  if (name_end != std::string::npos) {
    int parent = 0, group = 0;
    std::istringstream(text.substr(name_end + 1)) >> status.state >> parent >> group >> status.session;
  }
  return status;
}

std::vector<char*> pointers(std::vector<std::string>& texts) {
  std::vector<char*> result;
  for (std::string& text : texts) {
    result.push_back(text.data());
  }
  result.push_back(nullptr);
  return result;
}

}  // namespace

Session::Session(const std::vector<std::string>& command, const Environment& more, const fs::path& log) {
  std::vector<std::string> arguments = command, variables;
  for (const auto& [name, value] : more) {
    variables.push_back(concat(name, '=', value));
  }
  for (char** inherited = environ; *inherited != nullptr; ++inherited) {
    const std::string name(*inherited, std::strcspn(*inherited, "="));
    if (std::none_of(more.begin(), more.end(), [&](const auto& one) { return one.first == name; })) {
      variables.emplace_back(*inherited);
    }
  }
  posix_spawn_file_actions_t files;
  posix_spawnattr_t how;
  posix_spawn_file_actions_init(&files);
  posix_spawnattr_init(&how);
  posix_spawn_file_actions_addopen(&files, 0, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_addopen(&files, 1, log.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0644);
  posix_spawn_file_actions_adddup2(&files, 1, 2);
  posix_spawnattr_setflags(&how, POSIX_SPAWN_SETSID);
  const int error =
      posix_spawnp(&leader_, arguments[0].c_str(), &files, &how, pointers(arguments).data(), pointers(variables).data());
  posix_spawn_file_actions_destroy(&files);
  posix_spawnattr_destroy(&how);
  require(error == 0, "cannot start ", command[0], ": ", std::strerror(error));
}

Session::~Session() {
  kill_all();
  if (!code_) {
    waitpid(leader_, nullptr, 0);
  }
}

std::vector<pid_t> Session::processes() const {
  std::vector<pid_t> found;
  for (const fs::directory_entry& entry : fs::directory_iterator("/proc")) {
    const pid_t process = std::atoi(entry.path().filename().c_str());
    if (process > 0) {
      const Status status = status_of(entry.path());
      if (status.session == leader_ && status.state != 'Z' && status.state != 'X') {
        found.push_back(process);
      }
    }
  }
  std::sort(found.begin(), found.end());
  return found;
}

std::vector<pid_t> Session::running(const fs::path& program) const {
  std::vector<pid_t> found = processes();
  std::erase_if(found, [&](pid_t process) {
    std::error_code gone;
    return fs::read_symlink(concat("/proc/", process, "/exe"), gone) != program;
  });
  return found;
}

std::optional<int> Session::exit_code() {
  int status = 0;
  if (!code_ && waitpid(leader_, &status, WNOHANG) == leader_) {
    code_ = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }
  return code_;
}

void Session::kill_all() const {
  for (const pid_t process : processes()) {
    kill(process, SIGKILL);
  }
}

}  // namespace attamba::faults
