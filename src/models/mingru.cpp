// minGRU (docs/model.md): h += gru(norm h), a gated recurrence without a feed-forward.
#include "src/models/model.h"

namespace attamba {

void declare_mingru(ModelBuilder& b, ResidualStream& h) {
  const std::int64_t dim = b.config.dim, inner = b.config.hidden;
  for (std::int64_t layer = 0; layer < b.config.n_layers; ++layer) {
    const std::string prefix = concat("layers.", layer, ".");
    const Tape::Scope scope(b.tape, concat("layers.", layer));
    const Tape::Segment segment(b.tape, b.recompute);
    const Value x = h.norm(prefix + "gru_norm.weight"), starts = b.chunk_starts(layer);
    const Value gate =
        b.convolved(ops::linear(b.tape, x, b.matrix(prefix + "gru.wz.weight", inner, dim)), prefix + "gru.conv.weight", starts);
    const Value candidate = ops::linear(b.tape, x, b.matrix(prefix + "gru.wh.weight", inner, dim));
    const Value state =
        ops::linear_recurrence(b.tape, {.a = gate, .b = candidate}, starts, kernels::RecurrenceForm::min_gru, b.batch.length);
    const Value out = ops::swiglu(b.tape, ops::linear(b.tape, x, b.matrix(prefix + "gru.w.weight", inner, dim)), state);
    h.add(ops::linear(b.tape, out, b.matrix(prefix + "gru.wo.weight", dim, inner)));
  }
}

}  // namespace attamba
