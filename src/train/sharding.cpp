#include "src/train/sharding.h"

#include <algorithm>
#include <numeric>

#include "src/core/error.h"

namespace attamba {

// ---------------------------------------------------------------------------------------------- leaves

Value Sharding::part_of_leaf(Tape& tape, Value whole, const std::string& name, const TensorType& type, Role role,
                             bool alone) const {
  return alone ? tape.leaf(name, type, role) : tape.view(whole, name, type, type.shape.elements() * communicator_.rank());
}

Value Sharding::weights_whole(Tape& tape, std::size_t b) const {
  const Bucket& bucket = layout_.buckets()[b];
  return tape.leaf(weights(b), whole_type(bucket, bucket.dtype), Role::parameter);
}

Value Sharding::weights_part(Tape& tape, std::size_t b) const {
  const Bucket& bucket = layout_.buckets()[b];
  const bool alone = options_.stage == 3;
  return part_of_leaf(tape, alone ? Value{} : weights_whole(tape, b), own(weights(b)), part_type(bucket, bucket.dtype),
                      Role::parameter, alone);
}

/// Where one micro-batch's gradients, or in stage 1 a step's, add up.
Value Sharding::gradients_whole(Tape& tape, std::size_t b) const {
  const TensorType type = whole_type(layout_.buckets()[b], options_.accumulator);
  return options_.stage == 1 ? tape.leaf(gradients(b), type, Role::gradient)
                             : tape.temporary(gradients(b), type, Role::gradient);
}

/// Float sums live from step to step here, unless fixed-point ones do: then these are borrowed for the update.
Value Sharding::gradients_part(Tape& tape, std::size_t b) const {
  const TensorType type = part_type(layout_.buckets()[b], options_.accumulator);
  if (options_.deterministic) {
    return tape.temporary(own(gradients(b)), type, Role::gradient);
  }
  const bool alone = options_.stage > 1;
  return part_of_leaf(tape, alone ? Value{} : gradients_whole(tape, b), own(gradients(b)), type, Role::gradient, alone);
}

Value Sharding::sums_whole(Tape& tape, std::size_t b) const {
  if (!options_.deterministic) {
    return gradients_whole(tape, b);
  }
  const TensorType type = whole_type(layout_.buckets()[b], DType::int64);
  return options_.stage == 1 ? tape.leaf(sums(b), type, Role::gradient) : tape.temporary(sums(b), type, Role::gradient);
}

Value Sharding::sums_part(Tape& tape, std::size_t b) const {
  if (!options_.deterministic) {
    return gradients_part(tape, b);
  }
  const bool alone = options_.stage > 1;
  return part_of_leaf(tape, alone ? Value{} : sums_whole(tape, b), own(sums(b)), part_type(layout_.buckets()[b], DType::int64),
                      Role::gradient, alone);
}

Value Sharding::slice_of(Tape& tape, Value part, const std::string& name, const ShardLayout::Slice& slice) const {
  const Tape::ValueInfo info = tape.info(part);
  return tape.view(tape.memory_of(part), name, {info.type.dtype, {slice.elements()}}, info.first + slice.at);
}

// ---------------------------------------------------------------------------------------------- passes

void Sharding::declare(Tape& tape, bool gradients) const {
  for (std::size_t b = 0; b < layout_.buckets().size(); ++b) {
    const Bucket& bucket = layout_.buckets()[b];
    for (const ShardLayout::Member& member : bucket.members) {
      const ParameterInfo& parameter = parameters_[member.parameter];
      if (options_.stage < 3) {
        tape.view(weights_whole(tape, b), parameter.name, {bucket.dtype, parameter.shape}, member.first);
      }
      if (gradients) {
        tape.view(gradients_whole(tape, b), "gradient/" + parameter.name, {options_.accumulator, parameter.shape},
                  member.first);
      }
    }
  }
}

/// Buckets in the order in which nothing touches their memory any more.
std::vector<std::size_t> Sharding::by_completion(const Tape& tape, const std::vector<Value>& wholes) const {
  std::vector<std::size_t> order(wholes.size()), last(wholes.size());
  std::iota(order.begin(), order.end(), 0);
  std::transform(wholes.begin(), wholes.end(), last.begin(), [&](Value whole) { return tape.last_touch(whole); });
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return last[a] < last[b]; });
  return order;
}

void Sharding::collect_gradients(Tape& tape, bool last, const std::function<void(Value, Value)>& add_up) const {
  const std::size_t end = tape.nodes().size();
  const bool keeps_whole = options_.stage == 1;
  std::vector<Value> wholes;
  for (std::size_t b = 0; b < layout_.buckets().size(); ++b) {
    wholes.push_back(gradients_whole(tape, b));
  }
  std::vector<std::size_t> places;
  const auto place = [&](std::size_t at) { places.resize(tape.nodes().size() - end, at); };
  // In flight: the bucket before. It may take as long as the backward pass needs for this one, and then frees its memory.
  std::function<void()> wait = [] {};
  std::vector<std::function<void()>> waits;
  std::vector<std::pair<std::shared_ptr<ops::PendingCollective>, Value>> across;
  for (const std::size_t b : by_completion(tape, wholes)) {
    const std::size_t first = std::min(tape.first_touch(wholes[b]), end);
    const std::size_t after = std::min(tape.last_touch(wholes[b]), end - 1) + 1;
    const Value sum = sums_whole(tape, b), part = sums_part(tape, b);
    const int rank = communicator_.rank();
    tape.set_closing(false);
    if (options_.deterministic && !keeps_whole) {
      ops::begin_sum(tape, wholes[b], {}, rank);
      place(first);
    }
    tape.set_closing(last);
    if (!keeps_whole) {
      ops::begin_sum(tape, sum, part, rank);
      place(options_.deterministic ? after : first);
    }
    tape.set_closing(false);
    if (options_.deterministic) {
      add_up(sum, wholes[b]);
      place(after);
    }
    tape.set_closing(last);
    if (keeps_whole && !last) {
      continue;
    }
    if (!keeps_whole) {
      wait();
    }
    const auto pending = ops::start_reduce_scatter(tape, communicator_, sum, part);
    place(after);
    wait = [&, pending, sum, part] {
      ops::wait_reduce_scatter(tape, pending, sum, part);
      if (last && copies_ != nullptr) {  // the whole step's sum, over other groups
        across.emplace_back(ops::start_all_reduce(tape, *copies_, {{part}}), part);
      }
    };
    waits.push_back(wait);
  }
  if (keeps_whole) {
    std::for_each(waits.begin(), waits.end(), [](const auto& one) { one(); });
  } else {
    wait();
  }
  for (const auto& [sum, part] : across) {
    ops::wait_all_reduce(tape, sum, {{part}});
  }
  place(end);
  tape.weave(end, places);
}

namespace {

/// One stretch of the program over which a bucket's weights are there: nodes [first, last].
struct Stay {
  std::size_t bucket = 0, first = 0, last = 0;
};

/// Stays of one bucket that nearly touch become one: to gather again what the next block but one needs would save no memory.
void merge_neighbours(std::vector<Stay>& stays) {
  for (std::size_t i = 0; i < stays.size(); ++i) {
    for (std::size_t j = i + 1; j < std::min(i + 3, stays.size()); ++j) {
      if (stays[j].bucket == stays[i].bucket) {
        stays[i].last = stays[j].last;
        stays.erase(stays.begin() + static_cast<std::ptrdiff_t>(j));
        break;
      }
    }
  }
}

}  // namespace

void Sharding::gather_weights(Tape& tape, Value boundary) const {
  if (options_.stage < 3) {
    return;
  }
  const std::size_t end = tape.nodes().size(), middle = tape.first_touch(boundary);
  std::vector<Stay> stays;
  for (std::size_t b = 0; b < layout_.buckets().size(); ++b) {
    Stay forward{b, end, 0}, backward{b, end, 0};
    for (const ShardLayout::Member& member : layout_.buckets()[b].members) {
      const ParameterInfo& parameter = parameters_[member.parameter];
      const Value leaf = tape.leaf(parameter.name, {layout_.buckets()[b].dtype, parameter.shape}, Role::parameter);
      for (std::size_t i = 0; i < end; ++i) {
        const std::vector<Value>& inputs = tape.nodes()[i].inputs;
        if (std::find(inputs.begin(), inputs.end(), leaf) != inputs.end()) {
          Stay& stay = i <= middle || layout_.buckets()[b].spread ? forward : backward;
          stay.first = std::min(stay.first, i);
          stay.last = std::max(stay.last, i);
        }
      }
    }
    for (const Stay& stay : {forward, backward}) {
      if (stay.first < end) {
        stays.push_back(stay);
      }
    }
  }
  std::stable_sort(stays.begin(), stays.end(), [](const Stay& a, const Stay& b) { return a.first < b.first; });
  merge_neighbours(stays);

  std::vector<std::size_t> places;
  const auto place = [&](std::size_t at) { places.resize(tape.nodes().size() - end, at); };
  std::vector<std::shared_ptr<ops::PendingCollective>> pending(stays.size());
  std::vector<Value> wholes(stays.size());
  const auto start = [&](std::size_t s, std::size_t at) {
    const Bucket& bucket = layout_.buckets()[stays[s].bucket];
    wholes[s] =
        tape.temporary(concat(weights(stays[s].bucket), ".gathered.", s), whole_type(bucket, bucket.dtype), Role::parameter);
    pending[s] = ops::start_all_gather(tape, communicator_, wholes[s], weights_part(tape, stays[s].bucket));
    place(at);
  };
  if (!stays.empty()) {
    start(0, 0);
  }
  for (std::size_t s = 0; s < stays.size(); ++s) {
    ops::wait_all_gather(tape, pending[s], wholes[s]);
    place(stays[s].first);
    if (s + 1 < stays.size()) {
      start(s + 1, stays[s].first);  // while this block is computed
    }
    const Bucket& bucket = layout_.buckets()[stays[s].bucket];
    for (const ShardLayout::Member& member : bucket.members) {
      const ParameterInfo& parameter = parameters_[member.parameter];
      const TensorType type{bucket.dtype, parameter.shape};
      tape.replace_inputs(stays[s].first, stays[s].last + 1, tape.leaf(parameter.name, type, Role::parameter),
                          tape.view(wholes[s], concat(parameter.name, ".gathered.", s), type, member.first));
    }
  }
  tape.weave(end, places);
}

std::vector<Value> Sharding::own_gradients(Tape& tape, const std::function<void(Value, Value)>& to_float) const {
  std::vector<Value> parts;
  for (std::size_t b = 0; b < layout_.buckets().size(); ++b) {
    parts.push_back(gradients_part(tape, b));
    if (options_.deterministic) {
      to_float(parts.back(), sums_part(tape, b));
    }
  }
  return parts;
}

std::vector<OptimizedParameter> Sharding::own_parameters(Tape& tape) const {
  std::vector<OptimizedParameter> optimized;
  for (const ShardLayout::Slice& slice : layout_.slices(communicator_.rank())) {
    const std::string& name = parameters_[slice.parameter].name;
    const Value weight = slice_of(tape, weights_part(tape, slice.bucket), own(name), slice);
    const bool copy = has_master_copy(layout_.buckets()[slice.bucket]);
    optimized.push_back(
        {.name = name,
         .compute = copy ? weight : Value{},
         .master = copy ? tape.leaf("master/" + name, {options_.accumulator, {slice.elements()}}, Role::state) : weight,
         .gradient = slice_of(tape, gradients_part(tape, slice.bucket), own("gradient/" + name), slice)});
  }
  return optimized;
}

void Sharding::spread_weights(Tape& tape) const {
  const std::size_t buckets = layout_.buckets().size();
  std::vector<std::shared_ptr<ops::PendingCollective>> pending;
  for (std::size_t b = 0; b < buckets && options_.stage < 3; ++b) {
    pending.push_back(ops::start_all_gather(tape, communicator_, weights_whole(tape, b), weights_part(tape, b)));
  }
  for (std::size_t b = 0; b < buckets && options_.stage == 1; ++b) {
    ops::clear_other_parts(tape, sums_whole(tape, b), communicator_.rank(), communicator_.size());
  }
  for (std::size_t b = 0; b < pending.size(); ++b) {
    ops::wait_all_gather(tape, pending[b], weights_whole(tape, b));
  }
}

}  // namespace attamba
