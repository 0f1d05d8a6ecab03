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
  ValueInfo& made = values_.emplace_back();
  made.type = type;
  made.role = role;
  made.name = name;
  made.wants_gradient = role == Role::parameter;
  return Value{static_cast<int>(values_.size()) - 1};
}

Value Tape::temporary(const std::string& name, const TensorType& type, Role role) {
  const Value value = leaf(name, type, role);
  info(value).temporary = true;
  return value;
}

Value Tape::view(Value base, const std::string& name, const TensorType& type, std::int64_t first) {
  const ValueInfo whole = info(base);
  require(whole.base < 0, "tape: ", name, " would be a view of the view ", whole.name);
  require(type.dtype == whole.type.dtype && first >= 0 && first + type.shape.elements() <= whole.type.shape.elements(),
          "tape: ", name, ' ', type, " from element ", first, " is not part of ", whole.name, ' ', whole.type);
  if (whole.role != Role::activation) {
    const Value value = leaf(name, type, whole.role);
    info(value).base = base.id;
    info(value).first = first;
    return value;
  }
  ValueInfo& made = values_.emplace_back();
  made.type = type;
  made.name = name;
  made.base = base.id;
  made.first = first;
  return Value{static_cast<int>(values_.size()) - 1};
}

Value Tape::memory_of(Value value) const {
  const int base = info(value).base;
  return base < 0 ? value : Value{base};
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
            .recomputed = recomputing_,
            .closing = closing_};
  const std::vector<TensorType> output_types = op->infer(input_types);
  for (std::size_t o = 0; o < output_types.size(); ++o) {
    node.outputs.push_back(Value{static_cast<int>(values_.size())});
    std::string label = concat(scope_, scope_.empty() ? "" : "/", op->name(), output_types.size() > 1 ? concat(".", o) : "");
    ValueInfo& made = values_.emplace_back();
    made.type = output_types[o];
    made.name = std::move(label);
    made.wants_gradient = wants_gradient;
  }
  nodes_.push_back(std::move(node));
  return nodes_.back().outputs;
}

Value Tape::emit_one(std::shared_ptr<const Op> op, std::span<const Value> inputs) {
  const std::vector<Value> outputs = emit(std::move(op), inputs);
  require(outputs.size() == 1, "tape: an op of ", outputs.size(), " outputs where one was expected");
  return outputs[0];
}

bool Tape::touches_memory(const Node& node, Value value) const {
  const Value memory = memory_of(value);
  const auto same = [&](Value other) { return memory_of(other) == memory; };
  return std::any_of(node.inputs.begin(), node.inputs.end(), same) ||
         std::any_of(node.outputs.begin(), node.outputs.end(), same);
}

std::size_t Tape::first_touch(Value value) const {
  const auto found = std::find_if(nodes_.begin(), nodes_.end(), [&](const Node& node) { return touches_memory(node, value); });
  return static_cast<std::size_t>(found - nodes_.begin());
}

std::size_t Tape::last_touch(Value value) const {
  const auto found =
      std::find_if(nodes_.rbegin(), nodes_.rend(), [&](const Node& node) { return touches_memory(node, value); });
  return found == nodes_.rend() ? nodes_.size() : static_cast<std::size_t>(nodes_.rend() - found) - 1;
}

void Tape::weave(std::size_t first_new, std::span<const std::size_t> places) {
  require(first_new + places.size() == nodes_.size(), "tape: ", places.size(), " places for ", nodes_.size() - first_new,
          " ops");
  std::vector<std::vector<std::size_t>> guests(first_new + 1);
  for (std::size_t i = 0; i < places.size(); ++i) {
    guests.at(places[i]).push_back(first_new + i);
  }
  std::vector<Node> woven;
  woven.reserve(nodes_.size());
  for (std::size_t i = 0; i <= first_new; ++i) {
    for (const std::size_t guest : guests[i]) {
      woven.push_back(std::move(nodes_[guest]));
    }
    if (i < first_new) {
      woven.push_back(std::move(nodes_[i]));
    }
  }
  nodes_ = std::move(woven);
}

void Tape::replace_inputs(std::size_t begin, std::size_t end, Value from, Value to) {
  require(type(from) == type(to), "tape: ", info(to).name, ' ', type(to), " in the place of ", info(from).name, ' ',
          type(from));
  for (std::size_t i = begin; i < end; ++i) {
    std::replace(nodes_[i].inputs.begin(), nodes_[i].inputs.end(), from, to);
  }
}

Tape Tape::closing_part() const {
  Tape part = *this;
  std::erase_if(part.nodes_, [](const Node& node) { return !node.closing; });
  return part;
}

void Tape::hoist_last() {
  const Node& last = nodes_.back();
  require(last.outputs.empty(), last.op->name(), ": only an op without outputs can be moved");
  const auto touches = [&](const Node& node) {
    return node.op->name() == last.op->name() ||
           std::any_of(last.inputs.begin(), last.inputs.end(), [&](Value value) { return touches_memory(node, value); });
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
