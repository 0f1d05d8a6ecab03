#include "src/ops/ops.h"

namespace attamba::ops {

namespace {

/// Of chunk_scan, whose rows have chunk starts, and of label_scan, whose rows have labels.
struct ScanAttributes {
  kernels::ScanShape shape;
  double eps;
  std::int64_t sequence_length = 0;  ///< chunk_scan only
  bool by_label = false;
  bool has_conv = false, has_dt_bias = false;

  std::string_view name() const { return by_label ? "label_scan" : "chunk_scan"; }
  int weights() const { return 3 + (has_conv ? 1 : 0) + (has_dt_bias ? 1 : 0); }

  /// Weights stand in the order conv?, a_log, d_skip, dt_bias?, norm.
  kernels::ScanWeights unpack(std::span<const Tensor> in) const {
    std::size_t next = 0;
    kernels::ScanWeights w;
    w.conv = has_conv ? in[next++] : Tensor{};
    w.a_log = in[next++];
    w.d_skip = in[next++];
    w.dt_bias = has_dt_bias ? in[next++] : Tensor{};
    w.norm = in[next];
    return w;
  }

  void check_weights(std::span<const TensorType> in, const TensorType& zxbcdt) const {
    std::size_t next = 0;
    const auto check = [&](std::string_view what, const Shape& expected) {
      const TensorType type{accumulator_of(zxbcdt.dtype), expected};
      require<UsageError>(in[next] == type, name(), ": ", what, " is ", in[next], ", expected ", type, " for ", zxbcdt);
      ++next;
    };
    if (has_conv) {
      check("conv", {shape.hidden + 2 * shape.groups * shape.state, shape.conv});
    }
    check("A_log", {shape.heads});
    check("D", {shape.heads});
    if (has_dt_bias) {
      check("dt_bias", {shape.heads});
    }
    check("norm", {shape.hidden});
  }

  /// Per token: C B^T and the state's update and read-out, about 6 E N; the convolution 2 W (E + 2GN).
  double flops(const TensorType& zxbcdt) const {
    const double channels = static_cast<double>(shape.hidden + 2 * shape.groups * shape.state);
    const double per_token =
        6.0 * static_cast<double>(shape.hidden * shape.state) + 2.0 * static_cast<double>(shape.conv) * channels;
    return per_token * static_cast<double>(zxbcdt.shape.rows());
  }
};

/// Inputs: dout, zxbcdt, starts or labels, weights..., gradients...; output: dzxbcdt.
class ScanBackward final : public Op {
 public:
  explicit ScanBackward(const ScanAttributes& attributes) : a_(attributes) {}
  std::string_view name() const override { return a_.by_label ? "label_scan_backward" : "chunk_scan_backward"; }
  std::vector<TensorType> infer(std::span<const TensorType> in) const override { return {in[1]}; }
  std::size_t workspace(Device device, std::span<const TensorType> in, std::span<const TensorType>) const override {
    const kernels::Backend& on = kernels::on(device);
    return a_.by_label ? on.label_scan_backward_workspace(in[1], a_.shape)
                       : on.chunk_scan_backward_workspace(in[1], a_.shape, a_.sequence_length);
  }
  void run(const Launch& launch, std::span<const Tensor> in, std::span<const Tensor> out) const override {
    const auto count = static_cast<std::size_t>(a_.weights());
    const kernels::ScanWeights weights = a_.unpack(in.subspan(3, count)), gradients = a_.unpack(in.subspan(3 + count, count));
    const kernels::Backend& on = kernels::on(launch);
    if (a_.by_label) {
      on.label_scan_backward(launch, out[0], gradients, in[0], in[1], weights, in[2], a_.shape, a_.eps);
    } else {
      on.chunk_scan_backward(launch, out[0], gradients, in[0], in[1], weights, in[2], a_.shape, a_.eps, a_.sequence_length);
    }
  }
  std::vector<int> mutated() const override {
    std::vector<int> indices;
    for (int i = 0; i < a_.weights(); ++i) {
      indices.push_back(3 + a_.weights() + i);
    }
    return indices;
  }
  double flops(std::span<const TensorType> in, std::span<const TensorType>) const override { return 3.0 * a_.flops(in[1]); }

 private:
  ScanAttributes a_;
};

/// Inputs: zxbcdt, starts or labels, weights...; output: [T, E].
class Scan final : public Op {
 public:
  explicit Scan(const ScanAttributes& attributes) : a_(attributes) {}
  std::string_view name() const override { return a_.name(); }

  std::vector<TensorType> infer(std::span<const TensorType> in) const override {
    const kernels::ScanShape& s = a_.shape;
    require<UsageError>(s.heads > 0 && s.hidden % s.heads == 0, name(), ": hidden ", s.hidden, " is not divisible by heads ",
                        s.heads);
    require<UsageError>(s.groups > 0 && s.heads % s.groups == 0, name(), ": heads ", s.heads, " are not divisible by groups ",
                        s.groups);
    require<UsageError>(in[0].shape.columns() == s.projection(), name(), ": ", in[0], " should have ", s.projection(),
                        " columns");
    require<UsageError>(a_.by_label || (a_.sequence_length > 0 && in[0].shape.rows() % a_.sequence_length == 0), name(), ": ",
                        in[0], " is not made of sequences of ", a_.sequence_length);
    const TensorType table{DType::int32, {in[0].shape.rows()}};
    require<UsageError>(in[1] == table, name(), a_.by_label ? ": labels are " : ": chunk starts are ", in[1], ", expected ",
                        table, " for ", in[0]);
    a_.check_weights(in.subspan(2), in[0]);
    return {{in[0].dtype, {in[0].shape.rows(), s.hidden}}};
  }
  std::size_t workspace(Device device, std::span<const TensorType> in, std::span<const TensorType>) const override {
    const kernels::Backend& on = kernels::on(device);
    return a_.by_label ? on.label_scan_workspace(in[0], a_.shape)
                       : on.chunk_scan_workspace(in[0], a_.shape, a_.sequence_length);
  }
  void run(const Launch& launch, std::span<const Tensor> in, std::span<const Tensor> out) const override {
    const kernels::ScanWeights weights = a_.unpack(in.subspan(2));
    const kernels::Backend& on = kernels::on(launch);
    if (a_.by_label) {
      on.label_scan(launch, out[0], in[0], weights, in[1], a_.shape, a_.eps);
    } else {
      on.chunk_scan(launch, out[0], in[0], weights, in[1], a_.shape, a_.eps, a_.sequence_length);
    }
  }
  void vjp(VjpContext& context) const override {
    std::vector<Value> inputs{context.gradient(0), context.input(0), context.input(1)};
    for (int i = 0; i < a_.weights(); ++i) {
      inputs.push_back(context.input(2 + i));
    }
    for (int i = 0; i < a_.weights(); ++i) {
      inputs.push_back(context.parameter_gradient(2 + i));
    }
    contribute(context, 0, context.tape().emit_one(std::make_shared<ScanBackward>(a_), inputs));
  }
  double flops(std::span<const TensorType> in, std::span<const TensorType>) const override { return a_.flops(in[0]); }

 private:
  ScanAttributes a_;
};

Value scan(Tape& tape, Value zxbcdt, const ScanParameters& weights, Value table, ScanAttributes attributes) {
  attributes.has_conv = static_cast<bool>(weights.conv);
  attributes.has_dt_bias = static_cast<bool>(weights.dt_bias);
  require<UsageError>(attributes.has_conv == (attributes.shape.conv > 0), attributes.name(), ": ", attributes.shape.conv,
                      " taps ", attributes.has_conv ? "with" : "without", " convolution weights");
  std::vector<Value> inputs{zxbcdt, table};
  for (const Value weight : {weights.conv, weights.a_log, weights.d_skip, weights.dt_bias, weights.norm}) {
    if (weight) {
      inputs.push_back(weight);
    }
  }
  return tape.emit_one(std::make_shared<Scan>(attributes), inputs);
}

}  // namespace

Value chunk_scan(Tape& tape, Value zxbcdt, const ScanParameters& weights, Value starts, const kernels::ScanShape& shape,
                 double eps, std::int64_t sequence_length) {
  return scan(tape, zxbcdt, weights, starts, {.shape = shape, .eps = eps, .sequence_length = sequence_length});
}

Value label_scan(Tape& tape, Value zxbcdt, const ScanParameters& weights, Value labels, const kernels::ScanShape& shape,
                 double eps) {
  return scan(tape, zxbcdt, weights, labels, {.shape = shape, .eps = eps, .by_label = true});
}

}  // namespace attamba::ops
