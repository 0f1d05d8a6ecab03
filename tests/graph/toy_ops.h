// Ops on float64 vectors for tests of the tape, the plan and programs: simple arithmetic, every property of the op contract.
#pragma once

#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "src/graph/program.h"

namespace attamba::toys {

inline TensorType vector_type(std::int64_t n) {
  return {DType::float64, {n}};
}

/// outputs[o][i] = bias + sum over inputs of (1 + o + 2 * position) * input[i mod its size], of any sizes.
/// Scratch, when asked for, is filled and read back; an op that may overwrite input 0 computes element by element.
class Mix final : public Op {
 public:
  struct Options {
    std::vector<std::int64_t> sizes{4};  ///< of the outputs
    double bias = 0;
    std::size_t scratch = 0;
    int reusable = -1;  ///< for output 0
    std::string name = "mix";
  };
  explicit Mix(Options options) : options_(std::move(options)) {}
  std::string_view name() const override { return options_.name; }
  std::vector<TensorType> infer(std::span<const TensorType>) const override {
    std::vector<TensorType> types;
    for (const std::int64_t size : options_.sizes) {
      types.push_back(vector_type(size));
    }
    return types;
  }
  std::size_t workspace(Device, std::span<const TensorType>, std::span<const TensorType>) const override {
    return options_.scratch;
  }
  int reusable_input(int output) const override { return output == 0 ? options_.reusable : -1; }
  void run(const Launch& launch, std::span<const Tensor> in, std::span<const Tensor> out) const override {
    // Everything else first, so that the output that may overwrite its input comes last.
    for (std::size_t o = out.size(); o-- > 0;) {
      for (std::int64_t i = 0; i < out[o].elements(); ++i) {
        double sum = options_.bias;
        for (std::size_t k = 0; k < in.size(); ++k) {
          sum += static_cast<double>(1 + o + 2 * k) * in[k].as<double>()[i % in[k].elements()];
        }
        out[o].as<double>()[i] = std::fmod(sum, 1000.0);
      }
    }
    for (std::byte& byte : launch.scratch) {
      byte = std::byte{0xff};  // all scratch is ours, and no promise about its contents
    }
  }

 private:
  Options options_;
};

/// Sum of squares of one vector: float64 [1]. Its gradient is 2 x times the incoming one, which may be missing (1 then).
class SquareSum final : public Op {
 public:
  std::string_view name() const override { return "toy_square_sum"; }
  std::vector<TensorType> infer(std::span<const TensorType>) const override { return {vector_type(1)}; }
  void run(const Launch&, std::span<const Tensor> in, std::span<const Tensor> out) const override {
    double sum = 0;
    for (const double x : in[0].span<double>()) {
      sum += x * x;
    }
    out[0].as<double>()[0] = sum;
  }
  void vjp(VjpContext& context) const override;
};

/// a b elementwise.
class Multiply final : public Op {
 public:
  std::string_view name() const override { return "toy_multiply"; }
  std::vector<TensorType> infer(std::span<const TensorType> in) const override {
    require<UsageError>(in[0] == in[1], "toy_multiply: ", in[0], " and ", in[1], " differ");
    return {in[0]};
  }
  void run(const Launch&, std::span<const Tensor> in, std::span<const Tensor> out) const override {
    for (std::int64_t i = 0; i < out[0].elements(); ++i) {
      out[0].as<double>()[i] = in[0].as<double>()[i] * in[1].as<double>()[i];
    }
  }
  void vjp(VjpContext& context) const override;
};

/// a + b elementwise; may overwrite a.
class Add final : public Op {
 public:
  std::string_view name() const override { return "toy_add"; }
  std::vector<TensorType> infer(std::span<const TensorType> in) const override { return {in[0]}; }
  void run(const Launch&, std::span<const Tensor> in, std::span<const Tensor> out) const override {
    for (std::int64_t i = 0; i < out[0].elements(); ++i) {
      out[0].as<double>()[i] = in[0].as<double>()[i] + in[1].as<double>()[i];
    }
  }
  int reusable_input(int) const override { return 0; }
  void vjp(VjpContext& context) const override;
};

/// leaf += x, in place. Inputs: leaf, x.
class AddToLeaf final : public Op {
 public:
  explicit AddToLeaf(std::string name = "toy_add_to_leaf") : name_(std::move(name)) {}
  std::string_view name() const override { return name_; }
  std::vector<TensorType> infer(std::span<const TensorType>) const override { return {}; }
  void run(const Launch&, std::span<const Tensor> in, std::span<const Tensor>) const override {
    for (std::int64_t i = 0; i < in[0].elements(); ++i) {
      in[0].as<double>()[i] += in[1].as<double>()[i];
    }
  }
  std::vector<int> mutated() const override { return {0}; }

 private:
  std::string name_;
};

/// Adds `gradient` to what input i has received: into the leaf of a parameter, by a further op otherwise.
inline void give(VjpContext& context, int i, Value gradient) {
  if (!context.wants(i)) {
    return;
  }
  if (context.is_parameter(i)) {
    context.tape().emit(std::make_shared<AddToLeaf>(), {{context.parameter_gradient(i), gradient}});
  } else if (const Value partial = context.partial(i)) {
    context.set(i, context.tape().emit_one(std::make_shared<Add>(), {{partial, gradient}}));
  } else {
    context.set(i, gradient);
  }
}

inline void SquareSum::vjp(VjpContext& context) const {
  give(context, 0, context.tape().emit_one(std::make_shared<Add>(), {{context.input(0), context.input(0)}}));
}

inline void Multiply::vjp(VjpContext& context) const {
  const Value dy = context.gradient(0);
  give(context, 0, context.tape().emit_one(std::make_shared<Multiply>(), {{dy, context.input(1)}}));
  give(context, 1, context.tape().emit_one(std::make_shared<Multiply>(), {{dy, context.input(0)}}));
}

inline void Add::vjp(VjpContext& context) const {
  give(context, 0, context.gradient(0));
  give(context, 1, context.gradient(0));
}

inline Value multiply(Tape& tape, Value a, Value b) {
  return tape.emit_one(std::make_shared<Multiply>(), {{a, b}});
}
inline Value add(Tape& tape, Value a, Value b) {
  return tape.emit_one(std::make_shared<Add>(), {{a, b}});
}
inline Value square_sum(Tape& tape, Value x) {
  return tape.emit_one(std::make_shared<SquareSum>(), {{x}});
}

/// A program with memory of its own.
struct Runnable {
  explicit Runnable(const Tape& tape) : Runnable(tape, make_plan(tape)) {}
  Runnable(const Tape& tape, Plan with) : plan(std::move(with)) {
    arena.reserve(plan.arena_bytes);
    program = Program(tape, plan, storage, arena);
  }
  void set(const std::string& leaf, const std::vector<double>& values) {
    std::copy(values.begin(), values.end(), storage.find(leaf).as<double>());
  }
  std::vector<double> get(const std::string& leaf) const { return values(storage.find(leaf)); }
  std::vector<double> get(Value value) const { return values(program.tensor(value)); }
  static std::vector<double> values(const Tensor& tensor) {
    const auto span = tensor.span<double>();
    return {span.begin(), span.end()};
  }

  Plan plan;
  Storage storage;
  Arena arena;
  Program program;
};

}  // namespace attamba::toys
