// What the emulator knows of memory: for each piece of it, who wrote it last and who has read it since, and when.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace attamba::simt {

/// Who touched memory and when, in 64 bits. From the top: the epoch (a number that only grows: each block begins a new one, and
/// so does each sync_block), the warp's epoch within it (its warp functions), flags, the number of fences that the thread had
/// executed in this epoch, and the thread's index in its block. Blocks run one after another, so the epoch tells the block too,
/// and what was written in an earlier launch or block is known by its smaller number: nothing is cleared between them.
using Stamp = std::uint64_t;

constexpr int kFenceShift = 10, kWarpEpochShift = 17, kEpochShift = 36;
constexpr Stamp kThreadMask = 0x3ff;
constexpr Stamp kFenceMask = Stamp{3} << kFenceShift;
constexpr Stamp kSeveralLanes = 1 << 12;  ///< other lanes of the warp did the same in this warp epoch
constexpr Stamp kSeveralWarps = 1 << 13;  ///< other warps did the same in this epoch
constexpr Stamp kOtherBlocks = 1 << 14;   ///< other blocks did the same in this launch
constexpr Stamp kAtomic = 1 << 15;        ///< by atomic_add; kept with the readers
constexpr Stamp kInFlight = 1 << 16;      ///< the destination of a copy that nobody waited for yet
constexpr Stamp kWarpEpochMask = ((Stamp{1} << kEpochShift) - 1) ^ ((Stamp{1} << kWarpEpochShift) - 1);
constexpr std::uint64_t kEpochs = 1 << 28, kWarpEpochs = 1 << 19;
constexpr Stamp kUnwritten = 0, kHostWrote = 1;

inline int thread_of(Stamp stamp) {
  return static_cast<int>(stamp & kThreadMask);
}
inline std::uint64_t epoch_of(Stamp stamp) {
  return stamp >> kEpochShift;
}

/// The time of an access: its own stamp, and the first stamps of the running block and launch. For shared memory, which does
/// not outlive a block, both are the block's.
struct Now {
  Stamp stamp, block_first, launch_first;
  bool shared;

  Stamp epoch_first() const { return stamp >> kEpochShift << kEpochShift; }
};

enum class Verdict : std::uint8_t { fine, unwritten, in_flight, race, race_between_blocks };
struct Finding {
  Verdict verdict = Verdict::fine;
  Stamp other = 0;           ///< the access that it collides with
  bool other_reads = false;  ///< (else it writes)
};

/// Whether what another block of this launch did is ordered before what the running thread does now, through fence_device and
/// atomic_add; and whether the running thread may rely on any such order (machine.cpp).
bool ordered_between_blocks(Stamp other, bool atomic);
bool knows_other_blocks();

inline bool warps_differ(Stamp a, Stamp b) {
  return ((a ^ b) & kThreadMask) >= 32;
}

/// The stamp of accesses that do not exclude each other, after one more. Exact: of several warps, one is unordered with any
/// writer, and of one warp only the latest warp epoch matters.
inline Stamp merged(Stamp others, const Now& now) {
  if (others < now.launch_first) {
    return now.stamp;
  }
  if (others < now.block_first) {
    return now.stamp | kOtherBlocks;
  }
  if (others >= now.epoch_first() && (others & kSeveralWarps) != 0) {
    return others;
  }
  Stamp stamp = now.stamp | (others & kOtherBlocks);
  if (epoch_of(others) != epoch_of(stamp)) {
    return stamp;
  }
  stamp |= others & (kAtomic | kSeveralWarps);
  if (warps_differ(others, stamp)) {
    return stamp | kSeveralWarps;
  }
  if ((others & kWarpEpochMask) != (stamp & kWarpEpochMask)) {
    return stamp;
  }
  return stamp | (others & kSeveralLanes) | (thread_of(others) != thread_of(stamp) ? kSeveralLanes : 0);
}

/// One piece of memory. Pages start with a cell per 16 bytes and get finer cells where smaller accesses touch them, so wide
/// accesses stay cheap and no two locations ever share a cell.
class Shadow {
 public:
  explicit Shadow(std::size_t bytes) : pages_((bytes + kPage - 1) / kPage) {}

  /// Accesses of 1, 2, 4, 8 or 16 bytes, aligned to their size. Each notes the access; false, with what was found, when
  /// something is wrong with it.
  bool load(std::size_t offset, std::size_t bytes, const Now& now, Finding& finding) {
    const auto [begin, end] = cells(offset, bytes);
    for (Cell* cell = begin; cell != end; ++cell) {
      if (!plainly_loadable(cell->write, now) || (cell->read & kAtomic) != 0) [[unlikely]] {
        if (!load_cell(*cell, now, finding)) {
          return false;
        }
      } else if (cell->read != now.stamp) {
        cell->read = merged(cell->read, now);
      }
    }
    return true;
  }
  bool store(std::size_t offset, std::size_t bytes, const Now& now, Stamp flags, Finding& finding) {
    const auto [begin, end] = cells(offset, bytes);
    for (Cell* cell = begin; cell != end; ++cell) {
      if (!(settled(cell->write, now) && settled(cell->read, now)) && !may_store(*cell, now, finding)) [[unlikely]] {
        return false;
      }
      cell->write = now.stamp | flags;
    }
    return true;
  }
  bool atomic(std::size_t offset, std::size_t bytes, const Now& now, Finding& finding);
  /// Sets the last write of a range, whatever is there.
  void set_written(std::size_t offset, std::size_t bytes, Stamp stamp);
  /// Forgets when, but not whether memory was written: epochs start anew.
  void forget_times();

 private:
  struct Cell {
    Stamp write, read;
  };
  static constexpr std::size_t kPage = 1024;
  struct Page {
    Cell* cells = nullptr;
    Stamp initial = kUnwritten;  ///< last write, while there are no cells
    int shift = 4;
  };
  struct Range {
    Cell *begin, *end;
  };

  Range cells(std::size_t offset, std::size_t bytes) {
    Page& page = pages_[offset / kPage];
    if (page.cells == nullptr || bytes >> page.shift == 0) [[unlikely]] {
      refine(page, bytes);
    }
    Cell* begin = page.cells + (offset % kPage >> page.shift);
    return {begin, begin + (bytes >> page.shift)};
  }
  void refine(Page& page, std::size_t bytes);
  static bool load_cell(Cell& cell, const Now& now, Finding& finding);
  static bool may_store(const Cell& cell, const Now& now, Finding& finding);

  static bool before_barrier(Stamp stamp, const Now& now) {
    return stamp - now.block_first < now.epoch_first() - now.block_first && (stamp & (kInFlight | kOtherBlocks)) == 0;
  }
  /// Of most accesses: what was done earlier was done in an earlier launch, or before a barrier of this block.
  static bool plainly_loadable(Stamp write, const Now& now) {
    return before_barrier(write, now) || (!now.shared && write - 1 < now.launch_first - 1);
  }
  static bool settled(Stamp stamp, const Now& now) { return stamp < now.launch_first || before_barrier(stamp, now); }

  std::vector<Page> pages_;
  std::vector<std::unique_ptr<Cell[]>> arena_;
};

}  // namespace attamba::simt
