// Telling from heartbeats whether the job hangs, and because of which rank. No clock, no thread, no socket: those are the
// watchdog's (watchdog.h).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "comm/heartbeat.h"

namespace attamba {

/// What a rank is doing; kept in Heartbeat::phase.
enum class Phase : std::int32_t { starting, loading, data, step, evaluation, saving, writing, left };
std::string_view name_of(Phase phase);

/// Of the time that counts as silence: a job in which a rank has made a step within this part of it gets on, and only
/// heartbeats are lost.
inline constexpr double kGettingOn = 0.5;

class HangJudge {
 public:
  struct Finding {
    std::vector<int> ranks;   ///< to blame; empty: nobody in particular
    std::string what;         ///< "no sign of life for 9 s", ...
    std::int64_t step = 0;    ///< of the first of them (steps done)
    std::int64_t number = 0;  ///< of the collective that the others wait for it in, or that it waits in itself; 0: none
    std::string collective;   ///< that one, as CollectiveCall describes it, and its lane
    std::string phase;        ///< that the rank is in
    double seconds = 0;       ///< since it was last seen, or since it last got on
  };

  /// `silence`: seconds without a heartbeat after which a rank counts as dead. `now` is any clock, the same in all calls.
  HangJudge(std::vector<std::string> hosts, double silence, double now);

  void heard(const Heartbeat& beat, double now);
  /// This process itself did not run for so long: nobody is blamed for that time.
  void forgive(double seconds);
  /// Is the job stuck, and whose fault is it? Ranks that send nothing; else ranks that wait for nobody and have not got on for
  /// their own limit; else, when all wait for each other, those that have left, or have entered fewer collectives than others
  /// of their group, or are in another one.
  std::optional<Finding> judge(double now) const;
  /// Nothing has come from it for too long, and nobody gets on either: ranks that step need all of them, so then heartbeats
  /// alone are lost.
  bool silent(int rank, double now) const;
  bool has_left(int rank) const { return ranks_[static_cast<std::size_t>(rank)].left(); }

 private:
  struct Seen {
    Heartbeat beat;
    double heard = 0, moved = 0, stepped = 0;  ///< when
    Phase phase() const { return static_cast<Phase>(beat.phase); }
    bool left() const { return phase() == Phase::left; }
  };
  Finding blame(std::vector<int> ranks, std::string what, double seconds) const;
  std::vector<int> behind() const;
  std::vector<int> astray() const;

  std::vector<std::string> hosts_;
  double silence_;
  std::vector<Seen> ranks_;
};

/// One line: who, where, what, how far.
std::string describe(const HangJudge::Finding& finding, const std::vector<std::string>& hosts);

}  // namespace attamba
