// A command with all processes that it starts, as an operator sees them: to be waited for, killed, and looked for afterwards.
#pragma once

#include <sys/types.h>

#include <filesystem>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace attamba::faults {

using Environment = std::vector<std::pair<std::string, std::string>>;

/// Processes of one session, started by one command. Whatever is left of them is killed when this object goes.
class Session {
 public:
  /// Runs `command` (looked up in PATH) with more variables, its output going to the end of `log`.
  Session(const std::vector<std::string>& command, const Environment& more, const std::filesystem::path& log);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  pid_t leader() const { return leader_; }
  /// Processes that live, zombies not among them.
  std::vector<pid_t> processes() const;
  /// Those that run this program.
  std::vector<pid_t> running(const std::filesystem::path& program) const;

  /// The command's exit code as a shell has it (128 + signal), once it has ended.
  std::optional<int> exit_code();
  void kill_all() const;

 private:
  pid_t leader_ = -1;
  std::optional<int> code_;
};

}  // namespace attamba::faults
