#include "src/models/model.h"

#include "src/core/error.h"
#include "src/models/inputs.h"

namespace attamba {

Value ModelBuilder::matrix(const std::string& name, std::int64_t out, std::int64_t in) {
  const Shape shape{out, in};
  parameters_.push_back({name, shape, Initialization::normal});
  return tape.parameter(name, {dtype, shape});
}

Value ModelBuilder::vector(const std::string& name, const Shape& shape, Initialization initialization) {
  parameters_.push_back({name, shape, initialization});
  return tape.parameter(name, {accumulator_of(dtype), shape});
}

Value ModelBuilder::batch_leaf(const std::string& name) {
  return tape.input(name, {DType::int32, {batch.rows()}});
}

Value ModelBuilder::tokens() {
  return batch_leaf(kTokensLeaf);
}

Value ModelBuilder::rotated(Value x, Value addend, std::int64_t head_dim) {
  const Value table = tape.input(kRopeLeaf, {accumulator_of(dtype), {batch.length, head_dim}});
  return ops::rope(tape, x, addend, table, batch_leaf(kPositionsLeaf), head_dim, dtype);
}

Value ModelBuilder::convolved(Value x, const std::string& taps, Value starts) {
  if (config.conv == 0) {
    return x;
  }
  const Value weight = vector(taps, {tape.type(x).shape.columns(), config.conv}, Initialization::normal);
  return ops::causal_conv_silu(tape, x, weight, starts);
}

ops::AttentionKeys ModelBuilder::attention_keys(std::int64_t layer) {
  const std::string name = table_name(chunking, layer);
  return {.ends = batch_leaf(name + ".ends"),
          .key_begin = batch_leaf(name + ".key_begin"),
          .key_end = batch_leaf(name + ".key_end"),
          .local_begin = batch_leaf(name + ".local_begin"),
          .average_keys = expected_keys(config, chunking, layer, batch.length)};
}

Value ModelBuilder::chunk_starts(std::int64_t layer) {
  return batch_leaf(table_name(chunking, layer) + ".starts");
}

Value ModelBuilder::chunk_labels(std::int64_t layer) {
  return batch_leaf(table_name(chunking, layer) + ".labels");
}

Value ResidualStream::norm(const std::string& weight_name) {
  const ModelConfig& config = builder_.config;
  const Value weight = builder_.vector(weight_name, {config.dim}, Initialization::ones);
  if (!pending_) {
    return ops::rms_norm(builder_.tape, stream_, weight, config.norm_eps);
  }
  const ops::Normed normed = ops::add_rms_norm(builder_.tape, stream_, pending_, weight, config.norm_eps);
  stream_ = normed.sum;
  pending_ = {};
  return normed.norm;
}

Value declare_feed_forward(ModelBuilder& b, Value x, const std::string& prefix) {
  const Tape::Scope scope(b.tape, "feed_forward");
  const std::int64_t width = b.config.dim, inner = b.config.ffn_dim;
  const Value gate = ops::linear(b.tape, x, b.matrix(prefix + "w1.weight", inner, width));
  const Value up = ops::linear(b.tape, x, b.matrix(prefix + "w3.weight", inner, width));
  return ops::linear(b.tape, ops::swiglu(b.tape, gate, up), b.matrix(prefix + "w2.weight", width, inner));
}

Ssm declare_ssm(ModelBuilder& b, Value u, std::int64_t width, const std::string& prefix, Value table) {
  constexpr double kGatedNormEps = 1e-5;  // docs/model.md, SSM
  const SsmConfig& ssm = b.config.ssm;
  const kernels::ScanShape shape{.hidden = ssm.hidden,
                                 .state = ssm.state,
                                 .heads = ssm.heads,
                                 .groups = ssm.groups,
                                 .conv = ssm.conv,
                                 .longest_chunk = b.chunking == nullptr ? 0 : b.chunking->longest_chunk(b.batch.length)};
  const Value zxbcdt = ops::linear(b.tape, u, b.matrix(prefix + "in_proj.weight", shape.projection(), width));
  ops::ScanParameters weights;
  if (ssm.conv > 0) {
    weights.conv =
        b.vector(prefix + "conv.weight", {ssm.hidden + 2 * ssm.groups * ssm.state, ssm.conv}, Initialization::normal);
  }
  weights.a_log = b.vector(prefix + "A_log", {ssm.heads}, Initialization::log_decay);
  weights.d_skip = b.vector(prefix + "D", {ssm.heads}, Initialization::ones);
  if (ssm.dt_bias) {
    weights.dt_bias = b.vector(prefix + "dt_bias", {ssm.heads}, Initialization::zeros);
  }
  weights.norm = b.vector(prefix + "norm.weight", {ssm.hidden}, Initialization::ones);
  const Value y = b.config.released() ? ops::label_scan(b.tape, zxbcdt, weights, table, shape, kGatedNormEps)
                                      : ops::chunk_scan(b.tape, zxbcdt, weights, table, shape, kGatedNormEps, b.batch.length);
  return {.state = y, .out_proj = b.matrix(prefix + "out_proj.weight", width, ssm.hidden)};
}

void declare_attention_blocks(ModelBuilder& b, ResidualStream& h, DeclareAttention declare_attention) {
  for (std::int64_t layer = 0; layer < b.config.n_layers; ++layer) {
    const std::string prefix = concat("layers.", layer, ".");
    const Tape::Scope scope(b.tape, concat("layers.", layer));
    const Tape::Segment segment(b.tape, b.recompute);
    h.add(declare_attention(b, h.norm(prefix + "attention_norm.weight"), layer, prefix + "attention."));
    h.add(declare_feed_forward(b, h.norm(prefix + "ffn_norm.weight"), prefix + "feed_forward."));
  }
}

}  // namespace attamba
