// A training run of a tiny model, started again and again in one folder, and what its folder says about it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "tests/faults/session.h"

namespace attamba::faults {

enum class Transport { alone, mpi, tcp };

/// What all trials share.
struct Laboratory {
  std::filesystem::path program;  ///< attamba
  std::filesystem::path preload;  ///< faults.so
  std::filesystem::path data;     ///< prepared tokens

  static constexpr std::int64_t kSteps = 24;  ///< of the whole run
  static constexpr std::int64_t kEvery = 6;   ///< steps between checkpoints
  static constexpr std::int64_t kKeep = 3;    ///< checkpoints
};

/// How a command is started.
struct Start {
  int ranks = 1;
  Transport transport = Transport::alone;
  bool background = true;  ///< saving
  int zero = 0;            ///< train.zero
  Environment faults = {};
};

/// A folder with everything of one run: the run's own folder, logs, and temporary files of the launchers.
class Training {
 public:
  Training(const Laboratory& laboratory, const std::filesystem::path& folder);

  /// The n-th start's output goes to log-n.
  std::unique_ptr<Session> start(const Start& start);

  const std::filesystem::path& program() const { return laboratory_.program; }
  std::filesystem::path run() const { return folder_ / "run"; }
  std::filesystem::path fault_log(int start) const;
  std::filesystem::path trace() const { return folder_ / "trace"; }
  /// Output of the newest start.
  std::string log() const;
  /// The step after which the newest start went on, when it said so.
  std::optional<std::int64_t> resumed_after() const;

  /// The last whole line of the metrics.
  std::int64_t logged_step() const;
  /// Step and loss of every line that has one, as they were written: equal texts are equal bits.
  std::vector<std::string> curve() const;
  /// Checkpoints, newest first.
  std::vector<std::filesystem::path> checkpoints() const;
  /// A checksum over all tensors after the last step; empty when there is no such checkpoint.
  std::string final_state() const;
  /// Files and folders of interrupted writes.
  std::vector<std::string> leftovers() const;
  /// Checkpoints that are not whole, each with what it lacks: its manifest, or a file of the size that this says.
  std::vector<std::string> broken_checkpoints() const;

 private:
  std::vector<std::string> command(const Start& start) const;

  const Laboratory& laboratory_;
  std::filesystem::path folder_;
  int starts_ = 0;
};

}  // namespace attamba::faults
