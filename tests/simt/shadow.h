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

/// One piece of memory. Pages start with a cell per 16 bytes and get finer cells where smaller accesses touch them, so wide
/// accesses stay cheap and no two locations ever share a cell.
class Shadow {
 public:
  explicit Shadow(std::size_t bytes) : pages_((bytes + kPage - 1) / kPage) {}

  /// Accesses of 1, 2, 4, 8 or 16 bytes, aligned to their size. Note the access when nothing is wrong with it.
  Finding load(std::size_t offset, std::size_t bytes, const Now& now);
  Finding store(std::size_t offset, std::size_t bytes, const Now& now, Stamp flags = 0);
  Finding atomic(std::size_t offset, std::size_t bytes, const Now& now);
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

  std::vector<Page> pages_;
  std::vector<std::unique_ptr<Cell[]>> arena_;
};

}  // namespace attamba::simt
