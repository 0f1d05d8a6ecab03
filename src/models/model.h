// Models are declared as ops on a tape; they never see a stream, a rank or a device. A model is one file with one function and
// one line in registry.cpp.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "src/chunking/chunking.h"
#include "src/graph/tape.h"
#include "src/models/model_config.h"
#include "src/ops/ops.h"

namespace attamba {

/// How a parameter starts (docs/model.md, recipe).
enum class Initialization : std::uint8_t {
  normal,     ///< truncated normal, cut at 3 sigma, sigma = columns^-0.5
  ones,       ///< norms and the SSM's skip
  zeros,      ///< the bias of delta
  log_decay,  ///< A_log = log U(0.01, 2)
  log_rate,   ///< Hawk's a = 0.5 log U(0.81, 0.998)
};

struct ParameterInfo {
  std::string name;  ///< as in docs/model.md
  Shape shape;
  Initialization initialization = Initialization::normal;
};

/// What a batch looks like to a model: B sequences of n tokens, rows packed.
struct BatchShape {
  std::int64_t sequences = 1;
  std::int64_t length = 0;
  std::int64_t rows() const { return sequences * length; }
};

/// What a model is declared for.
struct ModelOptions {
  const ModelConfig& config;
  const ChunkingStrategy* chunking = nullptr;  ///< of models that chunk; outlives the programs made from the tape
  BatchShape batch;
  DType dtype = DType::float32;  ///< compute type
  bool recompute = false;        ///< run each block's forward ops again in the backward pass instead of keeping their results
};

/// Puts a model on a tape: hands out its parameters and the leaves that describe a batch.
class ModelBuilder : public ModelOptions {
 public:
  ModelBuilder(Tape& on_tape, const ModelOptions& options) : ModelOptions(options), tape(on_tape) {}

  /// A matrix in the compute type, [out, in].
  Value matrix(const std::string& name, std::int64_t out, std::int64_t in);
  /// Vectors and convolution taps, which stay in the accumulator type.
  Value vector(const std::string& name, const Shape& shape, Initialization initialization);

  Value tokens();
  /// q, k [T, heads * head_dim], a `linear_unrounded` (+ addend), turned by the rows' positions and rounded.
  Value rotated(Value x, Value addend, std::int64_t head_dim);
  /// silu(conv(x)) with the taps of that name; x where the model has none.
  Value convolved(Value x, const std::string& taps, Value starts);
  /// Keys that queries of a layer may see, and the rows at which its chunks start.
  ops::AttentionKeys attention_keys(std::int64_t layer);
  Value chunk_starts(std::int64_t layer);
  /// Each token's position in its chunk; of released semantics only.
  Value chunk_labels(std::int64_t layer);

  Tape& tape;

  const std::vector<ParameterInfo>& parameters() const { return parameters_; }

 private:
  Value batch_leaf(const std::string& name);

  std::vector<ParameterInfo> parameters_;
};

/// The residual stream h: what a block adds is kept apart until the next norm, which adds it in the same pass.
class ResidualStream {
 public:
  ResidualStream(ModelBuilder& builder, Value start) : builder_(builder), stream_(start) {}
  /// RMSNorm of everything added so far.
  Value norm(const std::string& weight_name);
  /// h += delta.
  void add(Value delta) { pending_ = delta; }

 private:
  ModelBuilder& builder_;
  Value stream_, pending_;
};

/// w2(silu(w1 x) * w3 x).
Value declare_feed_forward(ModelBuilder& builder, Value x, const std::string& prefix);
/// An SSM but for its last product: its result is state out_proj^T.
struct Ssm {
  Value state;     ///< [T, E], gated and normed
  Value out_proj;  ///< [width, E]
};
/// The selective SSM over input u [T, width]. table: where its state begins (kernels::chunk_scan); with released semantics the
/// labels of tokens that it mixes (kernels::label_scan).
Ssm declare_ssm(ModelBuilder& builder, Value u, std::int64_t width, const std::string& prefix, Value table);

/// Attention of one block: x [T, D], already normed -> what it adds to the residual stream. `prefix` is "layers.3.attention.".
using DeclareAttention = Value (*)(ModelBuilder& builder, Value x, std::int64_t layer, const std::string& prefix);
/// n_layers times h += attention(norm h); h += feed_forward(norm h), each block a recompute segment where asked.
void declare_attention_blocks(ModelBuilder& builder, ResidualStream& stream, DeclareAttention declare_attention);

/// The blocks of one kind of model: from the embedded tokens to the last block's result.
using DeclareBlocks = void (*)(ModelBuilder& builder, ResidualStream& stream);
void declare_attamba(ModelBuilder& builder, ResidualStream& stream);
void declare_transformer(ModelBuilder& builder, ResidualStream& stream);
void declare_mamba(ModelBuilder& builder, ResidualStream& stream);
void declare_mingru(ModelBuilder& builder, ResidualStream& stream);
void declare_hawk(ModelBuilder& builder, ResidualStream& stream);

/// A whole model on a tape.
struct DeclaredModel {
  Value hidden;         ///< [T, D], after the last norm
  Value output_weight;  ///< [V, D]
  std::vector<ParameterInfo> parameters;
};
DeclaredModel declare_model(Tape& tape, const ModelOptions& options);

/// The strategy that a configuration names, for sequences of n tokens; empty for models that do not chunk.
std::unique_ptr<ChunkingStrategy> make_model_chunking(const ModelConfig& config, std::int64_t n);

}  // namespace attamba
