// Lists of tensors that travel in a kernel's parameters, so that work on all parameters or gradients is one launch.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "kernels/cuda/arguments.h"
#include "kernels/cuda/launch_kernel.h"
#include "kernels/device/elements.h"

namespace attamba::kernels::cuda::tensor_table {

constexpr int kThreads = 256;
constexpr int kWidth = 4;  ///< elements that a thread handles at a time
/// Elements of a tensor that a block handles.
constexpr int kBlockElements = 8192;
/// A kernel's parameters may take 32,764 bytes (compute capability 7.0 and CUDA 12.1 on).
constexpr int kTableBytes = 28 << 10;

template <class Entry>
struct Table {
  static constexpr int kMost = kTableBytes / static_cast<int>(sizeof(Entry));
  int count = 0;
  int blocks = 0;
  Entry entry[kMost];
};

/// What all entries begin with.
struct Extent {
  std::int64_t elements;
  int first_block;  ///< of the launch
  bool packed;      ///< all of the entry's tensors are aligned to 16 bytes
};

/// Cuts a list into tables and calls `run(table, first_block)` for each: first_block counts all blocks before the table's.
/// `entry_of(i)` makes the i-th entry; empty tensors get none.
template <class Entry, class EntryOf, class Run>
void for_each_table(std::size_t tensors, const EntryOf& entry_of, const Run& run) {
  Table<Entry> table;
  std::int64_t first_block = 0;
  const auto finish = [&] {
    run(table, first_block);
    first_block += table.blocks;
    table.count = table.blocks = 0;
  };
  for (std::size_t i = 0; i < tensors; ++i) {
    Entry entry = entry_of(i);
    if (entry.extent.elements == 0) {
      continue;
    }
    if (table.count == Table<Entry>::kMost) {
      finish();
    }
    entry.extent.first_block = table.blocks;
    table.entry[table.count++] = entry;
    table.blocks += static_cast<int>(ceil_div(entry.extent.elements, kBlockElements));
  }
  if (table.count > 0) {
    finish();
  }
}

/// The entry that this block works on.
template <class Entry>
ATTAMBA_DEVICE const Entry& entry_of_block(const Table<Entry>& table) {
  int low = 0, high = table.count;  // the last entry that begins at or before the block is in [low, high)
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.entry[middle].extent.first_block <= device::block_x() ? low : high) = middle;
  }
  return table.entry[low];
}

/// Calls `body.template operator()<width>(first)` for this thread's share of the block's elements.
template <class Body>
ATTAMBA_DEVICE void for_own_elements(const Extent& extent, const Body& body) {
  const std::int64_t begin = std::int64_t{device::block_x() - extent.first_block} * kBlockElements;
  const std::int64_t end = begin + kBlockElements < extent.elements ? begin + kBlockElements : extent.elements;
  if (extent.packed) {
    for (std::int64_t i = begin + device::thread_index() * kWidth; i + kWidth <= end; i += kThreads * kWidth) {
      body.template operator()<kWidth>(i);
    }
  }
  const std::int64_t single = extent.packed ? end - (end - begin) % kWidth : begin;
  for (std::int64_t i = single + device::thread_index(); i < end; i += kThreads) {
    body.template operator()<1>(i);
  }
}

/// `addresses`: of all tensors of the entry.
inline Extent extent_of(std::int64_t elements, std::initializer_list<const void*> addresses) {
  return {.elements = elements, .first_block = 0, .packed = aligned_16(addresses)};
}

/// For a kernel over one tensor.
inline Grid grid_of(const Extent& extent) {
  return {.x = ceil_div(extent.elements, kBlockElements), .threads = kThreads};
}

}  // namespace attamba::kernels::cuda::tensor_table
