// Asking a run to stop, so that it saves and can go on later: by a signal to any rank, or because the job's time runs out.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "comm/launch_environment.h"

namespace attamba {

/// The exit code of a run that was asked to stop before its last step: everything is saved, run the same command again.
inline constexpr int kExitStopped = 75;

/// Which rank was asked to stop, and why: the number of a signal, or kTimeIsUp.
struct StopRequest {
  int rank = 0;
  std::int64_t reason = 0;
};
inline constexpr std::int64_t kTimeIsUp = 1000;

/// A request as one positive number, and none as 0: the form in which ranks tell each other.
inline std::int64_t pack(const std::optional<StopRequest>& request) {
  return request ? (request->reason << 32) + request->rank : 0;
}
inline std::optional<StopRequest> unpack_stop(std::int64_t packed) {
  return packed == 0
             ? std::nullopt
             : std::optional(StopRequest{static_cast<int>(packed & 0xffffffff), static_cast<std::int64_t>(packed >> 32)});
}

/// "rank 1 got SIGTERM"
std::string describe(const StopRequest& request);

/// From now on SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 ask this process to stop. A second SIGINT kills as usual; the others may
/// come any number of times, as launchers repeat them. Until `ranks_have_met` there is nobody to stop together with: then the
/// process ends with kExitStopped by itself, a few seconds after the signal.
void handle_stop_signals();
void ranks_have_met();

/// The first of these signals that has come, or 0.
std::int64_t stop_signal();

/// When this process has to be done: SLURM_JOB_END_TIME (seconds since 1970, set by SLURM), or `seconds` (0: no limit) after
/// the program's start, whichever comes first.
class TimeLimit {
 public:
  /// `reserve`: seconds that shall be left for what nobody can foresee, like a slow file server; a quarter of the time that
  /// there is at most, so that each start gets on.
  TimeLimit(double seconds, double reserve, const EnvironmentLookup& lookup = environment_variable);

  /// Is it time to stop, `now` on the monotonic clock? The next look comes after `step` seconds, and a save takes `save`; both
  /// are counted twice.
  bool is_up(double now, double step, double save) const { return end_ && now + 2 * (step + save) + reserve_ >= *end_; }

 private:
  double reserve_;
  std::optional<double> end_;
};

}  // namespace attamba
