#include "src/graph/program.h"

#include <cmath>

#include "src/core/error.h"

namespace attamba {

namespace {

/// Index of the first element that is not finite, or -1.
std::int64_t first_not_finite(const Tensor& on_device) {
  if (on_device.dtype() == DType::int32 || on_device.dtype() == DType::int64) {
    return -1;
  }
  const HostCopy copy(on_device);
  const Tensor& tensor = copy.tensor();
  return dispatch_floating(tensor.dtype(), "finite check", [&]<class T>() -> std::int64_t {
    const T* data = tensor.as<T>();
    for (std::int64_t i = 0; i < tensor.elements(); ++i) {
      if (!std::isfinite(static_cast<Accumulator<T>>(data[i]))) {
        return i;
      }
    }
    return -1;
  });
}

void require_finite(const Program::Step& step, const Tensor& tensor, std::string_view what, std::size_t index) {
  if (const std::int64_t i = first_not_finite(tensor); i >= 0) {
    throw NotFinite(concat("not a finite number: ", step.op->name(), " in ", step.scope.empty() ? "the program" : step.scope,
                           ", ", what, ' ', index, " of type ", tensor.type, ", row ", i / tensor.shape().columns(),
                           ", column ", i % tensor.shape().columns()),
                    i / tensor.shape().columns(), tensor.shape().rows());
  }
}

}  // namespace

std::byte* Arena::data() {
  if (memory_.size() < wanted_) {
    require(memory_.size() == 0, "arena: reserved more after a program was built");
    memory_ = Memory(device_, wanted_, "activations");
  }
  return memory_.data();
}

Program::Program(const Tape& tape, const Plan& plan, Storage& storage, Arena& arena) {
  tensors_.resize(tape.values().size());
  const auto bind_memory = [&](Value value) {
    Tensor& tensor = tensors_[static_cast<std::size_t>(value.id)];
    const int buffer = plan.buffer_of_value[static_cast<std::size_t>(value.id)];
    if (!tensor) {
      tensor = buffer < 0 ? storage.get(tape.info(value).name, tape.type(value))
                          : Tensor{arena.data() + plan.buffers[static_cast<std::size_t>(buffer)].offset, tape.type(value),
                                   arena.device()};
    }
    return tensor;
  };
  const auto bind = [&](Value value) {
    const Tape::ValueInfo& info = tape.info(value);
    if (info.base < 0) {
      return bind_memory(value);
    }
    Tensor& tensor = tensors_[static_cast<std::size_t>(value.id)];
    if (!tensor) {
      tensor = part_of(bind_memory(Value{info.base}), info.type, info.first);
    }
    return tensor;
  };
  for (std::size_t s = 0; s < plan.steps.size(); ++s) {
    const Tape::Node& node = tape.nodes()[static_cast<std::size_t>(plan.steps[s])];
    Step step{.op = node.op,
              .inputs = {},
              .outputs = {},
              .input_names = {},
              .output_names = {},
              .scratch = {},
              .scope = node.scope,
              .label = concat(node.scope, node.scope.empty() ? "" : "/", node.op->name())};
    std::vector<TensorType> input_types, output_types;
    for (const Value value : node.inputs) {
      step.inputs.push_back(bind(value));
      step.input_names.push_back(tape.info(value).name);
      input_types.push_back(tape.type(value));
    }
    for (const Value value : node.outputs) {
      step.outputs.push_back(bind(value));
      step.output_names.push_back(tape.info(value).name);
      output_types.push_back(tape.type(value));
    }
    if (const int scratch = plan.scratch_of_step[s]; scratch >= 0) {
      const Plan::Buffer& buffer = plan.buffers[static_cast<std::size_t>(scratch)];
      step.scratch = {arena.data() + buffer.offset, buffer.bytes};
    }
    step.flops = node.op->flops(input_types, output_types);
    step.bytes = node.op->traffic(input_types, output_types);
    steps_.push_back(std::move(step));
  }
}

void Program::run(const Launch& launch) const {
  Launch with_scratch = launch;
  DeviceRuntime& device = runtime(launch.device);
  for (const Step& step : steps_) {
    const NamedRange range(device, step.label.c_str());
    with_scratch.scratch = step.scratch;
    step.op->run(with_scratch, step.inputs, step.outputs);
  }
}

void Program::run_observed(const Launch& launch, const Observer& observer, bool check_finite) const {
  Launch with_scratch = launch;
  DeviceRuntime& device = runtime(launch.device);
  for (const Step& step : steps_) {
    const NamedRange range(device, step.label.c_str());
    with_scratch.scratch = step.scratch;
    const double seconds = device.seconds_of([&] { step.op->run(with_scratch, step.inputs, step.outputs); });
    if (observer) {
      observer(step, seconds);
    }
    if (check_finite) {
      for (std::size_t o = 0; o < step.outputs.size(); ++o) {
        require_finite(step, step.outputs[o], "output", o);
      }
      for (const int i : step.op->mutated()) {
        require_finite(step, step.inputs[static_cast<std::size_t>(i)], "gradient or state, input", static_cast<std::size_t>(i));
      }
    }
  }
}

Tensor Program::tensor(Value value) const {
  const Tensor& tensor = tensors_[static_cast<std::size_t>(value.id)];
  require(static_cast<bool>(tensor), "program: value ", value.id, " is not computed");
  return tensor;
}

double Program::flops() const {
  double sum = 0;
  for (const Step& step : steps_) {
    sum += step.flops;
  }
  return sum;
}

}  // namespace attamba
