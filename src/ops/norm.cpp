#include "src/ops/ops.h"

namespace attamba::ops {

namespace {

void check_norm(std::string_view name, const TensorType& x, const TensorType& weight) {
  require<UsageError>(weight.shape == Shape{x.shape.columns()} && weight.dtype == accumulator_of(x.dtype), name, ": weight ",
                      weight, " does not fit ", x);
}

/// dx = gradient of rms_norm (+ addend); dweight += ...  Inputs: dout, x, weight, dweight[, addend].
class RmsNormBackward final : public Op {
 public:
  RmsNormBackward(double eps, bool has_addend) : eps_(eps), has_addend_(has_addend) {}
  std::string_view name() const override { return "rms_norm_backward"; }
  std::vector<TensorType> infer(std::span<const TensorType> in) const override { return {in[1]}; }
  std::size_t workspace(Device device, std::span<const TensorType> in, std::span<const TensorType>) const override {
    return kernels::on(device).rms_norm_backward_workspace(in[1]);
  }
  void run(const Launch& launch, std::span<const Tensor> in, std::span<const Tensor> out) const override {
    kernels::on(launch).rms_norm_backward(launch, out[0], in[3], in[0], in[1], in[2], has_addend_ ? in[4] : Tensor{}, eps_);
  }
  std::vector<int> mutated() const override { return {3}; }
  int reusable_input(int) const override { return 0; }

 private:
  double eps_;
  bool has_addend_;
};

Value emit_backward(VjpContext& context, Value dout, Value x, int weight, Value addend, double eps) {
  std::vector<Value> inputs{dout, x, context.input(weight), context.parameter_gradient(weight)};
  if (addend) {
    inputs.push_back(addend);
  }
  return context.tape().emit_one(std::make_shared<RmsNormBackward>(eps, static_cast<bool>(addend)), inputs);
}

/// Inputs: x, weight.
class RmsNorm final : public Op {
 public:
  explicit RmsNorm(double eps) : eps_(eps) {}
  std::string_view name() const override { return "rms_norm"; }
  std::vector<TensorType> infer(std::span<const TensorType> in) const override {
    check_norm(name(), in[0], in[1]);
    return {in[0]};
  }
  void run(const Launch& launch, std::span<const Tensor> in, std::span<const Tensor> out) const override {
    kernels::on(launch).rms_norm(launch, out[0], in[0], in[1], eps_);
  }
  void vjp(VjpContext& context) const override {
    context.set(0, emit_backward(context, context.gradient(0), context.input(0), 1, context.partial(0), eps_));
  }

 private:
  double eps_;
};

/// sum = a + b, norm = rms_norm(sum). Inputs: a, b, weight; outputs: sum, norm.
class AddRmsNorm final : public Op {
 public:
  explicit AddRmsNorm(double eps) : eps_(eps) {}
  std::string_view name() const override { return "add_rms_norm"; }
  std::vector<TensorType> infer(std::span<const TensorType> in) const override {
    require<UsageError>(in[0] == in[1], "add_rms_norm: cannot add ", in[1], " to ", in[0]);
    check_norm(name(), in[0], in[2]);
    return {in[0], in[0]};
  }
  void run(const Launch& launch, std::span<const Tensor> in, std::span<const Tensor> out) const override {
    kernels::on(launch).add_rms_norm(launch, out[0], out[1], in[0], in[1], in[2], eps_);
  }
  /// Both summands receive the same gradient: that of the sum.
  void vjp(VjpContext& context) const override {
    Value total = context.gradient(0);
    if (const Value dnorm = context.gradient(1)) {
      total = emit_backward(context, dnorm, context.output(0), 2, total, eps_);
    }
    contribute(context, 0, total);
    contribute(context, 1, total);
  }

 private:
  double eps_;
};

}  // namespace

Value rms_norm(Tape& tape, Value x, Value weight, double eps) {
  return tape.emit_one(std::make_shared<RmsNorm>(eps), {{x, weight}});
}

Normed add_rms_norm(Tape& tape, Value a, Value b, Value weight, double eps) {
  const std::vector<Value> out = tape.emit(std::make_shared<AddRmsNorm>(eps), {{a, b, weight}});
  return {out[0], out[1]};
}

}  // namespace attamba::ops
