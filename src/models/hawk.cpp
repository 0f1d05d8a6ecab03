// Hawk (docs/model.md): RG-LRU blocks, each followed by a feed-forward. A block's result holds its normed input too.
#include "src/models/model.h"

namespace attamba {

namespace {

Value declare_rg_lru(ModelBuilder& b, Value x, std::int64_t layer, const std::string& prefix) {
  const Tape::Scope scope(b.tape, "rglru");
  const std::int64_t dim = b.config.dim, inner = b.config.hidden;
  const Value starts = b.chunk_starts(layer);
  const Value u =
      b.convolved(ops::linear(b.tape, x, b.matrix(prefix + "wx.weight", inner, dim)), prefix + "conv.weight", starts);
  const ops::RecurrenceGates gates{.a = ops::linear(b.tape, u, b.matrix(prefix + "a_gate.weight", inner, inner)),
                                   .b = ops::linear(b.tape, u, b.matrix(prefix + "input_gate.weight", inner, inner)),
                                   .u = u,
                                   .rate = b.vector(prefix + "a", {inner / b.config.n_heads}, Initialization::log_rate)};
  const Value state = ops::linear_recurrence(b.tape, gates, starts, kernels::RecurrenceForm::rg_lru, b.batch.length);
  const Value out = ops::swiglu(b.tape, ops::linear(b.tape, x, b.matrix(prefix + "wy.weight", inner, dim)), state);
  return ops::linear(b.tape, out, b.matrix(prefix + "wo.weight", dim, inner), x);
}

}  // namespace

void declare_hawk(ModelBuilder& b, ResidualStream& h) {
  for (std::int64_t layer = 0; layer < b.config.n_layers; ++layer) {
    const std::string prefix = concat("layers.", layer, ".");
    const Tape::Scope scope(b.tape, concat("layers.", layer));
    const Tape::Segment segment(b.tape, b.recompute);
    h.add(declare_rg_lru(b, h.norm(prefix + "rglru_norm.weight"), layer, prefix + "rglru."));
    h.add(declare_feed_forward(b, h.norm(prefix + "ffn_norm.weight"), prefix + "feed_forward."));
  }
}

}  // namespace attamba
