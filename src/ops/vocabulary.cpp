#include <algorithm>

#include "src/ops/ops.h"

namespace attamba::ops {

namespace {

/// Inputs: dout, tokens, dtable.
class EmbeddingBackward final : public Op {
 public:
  std::string_view name() const override { return "embedding_backward"; }
  std::vector<TensorType> infer(std::span<const TensorType>) const override { return {}; }
  std::size_t workspace(Device device, std::span<const TensorType> in, std::span<const TensorType>) const override {
    return kernels::on(device).embedding_backward_workspace(in[0]);
  }
  void run(const Launch& launch, std::span<const Tensor> in, std::span<const Tensor>) const override {
    kernels::on(launch).embedding_backward(launch, in[2], in[0], in[1]);
  }
  std::vector<int> mutated() const override { return {2}; }
  /// Each row of dout goes to one row of the table, which is read and written.
  std::size_t traffic(std::span<const TensorType> in, std::span<const TensorType>) const override {
    const std::int64_t elements = std::min(in[0].shape.elements(), in[2].shape.elements());
    return in[0].bytes() + in[1].bytes() + 2 * static_cast<std::size_t>(elements) * size_of(in[2].dtype);
  }
};

/// Inputs: table, tokens.
class Embedding final : public Op {
 public:
  std::string_view name() const override { return "embedding"; }
  std::vector<TensorType> infer(std::span<const TensorType> in) const override {
    require<UsageError>(in[1].dtype == DType::int32 && in[0].shape.rank() == 2, "embedding: tokens ", in[1], " and table ",
                        in[0], " do not fit; expected int32 tokens and a table [V, D]");
    return {{in[0].dtype, {in[1].shape.elements(), in[0].shape.columns()}}};
  }
  void run(const Launch& launch, std::span<const Tensor> in, std::span<const Tensor> out) const override {
    kernels::on(launch).embedding(launch, out[0], in[0], in[1]);
  }
  /// Rows of the table that no token asks for stay unread.
  std::size_t traffic(std::span<const TensorType> in, std::span<const TensorType> out) const override {
    return std::min(in[0].bytes(), out[0].bytes()) + in[1].bytes() + out[0].bytes();
  }
  void vjp(VjpContext& context) const override {
    context.tape().emit(std::make_shared<EmbeddingBackward>(),
                        {{context.gradient(0), context.input(1), context.parameter_gradient(0)}});
  }
};

/// Inputs: hidden, weight, targets[, dweight]; outputs: losses[, dhidden].
class LinearCrossEntropy final : public Op {
 public:
  LinearCrossEntropy(bool with_gradient, double scale) : with_gradient_(with_gradient), scale_(scale) {}
  std::string_view name() const override { return "linear_cross_entropy"; }

  std::vector<TensorType> infer(std::span<const TensorType> in) const override {
    require<UsageError>(in[0].shape.columns() == in[1].shape.columns() && in[0].shape.rows() == in[2].shape.elements() &&
                            in[0].dtype == in[1].dtype && in[2].dtype == DType::int32,
                        "linear_cross_entropy: hidden ", in[0], ", weight ", in[1], " and targets ", in[2], " do not fit");
    std::vector<TensorType> outputs{{accumulator_of(in[0].dtype), {in[0].shape.rows()}}};
    if (with_gradient_) {
      outputs.push_back(in[0]);
    }
    return outputs;
  }
  std::size_t workspace(Device device, std::span<const TensorType> in, std::span<const TensorType>) const override {
    return kernels::on(device).linear_cross_entropy_workspace(in[0], in[1], with_gradient_);
  }
  void run(const Launch& launch, std::span<const Tensor> in, std::span<const Tensor> out) const override {
    if (with_gradient_) {
      kernels::on(launch).linear_cross_entropy_with_gradient(launch, out[0], out[1], in[3], in[0], in[1], in[2], scale_);
    } else {
      kernels::on(launch).linear_cross_entropy(launch, out[0], in[0], in[1], in[2]);
    }
  }
  void vjp(VjpContext& context) const override {
    require(with_gradient_, "linear_cross_entropy: was declared for evaluation, without its gradient");
    contribute(context, 0, context.output(1));
  }
  std::vector<int> mutated() const override { return with_gradient_ ? std::vector<int>{3} : std::vector<int>{}; }
  double flops(std::span<const TensorType> in, std::span<const TensorType>) const override {
    return (with_gradient_ ? 6.0 : 2.0) * static_cast<double>(in[0].shape.rows()) * static_cast<double>(in[1].shape.elements());
  }

 private:
  bool with_gradient_;
  double scale_;
};

}  // namespace

Value embedding(Tape& tape, Value table, Value tokens) {
  return tape.emit_one(std::make_shared<Embedding>(), {{table, tokens}});
}

Value linear_cross_entropy(Tape& tape, Value hidden, Value weight, Value targets) {
  return tape.emit_one(std::make_shared<LinearCrossEntropy>(false, 1.0), {{hidden, weight, targets}});
}

Value linear_cross_entropy_root(Tape& tape, Value hidden, Value weight, Value targets, double objective_scale) {
  return tape.emit(std::make_shared<LinearCrossEntropy>(true, objective_scale),
                   {{hidden, weight, targets, tape.parameter_gradient(weight)}})[0];
}

}  // namespace attamba::ops
