#include "src/ops/ops.h"

namespace attamba::ops {

namespace {

/// Inputs: dout, x, weight, starts, dweight; output: dx.
class CausalConvSiluBackward final : public Op {
 public:
  std::string_view name() const override { return "causal_conv_silu_backward"; }
  std::vector<TensorType> infer(std::span<const TensorType> in) const override { return {in[1]}; }
  std::size_t workspace(Device device, std::span<const TensorType> in, std::span<const TensorType>) const override {
    return kernels::on(device).causal_conv_silu_backward_workspace(in[1], in[2]);
  }
  void run(const Launch& launch, std::span<const Tensor> in, std::span<const Tensor> out) const override {
    kernels::on(launch).causal_conv_silu_backward(launch, out[0], in[4], in[0], in[1], in[2], in[3]);
  }
  std::vector<int> mutated() const override { return {4}; }
  double flops(std::span<const TensorType> in, std::span<const TensorType>) const override {
    return 6.0 * static_cast<double>(in[1].shape.elements() * in[2].shape.columns());
  }
};

/// Inputs: x, weight, starts.
class CausalConvSilu final : public Op {
 public:
  std::string_view name() const override { return "causal_conv_silu"; }
  std::vector<TensorType> infer(std::span<const TensorType> in) const override {
    require<UsageError>(in[0].shape.rank() == 2 && in[1].dtype == accumulator_of(in[0].dtype) && in[1].shape.rank() == 2 &&
                            in[1].shape[0] == in[0].shape[1],
                        "causal_conv_silu: weight ", in[1], " does not fit x ", in[0]);
    const TensorType starts{DType::int32, {in[0].shape.rows()}};
    require<UsageError>(in[2] == starts, "causal_conv_silu: chunk starts are ", in[2], ", expected ", starts, " for ", in[0]);
    return {in[0]};
  }
  void run(const Launch& launch, std::span<const Tensor> in, std::span<const Tensor> out) const override {
    kernels::on(launch).causal_conv_silu(launch, out[0], in[0], in[1], in[2]);
  }
  void vjp(VjpContext& context) const override {
    contribute(context, 0,
               context.tape().emit_one(std::make_shared<CausalConvSiluBackward>(),
                                       {{context.gradient(0), context.input(0), context.input(1), context.input(2),
                                         context.parameter_gradient(1)}}));
  }
  double flops(std::span<const TensorType> in, std::span<const TensorType>) const override {
    return 2.0 * static_cast<double>(in[0].shape.elements() * in[1].shape.columns());
  }
};

using kernels::RecurrenceForm;

struct RecurrenceAttributes {
  RecurrenceForm form;
  std::int64_t sequence_length;

  bool has_rate() const { return form == RecurrenceForm::rg_lru; }
  /// Inputs of the gates: a, b, and u and the rate where there are any.
  std::size_t count() const { return has_rate() ? 4 : 2; }
  kernels::RecurrenceInputs unpack(std::span<const Tensor> in) const {
    return {.a = in[0], .b = in[1], .u = has_rate() ? in[2] : Tensor{}, .rate = has_rate() ? in[3] : Tensor{}};
  }
  /// The gates' arithmetic counts about 16, the recurrence 2.
  double flops(const TensorType& h) const {
    return (form == RecurrenceForm::plain ? 2.0 : 18.0) * static_cast<double>(h.shape.elements());
  }
};

/// Inputs: dh, h, starts, a, b[, u, rate, drate]; outputs: da, db[, du].
class LinearRecurrenceBackward final : public Op {
 public:
  explicit LinearRecurrenceBackward(const RecurrenceAttributes& attributes) : a_(attributes) {}
  std::string_view name() const override { return "linear_recurrence_backward"; }
  std::vector<TensorType> infer(std::span<const TensorType> in) const override {
    return std::vector<TensorType>(a_.has_rate() ? 3 : 2, in[1]);
  }
  std::size_t workspace(Device device, std::span<const TensorType> in, std::span<const TensorType>) const override {
    return kernels::on(device).linear_recurrence_backward_workspace(in[1], a_.form, a_.sequence_length);
  }
  void run(const Launch& launch, std::span<const Tensor> in, std::span<const Tensor> out) const override {
    const kernels::RecurrenceInputs gradients{
        .a = out[0], .b = out[1], .u = a_.has_rate() ? out[2] : Tensor{}, .rate = a_.has_rate() ? in[7] : Tensor{}};
    kernels::on(launch).linear_recurrence_backward(launch, gradients, in[0], in[1], a_.unpack(in.subspan(3)), in[2], a_.form,
                                                   a_.sequence_length);
  }
  std::vector<int> mutated() const override { return a_.has_rate() ? std::vector{7} : std::vector<int>{}; }
  double flops(std::span<const TensorType> in, std::span<const TensorType>) const override { return 3.0 * a_.flops(in[1]); }

 private:
  RecurrenceAttributes a_;
};

/// Inputs: starts, a, b[, u, rate]; output: h.
class LinearRecurrence final : public Op {
 public:
  explicit LinearRecurrence(const RecurrenceAttributes& attributes) : a_(attributes) {}
  std::string_view name() const override { return "linear_recurrence"; }

  std::vector<TensorType> infer(std::span<const TensorType> in) const override {
    const TensorType& h = in[1];
    require<UsageError>(h.shape.rank() == 2 && in[2] == h, "linear_recurrence: a ", h, " and b ", in[2], " differ");
    require<UsageError>(a_.sequence_length > 0 && h.shape.rows() % a_.sequence_length == 0, "linear_recurrence: ", h,
                        " is not made of sequences of ", a_.sequence_length);
    const TensorType starts{DType::int32, {h.shape.rows()}};
    require<UsageError>(in[0] == starts, "linear_recurrence: chunk starts are ", in[0], ", expected ", starts, " for ", h);
    if (a_.has_rate()) {
      const std::int64_t rates = in[4].shape.elements();
      require<UsageError>(in[3] == h, "linear_recurrence: u ", in[3], " and a ", h, " differ");
      require<UsageError>(in[4].dtype == accumulator_of(h.dtype) && rates > 0 && h.shape.columns() % rates == 0,
                          "linear_recurrence: rate ", in[4], " does not divide the columns of ", h);
    }
    return {h};
  }
  void run(const Launch& launch, std::span<const Tensor> in, std::span<const Tensor> out) const override {
    kernels::on(launch).linear_recurrence(launch, out[0], a_.unpack(in.subspan(1)), in[0], a_.form, a_.sequence_length);
  }
  void vjp(VjpContext& context) const override {
    std::vector<Value> inputs{context.gradient(0), context.output(0), context.input(0)};
    for (std::size_t i = 0; i < a_.count(); ++i) {
      inputs.push_back(context.input(static_cast<int>(1 + i)));
    }
    if (a_.has_rate()) {
      inputs.push_back(context.parameter_gradient(4));
    }
    const std::vector<Value> gradients = context.tape().emit(std::make_shared<LinearRecurrenceBackward>(a_), inputs);
    for (std::size_t i = 0; i < gradients.size(); ++i) {
      contribute(context, static_cast<int>(1 + i), gradients[i]);
    }
  }
  double flops(std::span<const TensorType>, std::span<const TensorType> out) const override { return a_.flops(out[0]); }

 private:
  RecurrenceAttributes a_;
};

}  // namespace

Value causal_conv_silu(Tape& tape, Value x, Value weight, Value starts) {
  return tape.emit_one(std::make_shared<CausalConvSilu>(), {{x, weight, starts}});
}

Value linear_recurrence(Tape& tape, const RecurrenceGates& gates, Value starts, kernels::RecurrenceForm form,
                        std::int64_t sequence_length) {
  const RecurrenceAttributes attributes{.form = form, .sequence_length = sequence_length};
  require<UsageError>(
      attributes.has_rate() == static_cast<bool>(gates.u) && attributes.has_rate() == static_cast<bool>(gates.rate),
      "linear_recurrence: u and rate belong to the form rg_lru, and to no other");
  std::vector<Value> inputs{starts, gates.a, gates.b};
  if (attributes.has_rate()) {
    inputs.insert(inputs.end(), {gates.u, gates.rate});
  }
  return tape.emit_one(std::make_shared<LinearRecurrence>(attributes), inputs);
}

}  // namespace attamba::ops
