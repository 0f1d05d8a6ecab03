// Reverse-mode differentiation: one walk over the tape from the back, asking each op for its vector-Jacobian product.
#include <algorithm>
#include <map>

#include "src/core/error.h"
#include "src/graph/tape.h"

namespace attamba {

/// State of one walk. Nodes are copied before use, since emitting may move the tape's list.
class BackwardWalk {
 public:
  BackwardWalk(Tape& tape, Value root) : tape_(tape), root_(root) {}

  void run() {
    for (std::size_t i = tape_.nodes_.size(); i-- > 0;) {
      const Tape::Node node = tape_.nodes_[i];
      const bool reached = std::any_of(node.outputs.begin(), node.outputs.end(),
                                       [&](Value v) { return v == root_ || tape_.gradients_[static_cast<std::size_t>(v.id)]; });
      const bool wanted =
          std::any_of(node.inputs.begin(), node.inputs.end(), [&](Value v) { return tape_.info(v).wants_gradient; });
      if (!reached || !wanted) {
        continue;
      }
      if (node.segment >= 0 && node.segment != recomputed_segment_) {
        recompute(node.segment);
      }
      const std::vector<Value> inputs = mapped(node.inputs), outputs = mapped(node.outputs);
      tape_.scope_ = node.scope.empty() ? "backward" : node.scope + ".backward";
      VjpContext context(tape_, inputs, outputs, node.inputs, node.outputs);
      node.op->vjp(context);
    }
    tape_.scope_.clear();
  }

 private:
  /// Emits the ops of a segment once more; their outputs stand in for the originals, which need not be kept.
  void recompute(int segment) {
    recomputed_segment_ = segment;
    replacement_.clear();
    tape_.recomputing_ = true;
    const std::size_t count = tape_.nodes_.size();
    for (std::size_t i = 0; i < count; ++i) {
      if (tape_.nodes_[i].segment != segment) {
        continue;
      }
      const Tape::Node node = tape_.nodes_[i];
      tape_.scope_ = node.scope;
      const std::vector<Value> copies = tape_.emit(node.op, mapped(node.inputs));
      tape_.gradients_.resize(tape_.values_.size());
      for (std::size_t o = 0; o < copies.size(); ++o) {
        replacement_[node.outputs[o].id] = copies[o];
      }
    }
    tape_.recomputing_ = false;
  }

  std::vector<Value> mapped(const std::vector<Value>& values) const {
    std::vector<Value> result = values;
    for (Value& value : result) {
      if (const auto found = replacement_.find(value.id); found != replacement_.end()) {
        value = found->second;
      }
    }
    return result;
  }

  Tape& tape_;
  Value root_;
  int recomputed_segment_ = -1;
  std::map<int, Value> replacement_;
};

void Tape::backward(Value root, Value seed) {
  require(!differentiated_, "tape: backward was called already");
  require(current_segment_ < 0, "tape: backward inside a recompute segment");
  differentiated_ = true;
  gradients_.resize(values_.size());
  gradients_[static_cast<std::size_t>(root.id)] = seed;
  BackwardWalk(*this, root).run();
}

Value Tape::gradient(Value value) const {
  const auto id = static_cast<std::size_t>(value.id);
  return id < gradients_.size() ? gradients_[id] : Value{};
}

Value Tape::parameter_gradient(Value parameter) {
  const ValueInfo weight = info(parameter);
  require(weight.role == Role::parameter, "tape: ", weight.name, " is not a parameter");
  return leaf("gradient/" + weight.name, {accumulator_of(weight.type.dtype), weight.type.shape}, Role::gradient);
}

void VjpContext::set(int i, Value total) {
  tape_.gradients_.resize(tape_.values_.size());
  tape_.gradients_[static_cast<std::size_t>(original_inputs_[static_cast<std::size_t>(i)].id)] = total;
}

}  // namespace attamba
