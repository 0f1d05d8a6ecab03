#include "src/train/hang.h"

#include <algorithm>
#include <array>

#include "comm/collective_call.h"
#include "src/core/error.h"

namespace attamba {

namespace {

using Position = CollectiveProgress::Position;

constexpr std::array<std::string_view, CollectiveProgress::kLanes> kLaneNames{"foreground", "background", "device"};
/// In the order in which ModelPrograms splits the ranks.
constexpr std::array<std::string_view, 1 + CollectiveProgress::kGroups> kGroupNames{"", ", among the ranks of a host",
                                                                                    ", among the ranks of the same part"};

std::string describe_call(const Position& position, std::size_t lane) {
  return concat(CollectiveCall::from_signature(position.signature).describe(), ", ",
                kLaneNames[lane % CollectiveProgress::kLanes], kGroupNames[lane / CollectiveProgress::kLanes]);
}

/// Has the rank entered fewer collectives of a lane than another one of its group?
bool is_behind(const Position& rank, const Position& other) {
  return rank.color == other.color &&
         (rank.number < other.number || (rank.number == other.number && other.inside && !rank.inside));
}

bool differ(const Position& one, const Position& other) {
  return one.color == other.color && one.inside && other.inside && one.number == other.number &&
         one.signature != other.signature;
}

}  // namespace

std::string_view name_of(Phase phase) {
  constexpr std::array<std::string_view, 8> kNames{
      "starting", "loading a checkpoint", "waiting for data", "computing a step", "evaluation", "saving", "writing results",
      "gone"};
  const auto index = static_cast<std::size_t>(phase);
  return index < kNames.size() ? kNames[index] : "unknown";
}

HangJudge::HangJudge(std::vector<std::string> hosts, double silence, double now)
    : hosts_(std::move(hosts)), silence_(silence), ranks_(hosts_.size()) {
  for (std::size_t r = 0; r < ranks_.size(); ++r) {
    ranks_[r].heard = ranks_[r].moved = ranks_[r].stepped = now;
    ranks_[r].beat.limit = silence;
    ranks_[r].beat.ticks = -1;
  }
}

void HangJudge::heard(const Heartbeat& beat, double now) {
  Seen& seen = ranks_[static_cast<std::size_t>(beat.rank)];
  if (beat.ticks < seen.beat.ticks) {
    return;  // overtaken by a later one
  }
  if (beat.ticks != seen.beat.ticks || beat.phase != seen.beat.phase) {
    seen.moved = now;
  }
  if (beat.step != seen.beat.step) {
    seen.stepped = now;
  }
  seen.heard = now;
  seen.beat = beat;
}

void HangJudge::forgive(double seconds) {
  for (Seen& seen : ranks_) {
    seen.heard += seconds;
    seen.moved += seconds;
    seen.stepped += seconds;
  }
}

bool HangJudge::silent(int rank, double now) const {
  const Seen& seen = ranks_[static_cast<std::size_t>(rank)];
  return !seen.left() && now - seen.heard > silence_ && std::none_of(ranks_.begin(), ranks_.end(), [&](const Seen& other) {
    return other.stepped > seen.heard && now - other.stepped <= kGettingOn * silence_;
  });
}

std::optional<HangJudge::Finding> HangJudge::judge(double now) const {
  std::vector<int> silent_ranks, still, gone;
  double seconds = 0;
  std::size_t waiting = 0;
  for (int r = 0; r < static_cast<int>(ranks_.size()); ++r) {
    if (silent(r, now)) {
      silent_ranks.push_back(r);
      seconds = std::max(seconds, now - ranks_[static_cast<std::size_t>(r)].heard);
    }
  }
  if (!silent_ranks.empty()) {
    return blame(std::move(silent_ranks), "no sign of life", seconds);
  }
  double shortest = -1;
  bool recent = false, patient = false;  // of those that wait
  for (int r = 0; r < static_cast<int>(ranks_.size()); ++r) {
    const Seen& seen = ranks_[static_cast<std::size_t>(r)];
    const double quiet = now - seen.moved;
    if (seen.left()) {
      gone.push_back(r);
    } else if (seen.beat.waiting != 0) {
      ++waiting;
      shortest = shortest < 0 ? quiet : std::min(shortest, quiet);
      recent = recent || quiet <= silence_;
      patient = patient || quiet <= seen.beat.limit;
    } else if (quiet <= seen.beat.limit) {
      return std::nullopt;  // gets on, or may take its time; whoever waits for it does so rightly
    } else {
      still.push_back(r);
      seconds = std::max(seconds, quiet);
    }
  }
  if (!still.empty()) {
    return recent ? std::nullopt : std::optional(blame(std::move(still), "does not get on", seconds));
  }
  if (waiting == 0 || patient) {
    return std::nullopt;  // all have left, or one may wait longer
  }
  if (!gone.empty()) {
    return blame(std::move(gone), "has left, while others wait for it", shortest);
  }
  if (std::vector<int> late = behind(); !late.empty()) {
    return blame(std::move(late), "does not come to a collective", shortest);
  }
  return blame(astray(), "is in another collective than the others", shortest);
}

/// Ranks that others wait for. Where some of these wait for others in turn, only those that do not.
std::vector<int> HangJudge::behind() const {
  std::vector<int> found, waiting_for_nobody;
  for (int r = 0; r < static_cast<int>(ranks_.size()); ++r) {
    const Heartbeat& own = ranks_[static_cast<std::size_t>(r)].beat;
    bool late = false, waits = false;
    for (std::size_t lane = 0; lane < own.lanes.size(); ++lane) {
      for (const Seen& other : ranks_) {
        late = late || is_behind(own.lanes[lane], other.beat.lanes[lane]);
        waits = waits || (own.lanes[lane].inside && is_behind(other.beat.lanes[lane], own.lanes[lane]));
      }
    }
    if (late) {
      found.push_back(r);
    }
    if (late && !waits) {
      waiting_for_nobody.push_back(r);
    }
  }
  return waiting_for_nobody.empty() ? found : waiting_for_nobody;
}

/// Ranks that are in another collective than most of their group, where all should be in the same.
std::vector<int> HangJudge::astray() const {
  std::vector<int> found;
  for (int r = 0; r < static_cast<int>(ranks_.size()); ++r) {
    const Heartbeat& own = ranks_[static_cast<std::size_t>(r)].beat;
    for (std::size_t lane = 0; lane < own.lanes.size(); ++lane) {
      std::size_t same = 0, different = 0;
      for (const Seen& other : ranks_) {
        const Position& theirs = other.beat.lanes[lane];
        different += differ(own.lanes[lane], theirs) ? 1 : 0;
        same += theirs.color == own.lanes[lane].color && theirs.number == own.lanes[lane].number &&
                        theirs.signature == own.lanes[lane].signature
                    ? 1
                    : 0;
      }
      if (different >= same && different > 0) {
        found.push_back(r);
        break;
      }
    }
  }
  return found;
}

HangJudge::Finding HangJudge::blame(std::vector<int> ranks, std::string what, double seconds) const {
  const Seen& first = ranks_[static_cast<std::size_t>(ranks.empty() ? 0 : ranks.front())];
  Finding finding{.ranks = std::move(ranks),
                  .what = std::move(what),
                  .step = first.beat.step,
                  .number = 0,
                  .collective = {},
                  .phase = std::string(name_of(first.phase())),
                  .seconds = seconds};
  for (std::size_t lane = 0; lane < first.beat.lanes.size(); ++lane) {
    const Position& own = first.beat.lanes[lane];
    for (const Seen& other : ranks_) {
      const Position& theirs = other.beat.lanes[lane];
      if (theirs.inside && is_behind(own, theirs)) {
        finding.number = theirs.number;
        finding.collective = describe_call(theirs, lane);
        return finding;
      }
    }
  }
  for (std::size_t lane = 0; lane < first.beat.lanes.size(); ++lane) {
    if (first.beat.lanes[lane].inside) {
      finding.number = first.beat.lanes[lane].number;
      finding.collective = describe_call(first.beat.lanes[lane], lane);
    }
  }
  return finding;
}

std::string describe(const HangJudge::Finding& finding, const std::vector<std::string>& hosts) {
  std::string text;
  if (finding.ranks.empty()) {
    text = "all ranks wait for each other, and nobody gets on";
  } else {
    constexpr std::size_t kNamed = 16;
    for (std::size_t i = 0; i < std::min(finding.ranks.size(), kNamed); ++i) {
      const auto rank = static_cast<std::size_t>(finding.ranks[i]);
      text += concat(i == 0 ? "" : ", ", "rank ", rank, " of ", hosts.size(), " on ", hosts[rank]);
    }
    text += concat(finding.ranks.size() > kNamed ? concat(" and ", finding.ranks.size() - kNamed, " more") : std::string(),
                   ": ", finding.what);
  }
  char duration[32];
  std::snprintf(duration, sizeof duration, " for %.1f s", finding.seconds);
  text += concat(duration, "; after step ", finding.step, ", ", finding.phase);
  if (finding.number > 0) {
    text += concat("; collective number ", finding.number, " (", finding.collective, ") waits");
  }
  return text;
}

}  // namespace attamba
