// What every backend's attention asks of its arguments before it runs.
#pragma once

#include "kernels/kernels.h"

namespace attamba::kernels {

/// Throws unless q [T, H, d] and k [T, Hk, d] fit each other and sequences of `sequence_length` tokens.
inline void check_attention_shapes(const TensorType& q, const TensorType& k, std::int64_t sequence_length) {
  const Shape &qs = q.shape, &ks = k.shape;
  require(qs.rank() == 3 && ks.rank() == 3, "attention: q and k must be [T, H, d], got ", q, " and ", k);
  const std::int64_t tokens = qs[0], heads = qs[1], kv_heads = ks[1], d = qs[2];
  require(ks[0] == tokens && ks[2] == d && q.dtype == k.dtype, "attention: q ", q, " does not fit k ", k);
  require(d > 0 && kv_heads > 0 && heads > 0 && heads % kv_heads == 0, "attention: ", kv_heads, " key/value heads must divide ",
          heads, " heads, head size ", d);
  require(sequence_length > 0 && tokens % sequence_length == 0, "attention: sequence length ", sequence_length, " must divide ",
          tokens, " tokens");
}

/// Throws unless every other tensor of `attention` is of the type that q and k ask for.
inline void check_attention(const Tensor& out, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
                            const AttentionTable& table, std::int64_t sequence_length) {
  check_attention_shapes(q.type, k.type, sequence_length);
  const auto check_like = [](const char* name, const Tensor& tensor, const TensorType& expected) {
    require(tensor.type == expected, "attention: ", name, " is ", tensor.type, ", expected ", expected);
  };
  check_like("v", v, k.type);
  check_like("out", out, q.type);
  check_like("lse", lse, {accumulator_of(q.dtype()), {q.shape()[0], q.shape()[1]}});
  for (const Tensor* part : {&table.ends, &table.key_begin, &table.key_end, &table.local_begin}) {
    require(part->elements() == q.shape()[0], "attention: a table of ", part->type, " for ", q.shape()[0], " tokens");
  }
}

inline void check_attention_backward(const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& dout,
                                     const Tensor& out, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
                                     const AttentionTable& table, std::int64_t sequence_length) {
  check_attention(out, lse, q, k, v, table, sequence_length);
  require(dq.type == q.type && dout.type == q.type, "attention_backward: dq is ", dq.type, ", dout ", dout.type, ", expected ",
          q.type);
  require(dk.type == k.type && dv.type == k.type, "attention_backward: dk is ", dk.type, ", dv ", dv.type, ", expected ",
          k.type);
}

}  // namespace attamba::kernels
