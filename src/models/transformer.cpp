// The baseline transformer (docs/model.md): pre-norm attention and SwiGLU. attn_dim < D gives the paper's smaller KV cache
// (+KVC), sliding_window the windowed variant (+SWA).
#include "src/models/model.h"

namespace attamba {

namespace {

Value declare_attention(ModelBuilder& b, Value x, std::int64_t layer, const std::string& prefix) {
  const Tape::Scope scope(b.tape, "attention");
  const ModelConfig& c = b.config;
  const std::int64_t width = c.attention_width(), kv_width = c.kv_width();
  const Value q = ops::linear_unrounded(b.tape, x, b.matrix(prefix + "wq.weight", width, c.dim));
  const Value k = ops::linear_unrounded(b.tape, x, b.matrix(prefix + "wk.weight", kv_width, c.dim));
  const Value v = ops::linear(b.tape, x, b.matrix(prefix + "wv.weight", kv_width, c.dim));
  const Value y = ops::attention(b.tape, b.rotated(q, {}, c.head_width()), b.rotated(k, {}, c.head_width()), v,
                                 b.attention_keys(layer), c.n_heads, c.kv_heads(), b.batch.length);
  return ops::linear(b.tape, y, b.matrix(prefix + "wo.weight", c.dim, width));
}

}  // namespace

void declare_transformer(ModelBuilder& b, ResidualStream& h) {
  declare_attention_blocks(b, h, declare_attention);
}

}  // namespace attamba
