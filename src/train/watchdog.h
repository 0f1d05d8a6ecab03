// A thread of each rank that says how far the rank is, and ends the job when it hangs: it names the rank, and no rank waits for
// ever. It touches neither MPI nor NCCL.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "comm/heartbeat.h"
#include "src/train/hang.h"
#include "src/train/stop.h"

namespace attamba {

/// The exit code of every rank of a job that the watchdog has ended.
inline constexpr int kExitHangs = 76;

/// Every rank sends heartbeats to rank 0 and to a deputy. Rank 0 judges them (HangJudge); when the job hangs it says so on
/// standard error and in the events file, tells all ranks, and everybody who still can leaves with `_exit(kExitHangs)`. When
/// rank 0 itself is silent the deputy does that; when both are, each rank leaves by itself.
///
/// Heartbeats also carry that a rank was asked to stop, so that ranks hear of it that cannot vote, like one that waits for
/// data.
class Watchdog {
 public:
  struct Settings {
    double seconds = 10;           ///< a hang is named within these, or 5 median steps if that is longer; 0: no watchdog
    double patience = 600;         ///< for what takes longer: starting, first steps, data, loading and saving
    std::filesystem::path events;  ///< file that gets a line about a hang; its folder need not exist yet
    /// Whether this rank was asked to stop, given the median step's seconds. Both threads call it.
    std::function<std::optional<StopRequest>(double)> asked_to_stop;
  };
  /// The first steps, and replays of an evaluation, choose algorithms and record programs.
  static constexpr std::int64_t kFirstSteps = 3;

  /// All ranks call it. When heartbeats do not come through, all ranks go on without a watchdog and rank 0 says so.
  Watchdog(Communicator& communicator, Settings settings);
  ~Watchdog();
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

  /// What follows is this, after so many steps. Called, like the next two, by the thread that trains.
  void enter(Phase phase, std::int64_t step);
  /// The rank has got on, with something that is no collective.
  void tick() { ticks_.fetch_add(1, std::memory_order_relaxed); }
  void step_took(double seconds);

  /// The first request to stop that this rank knows of: its own, or another one's that came by heartbeats.
  std::optional<StopRequest> asked_to_stop() const;
  /// " on node7", or nothing without a watchdog.
  std::string on_host(int rank) const;

 private:
  /// All ranks wait until heartbeats come through, and agree on whether they do.
  void meet();
  void end_thread();
  void watch();
  void take(const Heartbeat& message, double now);
  Heartbeat own_beat();
  void publish(double now);
  void look(double now);
  bool judges(double now) const;
  bool come_through() const;
  void send_verdict() const;
  [[noreturn]] void end_job(const std::string& text, const HangJudge::Finding* finding) const;
  double limit_of(Phase phase) const;
  void hear_stop(std::int64_t packed);

  Communicator& communicator_;
  const Settings settings_;
  const double interval_, silence_, seconds_to_say_;
  std::unique_ptr<HeartbeatChannel> channel_;
  std::vector<std::string> hosts_;

  // Written by the thread that trains, read by the other one.
  std::atomic<std::int32_t> phase_ = static_cast<std::int32_t>(Phase::starting);
  std::atomic<std::int64_t> step_ = 0, ticks_ = 0;
  std::atomic<double> limit_;
  std::atomic<bool> stopping_ = false, meeting_ = true, watching_ = false;
  std::deque<double> steps_;
  std::atomic<double> median_ = 0;
  std::int64_t steps_taken_ = 0, evaluated_ = 0;

  // Written by the watching thread.
  std::atomic<std::int64_t> stop_heard_ = 0;  ///< packed
  std::atomic<std::int64_t> answered_ = 0;    ///< 1: by rank 0, 2: by the deputy, 3: by both
  std::atomic<int> heard_ranks_ = 0;
  std::optional<HangJudge> judge_;
  std::vector<bool> heard_;
  double last_answer_ = 0, woke_ = 0, stepped_ = 0;  ///< times
  std::int64_t step_seen_ = 0;
  std::thread thread_;
};

}  // namespace attamba
