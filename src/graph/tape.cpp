#include "src/graph/tape.h"

#include <algorithm>

#include "src/core/error.h"

namespace attamba {

namespace {

std::string_view name_of(Role role) {
  switch (role) {
    case Role::activation:
      return "activation";
    case Role::input:
      return "input";
    case Role::parameter:
      return "parameter";
    case Role::gradient:
      return "gradient";
    case Role::state:
      return "state";
  }
  return "?";
}

}  // namespace

std::size_t Op::traffic(std::span<const TensorType> inputs, std::span<const TensorType> outputs) const {
  std::size_t bytes = 0;
  for (const std::span<const TensorType> types : {inputs, outputs}) {
    for (const TensorType& type : types) {
      bytes += type.bytes();
    }
  }
  for (const int i : mutated()) {
    bytes += inputs[static_cast<std::size_t>(i)].bytes();
  }
  return bytes;
}

void Op::vjp(VjpContext&) const {
  throw Error(concat(name(), ": has no gradient"));
}

Value Tape::leaf(const std::string& name, const TensorType& type, Role role) {
  const auto same = [&](const ValueInfo& value) { return value.role != Role::activation && value.name == name; };
  if (const auto found = std::find_if(values_.begin(), values_.end(), same); found != values_.end()) {
    require(found->type == type && found->role == role, "tape: leaf ", name, " is the ", name_of(found->role), ' ', found->type,
            ", declared again as the ", name_of(role), ' ', type);
    return Value{static_cast<int>(found - values_.begin())};
  }
  values_.push_back({.type = type, .role = role, .name = name, .wants_gradient = role == Role::parameter, .is_output = false});
  return Value{static_cast<int>(values_.size()) - 1};
}

Value Tape::parameter(const std::string& name, const TensorType& type) {
  const Value value = leaf(name, type, Role::parameter);
  if (std::find(parameters_.begin(), parameters_.end(), value) == parameters_.end()) {
    parameters_.push_back(value);
  }
  return value;
}

void Tape::want_gradient(Value value) {
  require(info(value).role == Role::input, "tape: ", info(value).name, " is not an input");
  info(value).wants_gradient = true;
}

std::vector<Value> Tape::emit(std::shared_ptr<const Op> op, std::span<const Value> inputs) {
  std::vector<TensorType> input_types;
  bool wants_gradient = false;
  for (const Value input : inputs) {
    require(static_cast<bool>(input), op->name(), ": an input is missing");
    input_types.push_back(type(input));
    wants_gradient = wants_gradient || info(input).wants_gradient;
  }
  for (const int i : op->mutated()) {
    const Role role = info(inputs[static_cast<std::size_t>(i)]).role;
    require(role != Role::activation, op->name(), ": would write an activation in place");
    require(current_segment_ < 0, op->name(), ": writes a leaf in place, so it cannot be part of a recompute segment");
  }
  Node node{.op = op,
            .inputs = {inputs.begin(), inputs.end()},
            .outputs = {},
            .scope = scope_,
            .segment = current_segment_,
            .recomputed = recomputing_};
  const std::vector<TensorType> output_types = op->infer(input_types);
  for (std::size_t o = 0; o < output_types.size(); ++o) {
    node.outputs.push_back(Value{static_cast<int>(values_.size())});
    std::string label = concat(scope_, scope_.empty() ? "" : "/", op->name(), output_types.size() > 1 ? concat(".", o) : "");
    values_.push_back({.type = output_types[o],
                       .role = Role::activation,
                       .name = std::move(label),
                       .wants_gradient = wants_gradient,
                       .is_output = false});
  }
  nodes_.push_back(std::move(node));
  return nodes_.back().outputs;
}

Value Tape::emit_one(std::shared_ptr<const Op> op, std::span<const Value> inputs) {
  const std::vector<Value> outputs = emit(std::move(op), inputs);
  require(outputs.size() == 1, "tape: an op of ", outputs.size(), " outputs where one was expected");
  return outputs[0];
}

void Tape::hoist_last() {
  const Node& last = nodes_.back();
  require(last.outputs.empty(), last.op->name(), ": only an op without outputs can be moved");
  const auto touches = [&](const Node& node) {
    return node.op->name() == last.op->name() || std::any_of(last.inputs.begin(), last.inputs.end(), [&](Value value) {
             return std::find(node.inputs.begin(), node.inputs.end(), value) != node.inputs.end() ||
                    std::find(node.outputs.begin(), node.outputs.end(), value) != node.outputs.end();
           });
  };
  std::size_t place = nodes_.size() - 1;
  while (place > 0 && !touches(nodes_[place - 1])) {
    --place;
  }
  std::rotate(nodes_.begin() + static_cast<std::ptrdiff_t>(place), nodes_.end() - 1, nodes_.end());
}

Tape::Scope::Scope(Tape& tape, std::string_view name) : tape_(tape), previous_length_(tape.scope_.size()) {
  if (!tape_.scope_.empty()) {
    tape_.scope_ += '.';
  }
  tape_.scope_ += name;
}

Tape::Segment::Segment(Tape& tape, bool enabled) : tape_(tape) {
  require(tape_.current_segment_ < 0, "tape: recompute segments do not nest");
  if (enabled) {
    tape_.current_segment_ = tape_.segment_count_++;
  }
}

}  // namespace attamba
