// Attamba (paper, section 4; docs/model.md): a transformer whose keys and values are made by two small selective SSMs that run
// inside chunks of tokens. A query attends to one key/value per finished chunk and to the most recent tokens in full.
#include "src/models/model.h"

namespace attamba {

namespace {

/// x [T, D], already normed -> what attention adds to the residual stream [T, D].
Value declare_attention(ModelBuilder& b, Value x, std::int64_t layer, const std::string& prefix) {
  const Tape::Scope scope(b.tape, "attention");
  const ModelConfig& c = b.config;
  const std::int64_t width = c.attention_width(), kv_width = c.kv_width();
  const Value table = c.released() ? b.chunk_labels(layer) : b.chunk_starts(layer);

  const Value q = ops::linear_unrounded(b.tape, x, b.matrix(prefix + "wq.weight", width, c.dim));
  Value k = x, v = x;
  if (c.kv_proj) {
    k = ops::linear(b.tape, x, b.matrix(prefix + "wk.weight", kv_width, c.dim));
    v = ops::linear(b.tape, x, b.matrix(prefix + "wv.weight", kv_width, c.dim));
  }
  // k = SSM_K(u) + u, v = SSM_V(u) + u (eq. 3); at a chunk's last token the SSM has seen the whole chunk.
  const bool residual = c.ssm.residual;
  const Ssm k_ssm = declare_ssm(b, k, kv_width, prefix + "k_ssm.", table);
  const Ssm v_ssm = declare_ssm(b, v, kv_width, prefix + "v_ssm.", table);
  k = b.rotated(ops::linear_unrounded(b.tape, k_ssm.state, k_ssm.out_proj), residual ? k : Value{}, c.head_width());
  v = ops::linear(b.tape, v_ssm.state, v_ssm.out_proj, residual ? v : Value{});
  const Value y = ops::attention(b.tape, b.rotated(q, {}, c.head_width()), k, v, b.attention_keys(layer), c.n_heads,
                                 c.kv_heads(), b.batch.length);
  return ops::linear(b.tape, y, b.matrix(prefix + "wo.weight", c.dim, width));
}

}  // namespace

void declare_attamba(ModelBuilder& b, ResidualStream& h) {
  declare_attention_blocks(b, h, declare_attention);
}

}  // namespace attamba
