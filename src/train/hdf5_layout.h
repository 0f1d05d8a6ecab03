// An HDF5 file whose datasets' elements are still elsewhere: where each will lie, and all other bytes. The library lays the
// file out in memory and never touches a disk, so a full or failing one is met by this project's own writes alone, which can
// tell the reason and go on.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <vector>

#include "src/train/state_slice.h"

namespace attamba {

/// The bytes that HDF5 wrote, by page; others are zero.
class SparseBytes {
 public:
  void write(std::uint64_t offset, std::span<const std::byte> bytes);
  void read(std::uint64_t offset, std::span<std::byte> bytes) const;

 private:
  static constexpr std::uint64_t kPage = 4096;
  std::map<std::uint64_t, std::array<std::byte, kPage>> pages_;
};

class Hdf5Layout {
 public:
  /// One contiguous dataset per slice: a whole tensor under its name and in its shape, a part of one as NAME[BEGIN:END], flat.
  /// Attributes "shape" and "begin" say what it is a part of. Equal slices make equal bytes.
  explicit Hdf5Layout(std::span<const StateSlice> slices);

  std::uint64_t bytes() const { return bytes_; }
  /// Where the elements of each slice lie.
  const std::vector<std::uint64_t>& offsets() const { return offsets_; }
  /// Bytes of the file outside of slices.
  const SparseBytes& between() const { return between_; }

 private:
  SparseBytes between_;
  std::vector<std::uint64_t> offsets_;
  std::uint64_t bytes_ = 0;
};

}  // namespace attamba
