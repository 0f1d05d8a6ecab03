// One trial: a run that meets a fault, is started again without any manual step until it ends, and must then be the run that
// nothing had happened to.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "tests/faults/training.h"

namespace attamba::faults {

enum class Fault {
  kill_rank,      ///< SIGKILL of a rank at a random time
  kill_launcher,  ///< of mpirun, or of the shell that started the ranks
  kill_job,       ///< of all processes, as when the machine goes
  interrupt,      ///< SIGTERM to a rank or to the launcher
  call_kill,      ///< SIGKILL in the place of a system call that writes
  call_torn,      ///< half of a write, then SIGKILL
  call_short,     ///< a write that writes half
  call_error,     ///< a system call that fails once: EIO, ENOSPC, EDQUOT
  disk_full,      ///< all fail from some call on until the run ends
  call_delay,     ///< a system call that takes its time
  flip,           ///< one bit of the newest checkpoint
  truncate,       ///< a file of the newest checkpoint
  remove,         ///< a file of the newest checkpoint
  all_damaged,    ///< a bit in the largest file of every checkpoint: then training must refuse to go on
  leftover,       ///< files and folders of interrupted writes lie where the next write goes
};
inline constexpr std::array kFaultNames{"kill-rank", "kill-launcher", "kill-job",    "interrupt",   "call-kill",
                                        "call-torn", "call-short",    "call-error",  "disk-full",   "call-delay",
                                        "flip-bit",  "truncate",      "remove-file", "all-damaged", "leftover"};
inline constexpr int kFaults = static_cast<int>(kFaultNames.size());

/// What runs without faults look like.
struct Reference {
  std::string state;
  std::vector<std::string> curve;
  /// System calls of each rank that write to the run's folder, by number of ranks.
  std::array<std::vector<long>, 5> calls;
  /// What a power cut could take (durability.h).
  std::vector<std::string> unsynced;
};
Reference measure_reference(const Laboratory& laboratory, const std::filesystem::path& folder);

/// When a signal comes in a start, and to whom.
struct Moment {
  std::int64_t after_steps = 0;  ///< when the metrics show so many steps more than the start went on from; 0: from the start
  double delay = 0;              ///< seconds after that
  std::uint64_t dice = 0;        ///< the rank
};

/// Everything that is drawn from a seed. How far a process gets before a signal reaches it is not.
struct Plan {
  std::uint64_t seed = 0;
  Fault fault = Fault::kill_rank;
  std::vector<Start> starts;    ///< all but the last one meet the fault, and that is repeated until the run has ended
  std::vector<Moment> moments;  ///< signals: one for each start that meets one
  std::uint64_t dice = 0;       ///< for choices that depend on what there is: the file, the byte

  std::string text() const;
};
Plan make_plan(std::uint64_t seed, const Reference& reference, const std::vector<Fault>& among);

struct Verdict {
  std::string failure;   ///< empty when all is well
  bool hit = false;      ///< the fault took place, at least once
  bool aborted = false;  ///< a system call's error ended the run
  int starts = 0;
  double ready_seconds = 0;  ///< from the first start without a fault to the message that training goes on; 0: there was none
  std::int64_t lost_steps = 0;
};
Verdict run_trial(const Plan& plan, const Laboratory& laboratory, const Reference& reference,
                  const std::filesystem::path& folder);

}  // namespace attamba::faults
