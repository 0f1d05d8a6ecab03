// Mamba-2's block alone (docs/model.md): h += ssm(norm h), the state running over the whole sequence.
#include "src/models/model.h"

namespace attamba {

void declare_mamba(ModelBuilder& b, ResidualStream& h) {
  for (std::int64_t layer = 0; layer < b.config.n_layers; ++layer) {
    const std::string prefix = concat("layers.", layer, ".");
    const Tape::Scope scope(b.tape, concat("layers.", layer));
    const Tape::Segment segment(b.tape, b.recompute);
    const Value x = h.norm(prefix + "ssm_norm.weight");
    const Ssm ssm = declare_ssm(b, x, b.config.dim, prefix + "ssm.", b.chunk_starts(layer));
    h.add(ops::linear(b.tape, ssm.state, ssm.out_proj));
  }
}

}  // namespace attamba
