// What orders the accesses of different blocks of a launch: a fence_device and then an atomic_add in one, an atomic_add in the
// other. Blocks run one after another, so the second atomic_add is the later one.
#include <algorithm>

#include "tests/simt/machine.h"

namespace attamba::simt {

namespace {

/// Epoch and number of fences: when an access of one thread comes before one of its fences.
Stamp fence_time(Stamp stamp) {
  return epoch_of(stamp) << 2 | (stamp & kFenceMask) >> kFenceShift;
}

/// Whether another thread of the same block is known to be past `earlier`.
bool before_in_block(Stamp earlier, Stamp later) {
  return epoch_of(earlier) < epoch_of(later) ||
         (epoch_of(earlier) == epoch_of(later) && ((earlier ^ later) & kThreadMask) < 32 &&
          (earlier & kWarpEpochMask) < (later & kWarpEpochMask));
}

}  // namespace

void Machine::fence() {
  Thread& thread = *current_;
  if ((thread.bits & kFenceMask) != kFenceMask) {
    thread.bits += Stamp{1} << kFenceShift;
  }
  thread.last_fence = stamp(thread);
  fenced_ = fenced_in_epoch_ = true;
}

void Machine::atomic_done() {
  Thread& thread = *current_;
  const Stamp now = stamp(thread);
  thread.did_atomic = true;
  thread.warp->first_atomic = std::min(thread.warp->first_atomic, now);
  if (first_atomic_epoch_ == 0) {
    first_atomic_epoch_ = epoch_;
  }
  if (!fenced_) {
    return;
  }
  const std::uint64_t first = epoch_of(block_first_);
  if (releases_.empty() || releases_.back().first_epoch != first) {
    releases_.push_back({first, first, std::vector<Stamp>(static_cast<std::size_t>(grid_.threads)), {}});
  }
  Release& release = releases_.back();
  release.last_epoch = epoch_;
  for (int i = 0; i < grid_.threads; ++i) {
    const Thread& other = threads_[static_cast<std::size_t>(i)];
    if (other.last_fence != 0 && (&other == &thread || before_in_block(other.last_fence, now))) {
      Stamp& before = release.before[static_cast<std::size_t>(i)];
      before = std::max(before, fence_time(other.last_fence));
    }
  }
  if (thread.last_fence != 0) {
    std::erase_if(release.fences, [&](Stamp stamp) { return thread_of(stamp) == thread.index; });
    release.fences.push_back(thread.last_fence);
  }
}

bool Machine::knows_other_blocks() const {
  const Thread& thread = *current_;
  return thread.did_atomic || (first_atomic_epoch_ != 0 && first_atomic_epoch_ < epoch_) ||
         (thread.warp->first_atomic | kFenceMask | kThreadMask) < stamp(thread);
}

bool Machine::ordered_between_blocks(Stamp other, bool atomic) const {
  if (!knows_other_blocks() || atomic) {
    return atomic && knows_other_blocks();
  }
  const std::uint64_t epoch = epoch_of(other);
  auto release = std::upper_bound(releases_.begin(), releases_.end(), epoch,
                                  [](std::uint64_t e, const Release& r) { return e < r.first_epoch; });
  if (release == releases_.begin() || (--release)->last_epoch < epoch) {
    return false;
  }
  return fence_time(other) < release->before[static_cast<std::size_t>(thread_of(other))] ||
         std::any_of(release->fences.begin(), release->fences.end(),
                     [&](Stamp fence) { return before_in_block(other, fence); });
}

bool ordered_between_blocks(Stamp other, bool atomic) {
  return machine.ordered_between_blocks(other, atomic);
}

bool knows_other_blocks() {
  return machine.knows_other_blocks();
}

}  // namespace attamba::simt
