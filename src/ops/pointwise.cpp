#include "src/ops/ops.h"

namespace attamba::ops {

namespace {

class Add final : public Op {
 public:
  std::string_view name() const override { return "add"; }
  std::vector<TensorType> infer(std::span<const TensorType> in) const override {
    require<UsageError>(in[0] == in[1], "add: ", in[0], " and ", in[1], " differ");
    return {in[0]};
  }
  void run(const Launch& launch, std::span<const Tensor> in, std::span<const Tensor> out) const override {
    kernels::on(launch).add(launch, out[0], in[0], in[1]);
  }
  void vjp(VjpContext& context) const override {
    contribute(context, 0, context.gradient(0));
    contribute(context, 1, context.gradient(0));
  }
  int reusable_input(int) const override { return 0; }
  double flops(std::span<const TensorType>, std::span<const TensorType> out) const override {
    return static_cast<double>(out[0].shape.elements());
  }
};

/// Inputs: dout, gate, up; outputs: dgate, dup.
class SwigluBackward final : public Op {
 public:
  std::string_view name() const override { return "swiglu_backward"; }
  std::vector<TensorType> infer(std::span<const TensorType> in) const override { return {in[1], in[2]}; }
  void run(const Launch& launch, std::span<const Tensor> in, std::span<const Tensor> out) const override {
    kernels::on(launch).swiglu_backward(launch, out[0], out[1], in[0], in[1], in[2]);
  }
  int reusable_input(int output) const override { return output + 1; }
};

class Swiglu final : public Op {
 public:
  std::string_view name() const override { return "swiglu"; }
  std::vector<TensorType> infer(std::span<const TensorType> in) const override {
    require<UsageError>(in[0] == in[1], "swiglu: gate ", in[0], " and up ", in[1], " differ");
    return {in[0]};
  }
  void run(const Launch& launch, std::span<const Tensor> in, std::span<const Tensor> out) const override {
    kernels::on(launch).swiglu(launch, out[0], in[0], in[1]);
  }
  void vjp(VjpContext& context) const override {
    const std::vector<Value> gradients =
        context.tape().emit(std::make_shared<SwigluBackward>(), {{context.gradient(0), context.input(0), context.input(1)}});
    contribute(context, 0, gradients[0]);
    contribute(context, 1, gradients[1]);
  }
};

/// Inputs: x [T, H d], table [n, d], positions [T][, addend [T, H d]].
class Rope final : public Op {
 public:
  Rope(std::int64_t head_dim, DType compute, bool inverse) : head_dim_(head_dim), compute_(compute), inverse_(inverse) {}
  std::string_view name() const override { return inverse_ ? "rope_backward" : "rope"; }
  std::vector<TensorType> infer(std::span<const TensorType> in) const override {
    require<UsageError>(head_dim_ > 0 && head_dim_ % 2 == 0 && in[0].shape.columns() % head_dim_ == 0, name(), ": heads of ",
                        head_dim_, " do not fit ", in[0], " (the head dimension must be even)");
    require<UsageError>(in[1].shape.columns() == head_dim_ && in[1].dtype == accumulator_of(compute_) &&
                            in[2].shape.elements() == in[0].shape.rows() && in[2].dtype == DType::int32,
                        name(), ": table ", in[1], " and positions ", in[2], " do not fit ", in[0]);
    const TensorType out{compute_, in[0].shape};
    require<UsageError>(in[0].dtype == compute_ || in[0].dtype == accumulator_of(compute_), name(), ": ", in[0],
                        " cannot become ", out);
    require<UsageError>(in.size() < 4 || in[3] == out, name(), ": cannot add ", in.back(), " to ", out);
    return {out};
  }
  void run(const Launch& launch, std::span<const Tensor> in, std::span<const Tensor> out) const override {
    const Shape heads{in[0].shape().rows(), in[0].shape().columns() / head_dim_, head_dim_};
    kernels::on(launch).rope(launch, {out[0].data, {out[0].dtype(), heads}}, {in[0].data, {in[0].dtype(), heads}},
                             in.size() > 3 ? Tensor{in[3].data, {in[3].dtype(), heads}} : Tensor{}, in[1], in[2], inverse_);
  }
  /// A rotation's transpose is the rotation back. Both summands receive it.
  void vjp(VjpContext& context) const override {
    const Value gradient = context.tape().emit_one(std::make_shared<Rope>(head_dim_, compute_, !inverse_),
                                                   {{context.gradient(0), context.input(1), context.input(2)}});
    contribute(context, 0, gradient);
    if (context.inputs() > 3) {
      contribute(context, 3, gradient);
    }
  }
  int reusable_input(int) const override { return 0; }

 private:
  std::int64_t head_dim_;
  DType compute_;
  bool inverse_;
};

}  // namespace

void contribute(VjpContext& context, int i, Value gradient) {
  if (gradient && context.wants(i)) {
    const Value partial = context.partial(i);
    context.set(i, partial ? add(context.tape(), partial, gradient) : gradient);
  }
}

Value add(Tape& tape, Value a, Value b) {
  return tape.emit_one(std::make_shared<Add>(), {{a, b}});
}

Value swiglu(Tape& tape, Value gate, Value up) {
  return tape.emit_one(std::make_shared<Swiglu>(), {{gate, up}});
}

Value rope(Tape& tape, Value x, Value addend, Value table, Value positions, std::int64_t head_dim, DType compute) {
  auto op = std::make_shared<Rope>(head_dim, compute, false);
  return addend ? tape.emit_one(std::move(op), {{x, table, positions, addend}})
                : tape.emit_one(std::move(op), {{x, table, positions}});
}

}  // namespace attamba::ops
