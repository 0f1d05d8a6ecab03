// The tape: a list of ops over values in static single assignment form. A model is declared on it once; `backward` appends the
// gradient's ops to the same list.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "src/graph/op.h"

namespace attamba {

/// A handle to one value of one tape.
struct Value {
  int id = -1;
  explicit operator bool() const { return id >= 0; }
  friend bool operator==(Value, Value) = default;
};

/// Where a value's memory lives. All but activations are leaves: named, lasting, shared between programs.
enum class Role : std::uint8_t { activation, input, parameter, gradient, state };

class Tape {
 public:
  struct ValueInfo {
    TensorType type;
    Role role = Role::activation;
    std::string name;             ///< of a leaf; otherwise "scope/op.output"
    bool wants_gradient = false;  ///< a parameter, an input asked for, or anything computed from one
    bool is_output = false;
    int base = -1;           ///< of a view: the value whose memory it is part of
    std::int64_t first = 0;  ///< ... and the element of it at which it begins
    bool temporary = false;  ///< a leaf that lies in the arena: what it holds matters within one program's run only
  };
  struct Node {
    std::shared_ptr<const Op> op;
    std::vector<Value> inputs, outputs;
    std::string scope;
    int segment = -1;
    bool recomputed = false;
    bool closing = false;  ///< `set_closing` was on
  };

  /// A named leaf. Naming an existing one again gives the same value; its type and role must agree.
  Value leaf(const std::string& name, const TensorType& type, Role role);
  Value input(const std::string& name, const TensorType& type) { return leaf(name, type, Role::input); }
  /// A trainable weight, kept in declaration order. Its gradient is the leaf "gradient/NAME" of the accumulator type.
  Value parameter(const std::string& name, const TensorType& type);
  /// A leaf, given to the program for as long as ops touch it: it may be written in place, but is not kept, nor zero at first.
  Value temporary(const std::string& name, const TensorType& type, Role role);
  /// Part of another value's memory: the elements of `type` from element `first` of `base` on. Views of leaves are leaves,
  /// which `leaf`, `parameter` and `parameter_gradient` find by their names.
  Value view(Value base, const std::string& name, const TensorType& type, std::int64_t first);
  /// Asks `backward` for the gradient of an input leaf.
  void want_gradient(Value value);

  /// Appends an op. Its types are checked here, so a wrong shape is reported where the model states it.
  std::vector<Value> emit(std::shared_ptr<const Op> op, std::span<const Value> inputs);
  /// The same for ops of one output.
  Value emit_one(std::shared_ptr<const Op> op, std::span<const Value> inputs);
  void mark_output(Value value) { info(value).is_output = true; }

  /// Names that messages and tables show: "layers.3.attention". Lives as long as the returned object.
  class [[nodiscard]] Scope {
   public:
    Scope(Tape& tape, std::string_view name);
    ~Scope() { tape_.scope_.resize(previous_length_); }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Tape& tape_;
    std::size_t previous_length_;
  };

  /// Ops emitted while the returned object lives are not kept for the backward pass but run again there (activation
  /// checkpointing). The same ops on the same inputs give the same bits. A disabled segment does nothing.
  class [[nodiscard]] Segment {
   public:
    Segment(Tape& tape, bool enabled);
    ~Segment() { tape_.current_segment_ = -1; }
    Segment(const Segment&) = delete;
    Segment& operator=(const Segment&) = delete;

   private:
    Tape& tape_;
  };

  /// Moves the last node, which must have no outputs, to right behind the last earlier node that touches any of its inputs: as
  /// early as it may run, but never past an op of its own kind, so that all ranks run those in one order. Parallel passes start
  /// collectives this way, while the backward pass goes on.
  void hoist_last();

  // What parallel passes do with a tape that is complete otherwise. Memory counts, not names: a view and its base are the same.

  /// The first and the last node that touch the memory of a value; none: size of the list.
  std::size_t first_touch(Value value) const;
  std::size_t last_touch(Value value) const;
  /// Moves the nodes from `first_new` to the end each to in front of the node `places[i]`, an index below `first_new` or
  /// `first_new` itself (for the end). Those of one place keep their order.
  void weave(std::size_t first_new, std::span<const std::size_t> places);
  /// Nodes [begin, end) read `to` instead of `from`.
  void replace_inputs(std::size_t begin, std::size_t end, Value from, Value to);
  /// Whether ops emitted from here on belong to every rank's step, also to that of a rank without a batch.
  void set_closing(bool closing) { closing_ = closing; }
  /// A copy of the tape with those alone.
  Tape closing_part() const;

  /// Appends the ops that compute the gradients of `root`, given the gradient `seed` of it. Without a seed the root's op must
  /// not need one (a loss that makes its gradient along with itself). Parameters' gradients are added to their leaves; those of
  /// inputs that want one are found by `gradient`.
  void backward(Value root, Value seed = {});
  /// Gradient of an input that `want_gradient` named; empty when nothing flows there.
  Value gradient(Value value) const;
  /// The leaf in which the gradient of a parameter accumulates.
  Value parameter_gradient(Value parameter);

  /// The value whose memory this one is, or is part of.
  Value memory_of(Value value) const;
  const TensorType& type(Value value) const { return values_[static_cast<std::size_t>(value.id)].type; }
  ValueInfo& info(Value value) { return values_[static_cast<std::size_t>(value.id)]; }
  const ValueInfo& info(Value value) const { return values_[static_cast<std::size_t>(value.id)]; }
  const std::vector<Node>& nodes() const { return nodes_; }
  const std::vector<ValueInfo>& values() const { return values_; }
  const std::vector<Value>& parameters() const { return parameters_; }

 private:
  friend class VjpContext;
  friend class BackwardWalk;

  bool touches_memory(const Node& node, Value value) const;

  std::vector<ValueInfo> values_;
  std::vector<Node> nodes_;
  std::vector<Value> parameters_;
  std::vector<Value> gradients_;  ///< by value id, after `backward`
  std::string scope_;
  int current_segment_ = -1;
  int segment_count_ = 0;
  bool recomputing_ = false;
  bool differentiated_ = false;
  bool closing_ = false;
};

/// What an op's vjp sees: its own inputs and outputs, the gradients that have arrived, and where to put its results.
class VjpContext {
 public:
  VjpContext(Tape& tape, std::span<const Value> inputs, std::span<const Value> outputs, std::span<const Value> original_inputs,
             std::span<const Value> original_outputs)
      : tape_(tape),
        inputs_(inputs),
        outputs_(outputs),
        original_inputs_(original_inputs),
        original_outputs_(original_outputs) {}

  Tape& tape() { return tape_; }
  int inputs() const { return static_cast<int>(inputs_.size()); }
  Value input(int i) const { return inputs_[static_cast<std::size_t>(i)]; }
  Value output(int o) const { return outputs_[static_cast<std::size_t>(o)]; }
  /// Gradient of output o; empty when nothing downstream depends on it.
  Value gradient(int o) const {
    return tape_.gradients_[static_cast<std::size_t>(original_outputs_[static_cast<std::size_t>(o)].id)];
  }
  bool wants(int i) const { return tape_.info(original_inputs_[static_cast<std::size_t>(i)]).wants_gradient; }
  bool is_parameter(int i) const { return tape_.info(original_inputs_[static_cast<std::size_t>(i)]).role == Role::parameter; }
  /// The leaf to accumulate into, for an input that is a parameter.
  Value parameter_gradient(int i) { return tape_.parameter_gradient(original_inputs_[static_cast<std::size_t>(i)]); }
  /// What other consumers of input i have contributed so far; empty when nothing has. An op that can add it in passing does so
  /// and calls `set`; others use ops::contribute.
  Value partial(int i) const {
    return tape_.gradients_[static_cast<std::size_t>(original_inputs_[static_cast<std::size_t>(i)].id)];
  }
  /// Replaces the partial gradient of input i by this total.
  void set(int i, Value total);

 private:
  Tape& tape_;
  std::span<const Value> inputs_, outputs_, original_inputs_, original_outputs_;
};

}  // namespace attamba
