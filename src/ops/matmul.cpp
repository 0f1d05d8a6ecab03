#include "src/ops/ops.h"

namespace attamba::ops {

namespace {

enum class Rounding : std::uint8_t { compute_type, none };

/// out [M, N] = op(a) op(b) (+ addend).
class Matmul final : public Op {
 public:
  Matmul(bool transpose_a, bool transpose_b, bool has_addend, Rounding rounding)
      : transpose_a_(transpose_a), transpose_b_(transpose_b), has_addend_(has_addend), rounding_(rounding) {}

  std::string_view name() const override { return "matmul"; }

  std::vector<TensorType> infer(std::span<const TensorType> in) const override {
    const TensorType &a = in[0], &b = in[1];
    const std::int64_t m = transpose_a_ ? a.shape.columns() : a.shape.rows();
    const std::int64_t k = transpose_a_ ? a.shape.rows() : a.shape.columns();
    const std::int64_t n = transpose_b_ ? b.shape.rows() : b.shape.columns();
    require<UsageError>(k == (transpose_b_ ? b.shape.columns() : b.shape.rows()) && a.dtype == b.dtype, "matmul: ", a,
                        transpose_a_ ? "^T" : "", " and ", b, transpose_b_ ? "^T" : "", " do not fit");
    const TensorType out{rounding_ == Rounding::none ? accumulator_of(a.dtype) : a.dtype, {m, n}};
    require<UsageError>(!has_addend_ || in[2] == out, "matmul: cannot add ", has_addend_ ? in[2] : out, " to ", out);
    return {out};
  }

  std::size_t workspace(Device device, std::span<const TensorType> in, std::span<const TensorType> out) const override {
    return kernels::on(device).matmul_workspace(out[0], in[0], in[1], transpose_a_, transpose_b_);
  }

  void run(const Launch& launch, std::span<const Tensor> in, std::span<const Tensor> out) const override {
    kernels::on(launch).matmul(launch, out[0], in[0], in[1], transpose_a_, transpose_b_, has_addend_ ? in[2] : Tensor{});
  }

  /// y = x w^T + c:  dx = dy w (+ what x has received already), dw += dy^T x, dc = dy.
  void vjp(VjpContext& context) const override;

  int reusable_input(int) const override { return has_addend_ ? 2 : -1; }

  double flops(std::span<const TensorType> in, std::span<const TensorType> out) const override {
    const std::int64_t k = transpose_a_ ? in[0].shape.rows() : in[0].shape.columns();
    return 2.0 * static_cast<double>(out[0].shape.elements()) * static_cast<double>(k);
  }

 private:
  bool transpose_a_, transpose_b_, has_addend_;
  Rounding rounding_;
};

/// gradient [N, K] += dy [T, N]^T x [T, K].
class LinearWeightGradient final : public Op {
 public:
  std::string_view name() const override { return "linear_weight_gradient"; }
  std::vector<TensorType> infer(std::span<const TensorType>) const override { return {}; }
  std::size_t workspace(Device device, std::span<const TensorType> in, std::span<const TensorType>) const override {
    return kernels::on(device).matmul_workspace(in[2], in[0], in[1], true, false);
  }
  void run(const Launch& launch, std::span<const Tensor> in, std::span<const Tensor>) const override {
    kernels::on(launch).matmul(launch, in[2], in[0], in[1], true, false, in[2]);
  }
  std::vector<int> mutated() const override { return {2}; }
  double flops(std::span<const TensorType> in, std::span<const TensorType>) const override {
    return 2.0 * static_cast<double>(in[2].shape.elements()) * static_cast<double>(in[0].shape.rows());
  }
};

Value emit_matmul(Tape& tape, Value a, Value b, bool transpose_b, Value addend) {
  auto op = std::make_shared<Matmul>(false, transpose_b, static_cast<bool>(addend), Rounding::compute_type);
  return addend ? tape.emit_one(std::move(op), {{a, b, addend}}) : tape.emit_one(std::move(op), {{a, b}});
}

void Matmul::vjp(VjpContext& context) const {
  require(!transpose_a_ && transpose_b_, "matmul: only x w^T has a gradient");
  const Value dy = context.gradient(0);
  if (context.wants(1)) {
    context.tape().emit(std::make_shared<LinearWeightGradient>(), {{dy, context.input(0), context.parameter_gradient(1)}});
  }
  if (context.wants(0)) {
    context.set(0, emit_matmul(context.tape(), dy, context.input(1), false, context.partial(0)));
  }
  if (has_addend_ && context.wants(2)) {
    contribute(context, 2, dy);
  }
}

}  // namespace

Value linear(Tape& tape, Value x, Value weight, Value addend) {
  return emit_matmul(tape, x, weight, true, addend);
}

Value linear_unrounded(Tape& tape, Value x, Value weight) {
  return tape.emit_one(std::make_shared<Matmul>(false, true, false, Rounding::none), {{x, weight}});
}

}  // namespace attamba::ops
