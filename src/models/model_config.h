// The shape of a model: the keys of a configuration's [model], with the published 62M Attamba as the default.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "src/chunking/chunking.h"
#include "src/core/field.h"

namespace attamba {

/// The selective SSM (docs/model.md). E = hidden, N = state, Hs = heads, G = groups, W = conv.
struct SsmConfig {
  std::int64_t hidden = 256;
  std::int64_t state = 32;
  std::int64_t heads = 8;
  std::int64_t groups = 1;
  std::int64_t conv = 4;
  bool dt_bias = false;
  bool residual = true;

  friend bool operator==(const SsmConfig&, const SsmConfig&) = default;

  template <class Self, class Visitor>
  static void describe(Self& self, Visitor&& visit) {
    visit.field("hidden", self.hidden, Field{"inner width E of the SSM"});
    visit.field("state", self.state, Field{"state size N per channel"});
    visit.field("heads", self.heads, Field{"SSM heads Hs, each with its own decay; divides hidden"});
    visit.field("groups", self.groups, Field{"groups G sharing the input and output vectors B and C; divides heads"});
    visit.field("conv", self.conv, Field{"taps W of the causal convolution before the scan; 0 = none", "tokens"});
    visit.field("dt_bias", self.dt_bias, Field{"add a learned bias to the step size before its softplus"});
    visit.field("residual", self.residual, Field{"add the SSM's input to its output (eq. 3); false = the NoRes ablation"});
  }
};

/// Where chunks end and how many recent tokens stay visible one by one (docs/model.md).
struct ChunkingConfig {
  std::string strategy = "cyclic";
  std::int64_t size = 8;             ///< P
  std::int64_t leading_tokens = 16;  ///< L; 0 = the query's own chunk
  std::string ends_file = "";        ///< explicit; read by `make_model_chunking`

  friend bool operator==(const ChunkingConfig&, const ChunkingConfig&) = default;

  template <class Self, class Visitor>
  static void describe(Self& self, Visitor&& visit);
};

/// One struct for every kind of model; `kind` says which of the members count. Zeros that mean "derive it" are resolved by the
/// functions below, never by the reader of a member.
struct ModelConfig {
  std::string kind = "attamba";
  std::int64_t vocab_size = 32000;  ///< V
  std::int64_t dim = 512;           ///< D
  std::int64_t n_layers = 8;
  std::int64_t n_heads = 8;     ///< H
  std::int64_t n_kv_heads = 0;  ///< Hk; 0 = n_heads. Read it with `kv_heads()`.
  std::int64_t head_dim = 0;    ///< d; 0 = dim / n_heads (transformer: attn_dim / n_heads). Read it with `head_width()`.
  std::int64_t ffn_dim = 1536;  ///< F
  double norm_eps = 1e-5;
  double rope_theta = 10000.0;
  bool tie_embeddings = false;
  bool kv_proj = false;             ///< attamba
  SsmConfig ssm;                    ///< attamba, mamba
  ChunkingConfig chunking;          ///< attamba
  std::int64_t attn_dim = 0;        ///< transformer: A; 0 = dim. Read it with `attention_width()`.
  std::int64_t sliding_window = 0;  ///< transformer: keys a query sees, its own among them; 0 = all
  std::int64_t hidden = 0;          ///< mingru, hawk: E
  std::int64_t conv = 4;            ///< mingru, hawk: W; 0 = none
  std::string semantics = "paper";
  bool document_mask = false;

  friend bool operator==(const ModelConfig&, const ModelConfig&) = default;

  /// Whether the released code's deviations from the paper are wanted (docs/model.md).
  bool released() const { return semantics == "released"; }
  bool has_attention() const { return kind == "attamba" || kind == "transformer"; }
  bool has_feed_forward() const { return has_attention() || kind == "hawk"; }
  /// Hk: heads of keys and values.
  std::int64_t kv_heads() const { return n_kv_heads == 0 ? n_heads : n_kv_heads; }
  /// Width of all query heads together: H d; the transformer's A.
  std::int64_t attention_width() const;
  /// d: width of one head.
  std::int64_t head_width() const;
  /// Hk d: width of the keys, and of the values.
  std::int64_t kv_width() const { return kv_heads() * head_width(); }

  template <class Self, class Visitor>
  static void describe(Self& self, Visitor&& visit);
};

/// Throws a UsageError unless models of this kind can be declared (their registry knows).
void require_trainable(const ModelConfig& config);

/// Throws a UsageError that names the key, its value and the way out when no such model can exist, or can be trained here.
void validate(const ModelConfig& config);
/// The same, for sequences of n tokens.
void validate(const ModelConfig& config, std::int64_t sequence_length);

/// The number of trained parameters (docs/model.md), of a valid configuration.
std::int64_t parameter_count(const ModelConfig& config);

/// The kinds of models that a configuration may describe.
const std::vector<std::string_view>& model_kinds();

template <class Self, class Visitor>
void ChunkingConfig::describe(Self& self, Visitor&& visit) {
  visit.field("strategy", self.strategy,
              Field{"where chunks end; none = attention over every token", "", chunking_strategies()});
  visit.field("size", self.size, Field{"chunk size P", "tokens"});
  visit.field("leading_tokens", self.leading_tokens,
              Field{"recent tokens L attended one by one, the query's own among them; 0 = those of its chunk", "tokens"});
  visit.field("ends_file", self.ends_file,
              Field{"explicit: text file of chunk ends, one line for all layers or one line per layer"});
}

template <class Self, class Visitor>
void ModelConfig::describe(Self& self, Visitor&& visit) {
  visit.field("kind", self.kind, Field{"which architecture", "", model_kinds()});
  visit.field("vocab_size", self.vocab_size, Field{"vocabulary V", "tokens"});
  visit.field("dim", self.dim, Field{"model width D"});
  visit.field("n_layers", self.n_layers, Field{"number of blocks"});
  visit.field("n_heads", self.n_heads, Field{"query heads H (hawk: heads that share a decay vector)"});
  visit.field("n_kv_heads", self.n_kv_heads, Field{"key/value heads Hk, a divisor of n_heads; 0 = n_heads"});
  visit.field("head_dim", self.head_dim, Field{"width d of a head, even; 0 = dim / n_heads (transformer: attn_dim / n_heads)"});
  visit.field("ffn_dim", self.ffn_dim, Field{"inner width F of the feed-forward"});
  visit.field("norm_eps", self.norm_eps, Field{"epsilon of the RMS norms"});
  visit.field("rope_theta", self.rope_theta, Field{"base of the rotary position embedding"});
  visit.field("tie_embeddings", self.tie_embeddings, Field{"use the embedding matrix as the output matrix"});
  visit.field("kv_proj", self.kv_proj, Field{"attamba: project to keys and values before the SSMs"});
  visit.section("ssm", self.ssm, "selective SSM (attamba: one each for keys and values; mamba: the block itself)");
  visit.section("chunking", self.chunking, "attamba: chunk boundaries");
  visit.field("attn_dim", self.attn_dim,
              Field{"transformer: attention width A (smaller than dim = smaller KV cache); 0 = dim"});
  visit.field("sliding_window", self.sliding_window, Field{"transformer: keys each query sees; 0 = all", "tokens"});
  visit.field("hidden", self.hidden, Field{"mingru, hawk: inner width E"});
  visit.field("conv", self.conv, Field{"mingru, hawk: taps of the causal convolution; 0 = none", "tokens"});
  visit.field("semantics", self.semantics,
              Field{"paper, or the released code's deviations from it", "", {"paper", "released"}});
  visit.field("document_mask", self.document_mask, Field{"chunks, states, positions and attention restart at each document"});
}

}  // namespace attamba
