// A compiled program: a flat list of ops over memory whose addresses never change, replayed every step.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "src/core/launch.h"
#include "src/core/storage.h"
#include "src/graph/plan.h"
#include "src/graph/tape.h"

namespace attamba {

/// The memory in which programs keep activations and scratch. Programs that never run at the same time share one: reserve for
/// each plan first, then build the programs.
class Arena {
 public:
  explicit Arena(Device device = Device::cpu) : device_(device) {}
  void reserve(std::size_t bytes) { wanted_ = bytes > wanted_ ? bytes : wanted_; }
  std::byte* data();
  std::size_t size() const { return wanted_; }
  Device device() const { return device_; }

 private:
  Device device_;
  std::size_t wanted_ = 0;
  Memory memory_;
};

/// An op's result that is not a finite number, found by `run_observed`.
class NotFinite : public Error {
 public:
  NotFinite(const std::string& message, std::int64_t row, std::int64_t rows) : Error(message), row_(row), rows_(rows) {}
  std::int64_t row() const { return row_; }    ///< the first such element's
  std::int64_t rows() const { return rows_; }  ///< of the whole tensor

 private:
  std::int64_t row_, rows_;
};

class Program {
 public:
  struct Step {
    std::shared_ptr<const Op> op;
    std::vector<Tensor> inputs, outputs;
    std::vector<std::string> input_names, output_names;  ///< of leaves, or "scope/op.output"
    std::span<std::byte> scratch;
    std::string scope;
    std::string label;  ///< "layers.3.attention/matmul", for profilers
    double flops = 0;
    std::size_t bytes = 0;  ///< least traffic (Op::traffic)
  };
  /// Called after each op with its run time; for reports.
  using Observer = std::function<void(const Step&, double seconds)>;

  Program() = default;
  Program(const Tape& tape, const Plan& plan, Storage& storage, Arena& arena);

  /// Replays the ops in order. Addresses and shapes are those of the build; nothing is allocated.
  void run(const Launch& launch) const;
  /// The same, one op at a time with timing, and, when asked, a check after each op that its floating-point results are finite;
  /// otherwise NotFinite names the op, the layer, the output and the element.
  void run_observed(const Launch& launch, const Observer& observer, bool check_finite) const;

  const std::vector<Step>& steps() const { return steps_; }
  /// The tensor of a value that was marked as an output, or of a leaf. Outputs hold until another program of the arena runs.
  Tensor tensor(Value value) const;
  double flops() const;

 private:
  std::vector<Step> steps_;
  std::vector<Tensor> tensors_;  ///< by value id; empty when not computed
};

}  // namespace attamba
