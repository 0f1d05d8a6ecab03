// Training runs as processes of their own, that tests send signals to.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "src/core/clock.h"
#include "src/core/error.h"
#include "tests/core/temporary_folder.h"
#include "tests/launch/mpirun.h"
#include "tests/launch/shell.h"
#include "tests/launch/small_training.h"

namespace attamba {

namespace fs = std::filesystem;

/// Trials of a sampled test.
inline int trials(int usually) {
  const char* asked = std::getenv("ATTAMBA_TRIALS");
  return asked == nullptr ? usually : std::atoi(asked);
}

/// A command in the background, under mpirun or alone. Whatever is left of it goes with the object.
class Job {
 public:
  Job(const std::string& command, fs::path log, int ranks) : log_(std::move(log)), ranks_(ranks) {
    pid_ = fork();
    if (pid_ == 0) {
      execl("/bin/sh", "sh", "-c", ("exec " + command + " >" + log_.string() + " 2>&1 </dev/null").c_str(), nullptr);
      _exit(127);
    }
  }
  ~Job() {
    if (!ended_) {
      for (int r = 0; ranks_ > 1 && r < ranks_; ++r) {
        if (const pid_t pid = rank(r); pid > 0) {
          kill(pid, SIGKILL);
        }
      }
      kill(pid_, SIGKILL);
      waitpid(pid_, nullptr, 0);
    }
  }
  Job(const Job&) = delete;
  Job& operator=(const Job&) = delete;

  pid_t pid() const { return pid_; }
  /// The process of a rank: a child of mpirun's that has that number in its environment. 0: there is none (yet).
  pid_t rank(int number) const {
    if (ranks_ == 1) {
      return pid_;
    }
    const std::string children = concat("/proc/", pid_, "/task/", pid_, "/children");
    std::ifstream in(children);
    for (pid_t child; in >> child;) {
      const std::string environment = read_file(concat("/proc/", child, "/environ"));
      const std::string wanted = concat("OMPI_COMM_WORLD_RANK=", number);
      if (environment.find(wanted + '\0') != std::string::npos) {
        return child;
      }
    }
    return 0;
  }
  /// Has the process replaced itself by the program, so that its own handlers, if any, are what signals meet?
  bool handles_signals(int number) const {
    const pid_t pid = rank(number);
    const std::string status = read_file(concat("/proc/", pid, "/status"));
    const std::size_t caught = status.find("SigCgt:");
    return pid > 0 && caught != std::string::npos &&
           (std::stoull(status.substr(caught + 7), nullptr, 16) >> (SIGUSR1 - 1) & 1) != 0 &&
           (std::stoull(status.substr(caught + 7), nullptr, 16) >> (SIGTERM - 1) & 1) != 0;
  }
  template <class Condition>
  bool wait_until(const Condition& condition, double seconds = 60) {
    for (const double end = monotonic_seconds() + seconds; monotonic_seconds() < end;) {
      if (condition()) {
        return true;
      }
      if (has_ended()) {
        return condition();
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    return false;
  }
  bool wait_for_signal_handlers() {
    return wait_until([&] {
      for (int r = 0; r < ranks_; ++r) {
        if (!handles_signals(r)) {
          return false;
        }
      }
      return true;
    });
  }
  /// The exit code; -1 when it has not ended after so long, -2 when a signal has ended it.
  int exit_code(double seconds = 60) {
    const double end = monotonic_seconds() + seconds;
    while (!has_ended() && monotonic_seconds() < end) {
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    return !ended_ ? -1 : WIFEXITED(status_) ? WEXITSTATUS(status_) : -2;
  }
  std::string output() const { return read_file(log_); }

 private:
  bool has_ended() {
    ended_ = ended_ || waitpid(pid_, &status_, WNOHANG) == pid_;
    return ended_;
  }

  fs::path log_;
  int ranks_;
  pid_t pid_ = 0;
  int status_ = 0;
  bool ended_ = false;
};

/// A small data set, and runs of a small model on it.
class Reliability : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    temporary_ = std::make_unique<TemporaryFolder>();
    folder_ = temporary_->path();
    prepare_small_data(ATTAMBA_PROGRAM, folder_);
  }
  static void TearDownTestSuite() { temporary_.reset(); }

  using Keys = std::vector<std::pair<std::string, std::string>>;

  /// Settings of a run that ends on its own only after `train.steps`.
  static Keys keys(const std::string& name, const Keys& more) {
    Keys all = small_training();
    for (const auto& entry : Keys{{"train.steps", "100000"},
                                  {"optim.schedule", "constant"},
                                  {"train.global_batch", "6"},
                                  {"eval.every", "0"},
                                  {"checkpoint.every", "0"},
                                  {"data.train", (folder_ / "data/train").string()},
                                  {"data.valid", (folder_ / "data/valid").string()},
                                  {"run.folder", (folder_ / name).string()}}) {
      all.push_back(entry);
    }
    for (const auto& [key, value] : more) {
      all.erase(std::remove_if(all.begin(), all.end(), [&k = key](const auto& entry) { return entry.first == k; }), all.end());
      all.emplace_back(key, value);
    }
    return all;
  }
  static std::string training(const std::string& name, int ranks, const Keys& more = {}, const std::string& environment = "") {
    std::string command = on_ranks(ranks, ATTAMBA_PROGRAM " train", environment);
    for (const auto& [key, value] : keys(name, more)) {
      command += concat(" --", key, ' ', value);
    }
    return command;
  }
  /// With a fault: "nan 1 5-7".
  static std::string faulty(const std::string& name, int ranks, const std::string& fault, const Keys& more = {}) {
    std::string command = on_ranks(ranks, ATTAMBA_FAULTY_TRAINING " " + fault);
    for (const auto& [key, value] : keys(name, more)) {
      command += concat(' ', key, '=', value);
    }
    return command;
  }
  static std::vector<nlohmann::json> lines(const std::string& name, const char* file) {
    std::vector<nlohmann::json> found;
    std::ifstream in(folder_ / name / file);
    for (std::string line; std::getline(in, line);) {
      nlohmann::json json = nlohmann::json::parse(line, nullptr, false);
      if (!json.is_discarded()) {
        found.push_back(std::move(json));
      }
    }
    return found;
  }
  static std::vector<nlohmann::json> events(const std::string& name, const std::string& kind) {
    std::vector<nlohmann::json> all = lines(name, "events.jsonl");
    all.erase(std::remove_if(all.begin(), all.end(), [&](const auto& event) { return event.at("event") != kind; }), all.end());
    return all;
  }
  static std::int64_t steps_logged(const std::string& name) {
    const auto all = lines(name, "metrics.jsonl");
    return all.empty() ? 0 : all.back().at("step").get<std::int64_t>();
  }
  static fs::path checkpoint(const std::string& name, std::int64_t step) {
    char text[32];
    std::snprintf(text, sizeof text, "step-%09ld", static_cast<long>(step));
    return folder_ / name / "checkpoints" / text;
  }
  static nlohmann::json manifest(const std::string& name, std::int64_t step) {
    return nlohmann::json::parse(read_file(checkpoint(name, step) / "manifest.json"), nullptr, false);
  }
  /// Checksum of weights and moments.
  static std::string state_of(const std::string& name, std::int64_t step) {
    return manifest(name, step).at("state_crc32c").dump();
  }
  /// Where the last checkpoint is; -1: there is none.
  static std::int64_t saved_step(const std::string& name) {
    std::int64_t newest = -1;
    std::error_code none;
    for (const auto& entry : fs::directory_iterator(folder_ / name / "checkpoints", none)) {
      const std::string file = entry.path().filename().string();
      if (file.size() == 14) {
        newest = std::max<std::int64_t>(newest, std::stoll(file.substr(5)));
      }
    }
    return newest;
  }

  static inline std::unique_ptr<TemporaryFolder> temporary_;
  static inline fs::path folder_;
};

}  // namespace attamba
