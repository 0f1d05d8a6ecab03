#include "src/ops/ops.h"

namespace attamba::ops {

namespace {

struct AttentionShape {
  std::int64_t heads, kv_heads, sequence_length;
  double average_keys;
};

/// The columns of [T, heads * d] as heads.
Tensor by_head(const Tensor& x, std::int64_t heads) {
  return {x.data, {x.dtype(), {x.shape().rows(), heads, x.shape().columns() / heads}}};
}
TensorType by_head(const TensorType& x, std::int64_t heads) {
  return {x.dtype, {x.shape.rows(), heads, x.shape.columns() / heads}};
}

/// Inputs: dout, out, lse, q, k, v, ends, key_begin, key_end, local_begin; outputs: dq, dk, dv.
class AttentionBackward final : public Op {
 public:
  explicit AttentionBackward(const AttentionShape& shape) : s_(shape) {}
  std::string_view name() const override { return "attention_backward"; }
  std::vector<TensorType> infer(std::span<const TensorType> in) const override { return {in[3], in[4], in[5]}; }
  std::size_t workspace(Device device, std::span<const TensorType> in, std::span<const TensorType>) const override {
    return kernels::on(device).attention_backward_workspace(by_head(in[3], s_.heads), by_head(in[4], s_.kv_heads),
                                                            s_.sequence_length);
  }
  void run(const Launch& launch, std::span<const Tensor> in, std::span<const Tensor> out) const override {
    const std::int64_t h = s_.heads, hk = s_.kv_heads;
    kernels::on(launch).attention_backward(launch, by_head(out[0], h), by_head(out[1], hk), by_head(out[2], hk),
                                           by_head(in[0], h), by_head(in[1], h), in[2], by_head(in[3], h), by_head(in[4], hk),
                                           by_head(in[5], hk), {in[6], in[7], in[8], in[9]}, s_.sequence_length);
  }
  /// Five products of d per query, key and head: scores again, dV, dP, dQ, dK.
  double flops(std::span<const TensorType> in, std::span<const TensorType>) const override {
    return 10.0 * static_cast<double>(in[3].shape.elements()) * s_.average_keys;
  }

 private:
  AttentionShape s_;
};

/// Inputs: q, k, v, ends, key_begin, key_end, local_begin; outputs: out, lse.
class Attention final : public Op {
 public:
  explicit Attention(const AttentionShape& shape) : s_(shape) {}
  std::string_view name() const override { return "attention"; }

  std::vector<TensorType> infer(std::span<const TensorType> in) const override {
    const TensorType &q = in[0], &k = in[1], &v = in[2];
    require<UsageError>(s_.heads > 0 && s_.kv_heads > 0 && s_.heads % s_.kv_heads == 0, "attention: ", s_.heads,
                        " heads do not divide over ", s_.kv_heads, " key/value heads");
    require<UsageError>(
        q.shape.columns() % s_.heads == 0 && k == v && q.shape.columns() / s_.heads * s_.kv_heads == k.shape.columns(),
        "attention: q ", q, ", k ", k, " and v ", v, " do not fit ", s_.heads, " heads over ", s_.kv_heads);
    require<UsageError>(s_.sequence_length > 0 && q.shape.rows() % s_.sequence_length == 0 && k.shape.rows() == q.shape.rows(),
                        "attention: ", q, " is not made of sequences of ", s_.sequence_length);
    const TensorType table{DType::int32, {q.shape.rows()}};
    for (std::size_t i = 3; i < in.size(); ++i) {
      require<UsageError>(in[i] == table, "attention: a table of keys is ", in[i], ", expected ", table, " for q ", q);
    }
    return {q, {accumulator_of(q.dtype), {q.shape.rows(), s_.heads}}};
  }
  std::size_t workspace(Device device, std::span<const TensorType> in, std::span<const TensorType>) const override {
    return kernels::on(device).attention_workspace(by_head(in[0], s_.heads), by_head(in[1], s_.kv_heads), s_.sequence_length);
  }
  void run(const Launch& launch, std::span<const Tensor> in, std::span<const Tensor> out) const override {
    kernels::on(launch).attention(launch, by_head(out[0], s_.heads), out[1], by_head(in[0], s_.heads),
                                  by_head(in[1], s_.kv_heads), by_head(in[2], s_.kv_heads), {in[3], in[4], in[5], in[6]},
                                  s_.sequence_length);
  }
  void vjp(VjpContext& c) const override {
    const std::vector<Value> gradients = c.tape().emit(
        std::make_shared<AttentionBackward>(s_), {{c.gradient(0), c.output(0), c.output(1), c.input(0), c.input(1), c.input(2),
                                                   c.input(3), c.input(4), c.input(5), c.input(6)}});
    for (int i = 0; i < 3; ++i) {
      contribute(c, i, gradients[static_cast<std::size_t>(i)]);
    }
  }
  /// Two products of d per query, key and head: scores, and their sum over values.
  double flops(std::span<const TensorType> in, std::span<const TensorType>) const override {
    return 4.0 * static_cast<double>(in[0].shape.elements()) * s_.average_keys;
  }

 private:
  AttentionShape s_;
};

}  // namespace

Value attention(Tape& tape, Value q, Value k, Value v, const AttentionKeys& keys, std::int64_t heads, std::int64_t kv_heads,
                std::int64_t sequence_length) {
  const AttentionShape shape{heads, kv_heads, sequence_length, keys.average_keys};
  return tape.emit(std::make_shared<Attention>(shape),
                   {{q, k, v, keys.ends, keys.key_begin, keys.key_end, keys.local_begin}})[0];
}

}  // namespace attamba::ops
