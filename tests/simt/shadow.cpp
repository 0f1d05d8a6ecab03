#include "tests/simt/shadow.h"

#include <algorithm>
#include <bit>

namespace attamba::simt {

namespace {

/// Whether an earlier access and the present one, at least one of which writes, are in no order.
Verdict unordered(Stamp other, const Now& now) {
  if (other < now.launch_first) {
    return Verdict::fine;
  }
  if (other < now.block_first) {
    return ordered_between_blocks(other, (other & kAtomic) != 0) ? Verdict::fine : Verdict::race_between_blocks;
  }
  if ((other & kOtherBlocks) != 0 && !knows_other_blocks()) {
    return Verdict::race_between_blocks;
  }
  if (epoch_of(other) != epoch_of(now.stamp)) {
    return Verdict::fine;
  }
  if ((other & kSeveralWarps) != 0 || warps_differ(other, now.stamp)) {
    return Verdict::race;
  }
  if ((other & kWarpEpochMask) != (now.stamp & kWarpEpochMask)) {
    return Verdict::fine;
  }
  return (other & kSeveralLanes) != 0 || thread_of(other) != thread_of(now.stamp) ? Verdict::race : Verdict::fine;
}

bool unwritten(Stamp write, const Now& now) {
  return now.shared ? write < now.block_first : write == kUnwritten;
}

bool in_flight(Stamp write, const Now& now) {
  return (write & kInFlight) != 0 && write >= now.block_first;
}

}  // namespace

bool Shadow::load_cell(Cell& cell, const Now& now, Finding& finding) {
  if (unwritten(cell.write, now)) {
    finding = {Verdict::unwritten};
    return false;
  }
  if (in_flight(cell.write, now)) {
    finding = {Verdict::in_flight, cell.write};
    return false;
  }
  if (const Verdict verdict = unordered(cell.write, now); verdict != Verdict::fine) {
    finding = {verdict, cell.write};
    return false;
  }
  if ((cell.read & kAtomic) != 0) {
    if (const Verdict verdict = unordered(cell.read, now); verdict != Verdict::fine) {
      finding = {verdict, cell.read};
      return false;
    }
  }
  cell.read = merged(cell.read, now);
  return true;
}

bool Shadow::may_store(const Cell& cell, const Now& now, Finding& finding) {
  if (in_flight(cell.write, now)) {
    finding = {Verdict::in_flight, cell.write};
    return false;
  }
  if (const Verdict verdict = unordered(cell.write, now); verdict != Verdict::fine) {
    finding = {verdict, cell.write};
    return false;
  }
  if (const Verdict verdict = unordered(cell.read, now); verdict != Verdict::fine) {
    finding = {verdict, cell.read, (cell.read & kAtomic) == 0};
    return false;
  }
  return true;
}

bool Shadow::atomic(std::size_t offset, std::size_t bytes, const Now& now, Finding& finding) {
  const auto [begin, end] = cells(offset, bytes);
  for (Cell* cell = begin; cell != end; ++cell) {
    if (unwritten(cell->write, now)) {
      finding = {Verdict::unwritten};
      return false;
    }
    Cell others = *cell;
    others.read = (others.read & kAtomic) != 0 ? 0 : others.read;
    if (!may_store(others, now, finding)) {
      return false;
    }
    cell->read = merged(cell->read, now) | kAtomic;
  }
  return true;
}

void Shadow::refine(Page& page, std::size_t bytes) {
  const int shift = std::min(page.shift, static_cast<int>(std::bit_width(bytes)) - 1);
  arena_.push_back(std::make_unique_for_overwrite<Cell[]>(kPage >> shift));
  Cell* fresh = arena_.back().get();
  for (std::size_t i = 0; i < kPage >> shift; ++i) {
    fresh[i] = page.cells == nullptr ? Cell{page.initial, 0} : page.cells[i >> (page.shift - shift)];
  }
  page.cells = fresh;
  page.shift = shift;
}

void Shadow::set_written(std::size_t offset, std::size_t bytes, Stamp stamp) {
  const std::size_t stop = offset + bytes;
  while (offset < stop) {
    Page& page = pages_[offset / kPage];
    const std::size_t here = std::min(stop - offset, kPage - offset % kPage);
    if (page.cells == nullptr && here == kPage) {
      page.initial = stamp;
    } else {
      // The widest cells that the range's ends allow.
      const std::size_t unit = std::size_t{1} << std::min(4, std::countr_zero(offset | here));
      for (std::size_t done = 0; done < here; done += unit) {
        const auto [begin, end] = cells(offset + done, unit);
        for (Cell* cell = begin; cell != end; ++cell) {
          cell->write = stamp;
        }
      }
    }
    offset += here;
  }
}

void Shadow::forget_times() {
  for (Page& page : pages_) {
    if (page.cells != nullptr) {
      for (std::size_t i = 0; i < kPage >> page.shift; ++i) {
        Cell& cell = page.cells[i];
        cell = {cell.write == kUnwritten ? kUnwritten : kHostWrote, 0};
      }
    }
  }
}

}  // namespace attamba::simt
