// The liveness plan: which ops run, and where every activation and scratch buffer lies in one arena. Made once per program.
#pragma once

#include <cstddef>
#include <iosfwd>
#include <string>
#include <vector>

#include "src/graph/tape.h"

namespace attamba {

struct Plan {
  /// One buffer of the arena: an activation (several, where ops work in place), a temporary leaf or an op's scratch.
  struct Buffer {
    std::string name;
    std::size_t bytes = 0;
    std::size_t offset = 0;
    int first_step = 0, last_step = 0;  ///< positions in `steps` between which the contents matter
    bool scratch = false;
  };

  std::vector<int> steps;  ///< indices of the tape's nodes that run, in order
  std::vector<Buffer> buffers;
  std::vector<int> buffer_of_value;  ///< by value id; -1: a lasting leaf, a view, or never computed
  std::vector<int> scratch_of_step;  ///< by step; -1: none
  std::size_t arena_bytes = 0;
  std::size_t unshared_bytes = 0;  ///< what the same buffers would take without sharing memory

  /// Buffers alive at the step where most bytes are, largest first.
  std::vector<const Buffer*> peak() const;
};

/// The plan of a program that runs on `device`. Ops whose results nobody uses are dropped: an op runs if it writes a leaf or
/// leads to an output.
Plan make_plan(const Tape& tape, Device device = Device::cpu);

/// Buffers of equal purpose in many layers: "layers.*.attention/matmul".
struct FoldedBuffer {
  std::string name;
  int count = 0;
  std::size_t bytes = 0;  ///< of all of them
  /// "layers.*.attention/matmul x8"
  std::string label() const;
};
/// The `most` largest of these buffers, layers folded.
std::vector<FoldedBuffer> fold_layers(const std::vector<const Plan::Buffer*>& buffers, std::size_t most);

/// Prints what a program needs by category: leaves by role (each counted once over all `tapes`), then each plan's arena.
struct MemoryReport {
  std::size_t parameters = 0, gradients = 0, state = 0, inputs = 0, arena = 0;
  std::size_t total() const { return parameters + gradients + state + inputs + arena; }
};
void print_memory_table(std::ostream& out, const MemoryReport& report, const Plan& largest);

}  // namespace attamba
