// How far a rank has come with its collectives: counted where they are entered and left, read by a watchdog's thread.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "comm/collective_call.h"
#include "src/core/clock.h"

namespace attamba {

/// Collectives of one lane follow each other on one thread, in the same order on all ranks, so their numbers agree between
/// ranks. Lanes overlap. Everything may be read at any time by any thread; what moves while it is read may be one call old.
class CollectiveProgress {
 public:
  enum Lane : std::size_t { foreground, background, kLanes };

  struct Position {
    std::int64_t number = 0;     ///< collectives entered so far; the last one's number
    std::int64_t signature = 0;  ///< of the last one (CollectiveCall)
    bool inside = false;         ///< entered and not yet left
  };
  Position position(Lane lane) const {
    const std::int64_t state = lanes_[lane].state.load(std::memory_order_acquire);
    return {.number = (state + 1) / 2,
            .signature = lanes_[lane].signature.load(std::memory_order_relaxed),
            .inside = state % 2 != 0};
  }

  /// While one lives, the lane is inside a collective; in the foreground its thread also waits for other ranks.
  class Inside {
   public:
    Inside(CollectiveProgress& progress, Lane lane, const CollectiveCall& call) : progress_(progress), lane_(lane) {
      progress_.lanes_[lane_].signature.store(call.signature(), std::memory_order_relaxed);
      progress_.lanes_[lane_].state.fetch_add(1, std::memory_order_release);
      if (lane_ == foreground) {
        progress_.begin_waiting();
      }
    }
    ~Inside() {
      if (lane_ == foreground) {
        progress_.end_waiting();
      }
      progress_.lanes_[lane_].state.fetch_add(1, std::memory_order_release);
    }
    Inside(const Inside&) = delete;
    Inside& operator=(const Inside&) = delete;

   private:
    CollectiveProgress& progress_;
    const Lane lane_;
  };

  /// While one lives, the thread that computes waits for other ranks: also for what moves in the background.
  class Waiting {
   public:
    explicit Waiting(CollectiveProgress* progress) : progress_(progress) {
      if (progress_ != nullptr) {
        progress_->begin_waiting();
      }
    }
    ~Waiting() {
      if (progress_ != nullptr) {
        progress_->end_waiting();
      }
    }
    Waiting(const Waiting&) = delete;
    Waiting& operator=(const Waiting&) = delete;

   private:
    CollectiveProgress* progress_;
  };

  /// Waiting counts there too: `whole` is that of the communicator that this one's is a group of, and outlives it.
  void count_waits_in(CollectiveProgress& whole) { whole_ = &whole; }
  /// Does the thread that computes wait for other ranks?
  bool waiting() const { return waiting_.load(std::memory_order_relaxed) != 0; }
  /// Seconds that it has waited in all; asked by that thread.
  double waited() const { return waited_; }

 private:
  struct LaneState {
    std::atomic<std::int64_t> state = 0;  ///< entries and exits
    std::atomic<std::int64_t> signature = 0;
  };

  void begin_waiting() {
    if (whole_ != nullptr) {
      whole_->begin_waiting();
    }
    if (waiting_.fetch_add(1, std::memory_order_relaxed) == 0) {
      since_ = monotonic_seconds();
    }
  }
  void end_waiting() {
    if (whole_ != nullptr) {
      whole_->end_waiting();
    }
    if (waiting_.fetch_sub(1, std::memory_order_relaxed) == 1) {
      waited_ += monotonic_seconds() - since_;
    }
  }

  std::array<LaneState, kLanes> lanes_;
  std::atomic<int> waiting_ = 0;
  CollectiveProgress* whole_ = nullptr;
  double since_ = 0, waited_ = 0;  ///< of the thread that computes alone
};

}  // namespace attamba
