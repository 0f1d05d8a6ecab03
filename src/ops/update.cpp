#include "src/ops/ops.h"

namespace attamba::ops {

namespace {

/// An op that writes leaves in place and has no outputs.
class InPlaceOp : public Op {
 public:
  std::vector<TensorType> infer(std::span<const TensorType>) const override { return {}; }
};

/// Inputs: totals, losses.
class AccumulateLoss final : public InPlaceOp {
 public:
  std::string_view name() const override { return "accumulate_loss"; }
  void run(const Launch& launch, std::span<const Tensor> in, std::span<const Tensor>) const override {
    kernels::on(launch).accumulate_loss(launch, in[0], in[1]);
  }
  std::vector<int> mutated() const override { return {0}; }
};

/// Inputs: accumulator, poisoned, gradient.
class AddToFixedPoint final : public InPlaceOp {
 public:
  explicit AddToFixedPoint(double limit) : limit_(limit) {}
  std::string_view name() const override { return "add_to_fixed_point"; }
  void run(const Launch& launch, std::span<const Tensor> in, std::span<const Tensor>) const override {
    kernels::on(launch).add_to_fixed_point(launch, in[0], in[1], in[2], limit_);
  }
  std::vector<int> mutated() const override { return {0, 1, 2}; }

 private:
  double limit_;
};

/// Inputs: gradient, accumulator, poisoned.
class FixedPointToFloat final : public InPlaceOp {
 public:
  std::string_view name() const override { return "fixed_point_to_float"; }
  void run(const Launch& launch, std::span<const Tensor> in, std::span<const Tensor>) const override {
    kernels::on(launch).fixed_point_to_float(launch, in[0], in[1], in[2]);
  }
  std::vector<int> mutated() const override { return {0, 1}; }
};

class SquareSum final : public Op {
 public:
  std::string_view name() const override { return "square_sum"; }
  std::vector<TensorType> infer(std::span<const TensorType>) const override { return {{DType::float64, {1}}}; }
  std::size_t workspace(Device device, std::span<const TensorType> in, std::span<const TensorType>) const override {
    return kernels::on(device).square_sum_workspace(in);
  }
  void run(const Launch& launch, std::span<const Tensor> in, std::span<const Tensor> out) const override {
    kernels::on(launch).square_sum(launch, out[0], in);
  }
};

class SquareDigits final : public Op {
 public:
  std::string_view name() const override { return "square_digits"; }
  std::vector<TensorType> infer(std::span<const TensorType>) const override {
    return {{DType::int64, {kernels::kSquareDigits}}};
  }
  std::size_t workspace(Device device, std::span<const TensorType> in, std::span<const TensorType>) const override {
    return kernels::on(device).square_digits_workspace(in);
  }
  void run(const Launch& launch, std::span<const Tensor> in, std::span<const Tensor> out) const override {
    kernels::on(launch).square_digits(launch, out[0], in);
  }
};

class SquareDigitsToFloat final : public Op {
 public:
  std::string_view name() const override { return "square_digits_to_float"; }
  std::vector<TensorType> infer(std::span<const TensorType>) const override { return {{DType::float64, {1}}}; }
  void run(const Launch& launch, std::span<const Tensor> in, std::span<const Tensor> out) const override {
    kernels::on(launch).square_digits_to_float(launch, out[0], in[0]);
  }
};

/// Inputs: step, norm_squared, then per parameter compute?, master, moment1, moment2, gradient.
class AdamW final : public InPlaceOp {
 public:
  AdamW(std::vector<bool> has_compute, const kernels::AdamWSettings& settings)
      : has_compute_(std::move(has_compute)), settings_(settings), parameters_(has_compute_.size()) {}
  std::string_view name() const override { return "adamw"; }
  void run(const Launch& launch, std::span<const Tensor> in, std::span<const Tensor>) const override {
    std::size_t next = 2;
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
      kernels::AdamWParameter& p = parameters_[i];
      p.compute = has_compute_[i] ? in[next++] : Tensor{};
      p.master = in[next++];
      p.moment1 = in[next++];
      p.moment2 = in[next++];
      p.gradient = in[next++];
    }
    kernels::on(launch).adamw(launch, in[0], parameters_, in[1], settings_);
  }
  std::vector<int> mutated() const override {
    std::vector<int> indices{0};
    int next = 2;
    for (const bool has_compute : has_compute_) {
      for (int i = 0; i < (has_compute ? 5 : 4); ++i) {
        indices.push_back(next++);
      }
    }
    return indices;
  }
  /// Copies of compute type are written only.
  std::size_t traffic(std::span<const TensorType> in, std::span<const TensorType> out) const override {
    std::size_t bytes = Op::traffic(in, out), next = 2;
    for (const bool has_compute : has_compute_) {
      bytes -= has_compute ? in[next].bytes() : 0;
      next += has_compute ? 5 : 4;
    }
    return bytes;
  }

 private:
  std::vector<bool> has_compute_;
  kernels::AdamWSettings settings_;
  mutable std::vector<kernels::AdamWParameter> parameters_;  ///< of the last run; kept so that a step allocates nothing
};

}  // namespace

void accumulate_loss(Tape& tape, Value totals, Value losses) {
  tape.emit(std::make_shared<AccumulateLoss>(), {{totals, losses}});
}

void add_to_fixed_point(Tape& tape, Value accumulator, Value poisoned, Value gradient, double limit) {
  tape.emit(std::make_shared<AddToFixedPoint>(limit), {{accumulator, poisoned, gradient}});
}

void fixed_point_to_float(Tape& tape, Value gradient, Value accumulator, Value poisoned) {
  tape.emit(std::make_shared<FixedPointToFloat>(), {{gradient, accumulator, poisoned}});
}

Value square_sum(Tape& tape, std::span<const Value> leaves) {
  return tape.emit_one(std::make_shared<SquareSum>(), leaves);
}

Value square_digits(Tape& tape, std::span<const Value> leaves) {
  return tape.emit_one(std::make_shared<SquareDigits>(), leaves);
}

Value square_digits_to_float(Tape& tape, Value digits) {
  return tape.emit_one(std::make_shared<SquareDigitsToFloat>(), {{digits}});
}

void adamw(Tape& tape, Value step, Value norm_squared, std::span<const AdamWLeaves> parameters,
           const kernels::AdamWSettings& settings) {
  std::vector<Value> inputs{step, norm_squared};
  std::vector<bool> has_compute;
  for (const AdamWLeaves& p : parameters) {
    has_compute.push_back(static_cast<bool>(p.compute));
    for (const Value leaf : {p.compute, p.master, p.moment1, p.moment2, p.gradient}) {
      if (leaf) {
        inputs.push_back(leaf);
      }
    }
  }
  tape.emit(std::make_shared<AdamW>(std::move(has_compute), settings), inputs);
}

}  // namespace attamba::ops
