// How far a rank has come with its collectives: counted where they are entered and left, read by a watchdog's thread.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "comm/collective_call.h"
#include "src/core/clock.h"

namespace attamba {

/// Collectives of one lane follow each other, in the same order on all ranks, so their numbers agree between ranks. Lanes
/// overlap. Everything may be read at any time by any thread; what moves while it is read may be one call old.
///
/// Groups that a communicator is split into count in lanes of their own beside its lanes. There, too, all ranks enter the same
/// collectives in the same order, whichever group they are in, but each waits for those of its own group alone.
class CollectiveProgress {
  struct LaneState {
    std::atomic<std::int64_t> state = 0;  ///< entries and exits
    std::atomic<std::int64_t> signature = 0;
    std::atomic<std::int32_t> color = 0;
  };

 public:
  enum Lane : std::size_t {
    foreground,
    background,
    device,  ///< on a device's stream, which reports from time to time
    kLanes
  };
  /// So many groups have lanes of their own, in the order of the splits.
  static constexpr std::size_t kGroups = 2;
  static constexpr std::size_t kAllLanes = (1 + kGroups) * kLanes;

  struct Position {
    std::int64_t number = 0;     ///< collectives entered so far; the last one's number
    std::int64_t signature = 0;  ///< of the last one (CollectiveCall)
    std::int32_t color = 0;      ///< of the group
    bool inside = false;         ///< entered and not yet left
  };
  /// Of this communicator, or this group.
  Position position(Lane lane) const { return whole_->read(first_lane_ + lane); }
  /// The communicator's own lanes, then those of the first group, and of the second.
  std::array<Position, kAllLanes> positions() const {
    std::array<Position, kAllLanes> all;
    for (std::size_t lane = 0; lane < kAllLanes; ++lane) {
      all[lane] = whole_->read(lane);
    }
    return all;
  }

  CollectiveProgress() = default;
  CollectiveProgress(const CollectiveProgress&) = delete;
  CollectiveProgress& operator=(const CollectiveProgress&) = delete;

  /// This is a group's: from now on it counts, and waits, in that of the communicator that was split, which outlives it.
  void join(CollectiveProgress& whole, int color) {
    whole_ = &whole;
    first_lane_ = (1 + whole.splits_++ % kGroups) * kLanes;
    for (std::size_t lane = first_lane_; lane < first_lane_ + kLanes; ++lane) {
      whole.lanes_[lane].color.store(color, std::memory_order_relaxed);
    }
  }

  /// While one lives, the thread that computes waits for other ranks: also for what moves in the background.
  class Waiting {
   public:
    explicit Waiting(CollectiveProgress* progress) : whole_(progress == nullptr ? nullptr : progress->whole_) {
      if (whole_ != nullptr && whole_->waiting_.fetch_add(1, std::memory_order_relaxed) == 0) {
        whole_->since_ = monotonic_seconds();
      }
    }
    ~Waiting() {
      if (whole_ != nullptr && whole_->waiting_.fetch_sub(1, std::memory_order_relaxed) == 1) {
        whole_->waited_ += monotonic_seconds() - whole_->since_;
      }
    }
    Waiting(const Waiting&) = delete;
    Waiting& operator=(const Waiting&) = delete;

   private:
    CollectiveProgress* whole_;
  };

  /// While one lives, the lane is inside a collective; in the foreground its thread also waits for other ranks.
  class Inside {
   public:
    Inside(CollectiveProgress& progress, Lane lane, const CollectiveCall& call)
        : lane_(progress.whole_->lanes_[progress.first_lane_ + lane]), waiting_(lane == foreground ? &progress : nullptr) {
      lane_.signature.store(call.signature(), std::memory_order_relaxed);
      lane_.state.fetch_add(1, std::memory_order_release);
    }
    ~Inside() { lane_.state.fetch_add(1, std::memory_order_release); }
    Inside(const Inside&) = delete;
    Inside& operator=(const Inside&) = delete;

   private:
    LaneState& lane_;
    Waiting waiting_;
  };

  /// Where the device is in its lane, as it has reported.
  void report(const Position& on_device) {
    LaneState& lane = whole_->lanes_[first_lane_ + device];
    lane.signature.store(on_device.signature, std::memory_order_relaxed);
    lane.state.store(2 * on_device.number - (on_device.inside ? 1 : 0), std::memory_order_release);
  }

  /// Does the thread that computes wait for other ranks?
  bool waiting() const { return whole_->waiting_.load(std::memory_order_relaxed) != 0; }
  /// Seconds that it has waited in all; asked by that thread.
  double waited() const { return whole_->waited_; }

 private:
  Position read(std::size_t lane) const {
    const LaneState& from = lanes_[lane];
    const std::int64_t state = from.state.load(std::memory_order_acquire);
    return {.number = (state + 1) / 2,
            .signature = from.signature.load(std::memory_order_relaxed),
            .color = from.color.load(std::memory_order_relaxed),
            .inside = state % 2 != 0};
  }

  CollectiveProgress* whole_ = this;  ///< where everything below is
  std::size_t first_lane_ = 0;

  std::array<LaneState, kAllLanes> lanes_;
  std::size_t splits_ = 0;
  std::atomic<int> waiting_ = 0;
  double since_ = 0, waited_ = 0;  ///< of the thread that computes alone
};

}  // namespace attamba
