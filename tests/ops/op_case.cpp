#include "tests/ops/op_case.h"

#include <cmath>

#include "src/core/error.h"

namespace attamba::testing_support {

namespace {

std::uint64_t hash(const std::string& name) {
  std::uint64_t h = 0xcbf29ce484222325;
  for (const char c : name) {
    h = (h ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  }
  return h;
}

std::vector<double> random_values(const std::string& name, std::int64_t count, double offset, double scale) {
  RandomStream random(hash(name));
  std::vector<double> values(static_cast<std::size_t>(count));
  for (double& x : values) {
    x = static_cast<double>(static_cast<float>(bfloat16(static_cast<float>(offset + scale * random.normal()))));
  }
  return values;
}

/// sum over all outputs of seed * output, as a float64 [1]. Inputs: outputs, then as many seeds, whose gradients do not matter.
class SeededSum final : public Op {
 public:
  explicit SeededSum(std::size_t outputs) : outputs_(outputs) {}
  std::string_view name() const override { return "seeded_sum"; }
  std::vector<TensorType> infer(std::span<const TensorType> in) const override {
    for (std::size_t o = 0; o < outputs_; ++o) {
      require(in[o] == in[outputs_ + o], "seeded_sum: ", in[o], " and ", in[outputs_ + o], " differ");
    }
    return {{DType::float64, {1}}};
  }
  void run(const Launch&, std::span<const Tensor> in, std::span<const Tensor> out) const override {
    double sum = 0;
    for (std::size_t o = 0; o < outputs_; ++o) {
      const std::vector<double> values = values_of(in[o]), seeds = values_of(in[outputs_ + o]);
      for (std::size_t i = 0; i < values.size(); ++i) {
        sum += values[i] * seeds[i];
      }
    }
    out[0].as<double>()[0] = sum;
  }
  void vjp(VjpContext& context) const override {
    for (std::size_t o = 0; o < outputs_; ++o) {
      ops::contribute(context, static_cast<int>(o), context.input(static_cast<int>(outputs_ + o)));
    }
  }

 private:
  std::size_t outputs_;
};

/// Appends the objective of a row to the outputs.
Value declare_objective(OpCase& c, const std::vector<Value>& outputs, std::map<std::string, std::vector<double>>& initial) {
  std::vector<Value> inputs = outputs;
  for (std::size_t o = 0; o < outputs.size(); ++o) {
    const std::string name = concat("seed ", o);
    const TensorType type = c.tape.type(outputs[o]);
    inputs.push_back(c.tape.input(name, type));
    initial[name] = random_values(name, type.shape.elements(), 0, 1);
  }
  return c.tape.emit_one(std::make_shared<SeededSum>(outputs.size()), inputs);
}

}  // namespace

std::vector<double> values_of(const Tensor& tensor) {
  return dispatch_floating(tensor.dtype(), "test", [&]<class T>() {
    std::vector<double> values;
    for (const T x : tensor.span<T>()) {
      values.push_back(static_cast<double>(static_cast<Accumulator<T>>(x)));
    }
    return values;
  });
}

void assign(const Tensor& tensor, const std::vector<double>& values) {
  dispatch_floating(tensor.dtype(), "test", [&]<class T>() {
    for (std::size_t i = 0; i < values.size(); ++i) {
      tensor.span<T>()[i] = static_cast<T>(static_cast<Accumulator<T>>(values[i]));
    }
  });
}

double relative_error(const std::vector<double>& a, const std::vector<double>& b) {
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < b.size(); ++i) {
    difference += (a[i] - b[i]) * (a[i] - b[i]);
    norm += b[i] * b[i];
  }
  return std::sqrt(difference / std::max(norm, 1e-60));
}

Value OpCase::floating(const std::string& name, const TensorType& type, Role role, double offset, double scale) {
  const Value value = role == Role::parameter ? tape.parameter(name, type) : tape.input(name, type);
  initial_[name] = random_values(name, type.shape.elements(), offset, scale);
  return value;
}

Value OpCase::input(const std::string& name, const Shape& shape, double scale) {
  const Value value = floating(name, {dtype, shape}, Role::input, 0, scale);
  tape.want_gradient(value);
  differentiated_.push_back(value);
  return value;
}

Value OpCase::matrix(const std::string& name, const Shape& shape, double scale) {
  differentiated_.push_back(floating(name, {dtype, shape}, Role::parameter, 0, scale));
  return differentiated_.back();
}

Value OpCase::vector(const std::string& name, const Shape& shape, double offset, double scale) {
  differentiated_.push_back(floating(name, {accumulator_of(dtype), shape}, Role::parameter, offset, scale));
  return differentiated_.back();
}

Value OpCase::constants(const std::string& name, const Shape& shape, std::vector<double> values) {
  initial_[name] = std::move(values);
  return tape.input(name, {accumulator_of(dtype), shape});
}

Value OpCase::integers(const std::string& name, const std::vector<std::int32_t>& values) {
  initial_[name].assign(values.begin(), values.end());
  return tape.input(name, {DType::int32, {static_cast<std::int64_t>(values.size())}});
}

RunnableRow::RunnableRow(const OpRow& row, DType dtype) : root_scale_(row.root_scale) {
  Tape forward, backward;
  OpCase declared(forward, dtype, Purpose::forward);
  std::map<std::string, std::vector<double>> seeds;
  outputs_ = row.declare(declared);
  if (root_scale_ == 0) {
    outputs_.push_back(declare_objective(declared, outputs_, seeds));
  }
  for (const Value output : outputs_) {
    forward.mark_output(output);
  }

  OpCase differentiated(backward, dtype, Purpose::gradient);
  backward_outputs_ = row.declare(differentiated);
  backward.backward(root_scale_ == 0 ? declare_objective(differentiated, backward_outputs_, seeds) : backward_outputs_[0]);
  for (const Value value : differentiated.differentiated()) {
    const std::string& name = backward.info(value).name;
    names_.push_back(name);
    if (backward.info(value).role == Role::input) {
      gradients_[name] = backward.gradient(value);
      require(static_cast<bool>(gradients_[name]), row.name, ": no gradient reaches ", name);
      backward.mark_output(gradients_[name]);
      if (const Tape::ValueInfo& info = backward.info(gradients_[name]); info.role != Role::activation) {
        leaf_gradients_[name] = info.name;  // a seed that passed through
      }
    }
  }

  const Plan forward_plan = make_plan(forward), backward_plan = make_plan(backward);
  arena_.reserve(forward_plan.arena_bytes);
  arena_.reserve(backward_plan.arena_bytes);
  forward_ = Program(forward, forward_plan, storage_, arena_);
  backward_ = Program(backward, backward_plan, storage_, arena_);
  for (const auto* initial : {&declared.initial(), static_cast<const std::map<std::string, std::vector<double>>*>(&seeds)}) {
    for (const auto& [name, values] : *initial) {
      if (!storage_.contains(name)) {
        continue;  // an input of the backward pass alone
      }
      const Tensor tensor = storage_.find(name);
      if (tensor.dtype() == DType::int32) {
        std::copy(values.begin(), values.end(), tensor.as<std::int32_t>());
      } else {
        assign(tensor, values);
      }
    }
  }
}

double RunnableRow::objective() {
  forward_.run({});
  const std::vector<double> values = values_of(forward_.tensor(outputs_.back()));
  if (root_scale_ == 0) {
    return values[0];
  }
  double sum = 0;
  for (const double x : values) {
    sum += x;
  }
  return root_scale_ * sum;
}

void RunnableRow::run_gradients() {
  for (const std::string& name : names_) {
    if (gradients_.count(name) == 0) {
      const Tensor gradient = storage_.find("gradient/" + name);
      assign(gradient, std::vector<double>(static_cast<std::size_t>(gradient.elements())));
    }
  }
  backward_.run({});
}

std::vector<double> RunnableRow::output(std::size_t o) const {
  return values_of(forward_.tensor(outputs_[o]));
}

std::vector<double> RunnableRow::gradient(const std::string& leaf) const {
  if (const auto found = leaf_gradients_.find(leaf); found != leaf_gradients_.end()) {
    return values_of(storage_.find(found->second));
  }
  const auto found = gradients_.find(leaf);
  return values_of(found == gradients_.end() ? storage_.find("gradient/" + leaf) : backward_.tensor(found->second));
}

}  // namespace attamba::testing_support
