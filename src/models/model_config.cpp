#include "src/models/model_config.h"

#include <cmath>

#include "kernels/causal_conv_checks.h"
#include "src/core/names.h"

namespace attamba {

namespace {

// Wider than any model that fits a machine, narrow enough that no product of three extents overflows 64 bits.
constexpr std::int64_t kLargestExtent = std::int64_t{1} << 20;
constexpr std::int64_t kLargestVocabulary = (std::int64_t{1} << 31) - 1;  // token ids are int32

/// "model.dim = 500: must be ...", the shape of every message here.
template <class Value, class... Advice>
void check(bool holds, std::string_view key, const Value& value, const Advice&... advice) {
  require<UsageError>(holds, "model.", key, " = ", value, ": ", advice...);
}

void check_extent(std::string_view key, std::int64_t value, std::int64_t least = 1, std::int64_t most = kLargestExtent) {
  check(value >= least, key, value, "must be at least ", least);
  check(value <= most, key, value, "must be at most ", most);
}

/// "try 496 or 512": the multiples of `divisor` around `value`.
std::string try_multiples(std::int64_t value, std::int64_t divisor) {
  const std::int64_t below = value / divisor * divisor;
  return below == 0 ? concat("try ", divisor) : concat("try ", below, " or ", below + divisor);
}

void check_ssm(const SsmConfig& ssm) {
  check_extent("ssm.hidden", ssm.hidden);
  check_extent("ssm.state", ssm.state);
  check_extent("ssm.heads", ssm.heads);
  check_extent("ssm.groups", ssm.groups);
  check_extent("ssm.conv", ssm.conv, 0);
  check(ssm.hidden % ssm.heads == 0, "ssm.hidden", ssm.hidden, "must be a multiple of model.ssm.heads = ", ssm.heads, "; ",
        try_multiples(ssm.hidden, ssm.heads));
  check(ssm.heads % ssm.groups == 0, "ssm.groups", ssm.groups, "must divide model.ssm.heads = ", ssm.heads,
        "; use 1 for one B and C shared by all heads, or ", ssm.heads, " for one per head");
}

void check_chunking(const ChunkingConfig& chunking) {
  check(chunking.strategy != "fattn" && chunking.strategy != "fssm", "chunking.strategy", chunking.strategy,
        "choosing chunk ends by attention is not implemented; use cyclic, the paper's default, or another of model.chunking's");
  require_known("model.chunking.strategy", chunking.strategy, chunking_strategies());
  check(chunking.ends_file.empty() || chunking.strategy == "explicit", "chunking.ends_file", chunking.ends_file,
        "only model.chunking.strategy = \"explicit\" reads it, but that is \"", chunking.strategy, "\"; change one of them");
  check(chunking.size >= 1, "chunking.size", chunking.size,
        "a chunk holds at least one token; use 1 to attend to every token in full, 8 for the paper's model");
  check(chunking.leading_tokens >= 0, "chunking.leading_tokens", chunking.leading_tokens,
        "must not be negative; use 0 for the tokens of the query's own chunk, or L >= 1 for the last L tokens");
}

void check_heads_of_attamba(const ModelConfig& c) {
  check_extent("n_kv_heads", c.n_kv_heads, 0);
  check_extent("head_dim", c.head_dim, 0);
  check(c.head_dim != 0 || c.dim % c.n_heads == 0, "dim", c.dim, "must be a multiple of model.n_heads = ", c.n_heads,
        " when model.head_dim is 0; ", try_multiples(c.dim, c.n_heads), ", or set model.head_dim");
  check(c.head_width() % 2 == 0, "head_dim", c.head_width(),
        "must be even, because rotary embedding turns pairs of channels; change it, or model.dim or model.n_heads, from which "
        "it derives when 0");
  check(c.n_heads % c.kv_heads() == 0, "n_kv_heads", c.n_kv_heads, "must divide model.n_heads = ", c.n_heads,
        "; use 0 for one key/value head per query head");
  check(c.kv_proj || c.kv_width() == c.dim, "n_kv_heads", c.kv_heads(), "times head_dim ", c.head_width(), " is ", c.kv_width(),
        ", but without model.kv_proj keys are as wide as model.dim = ", c.dim,
        "; set model.kv_proj = true, or choose n_kv_heads * head_dim = dim");
}

void check_heads_of_transformer(const ModelConfig& c) {
  check_extent("attn_dim", c.attn_dim, 0);
  const std::int64_t width = c.attention_width();
  const std::string_view key = c.attn_dim == 0 ? "dim" : "attn_dim";
  check(width % c.n_heads == 0, key, width, "must be a multiple of model.n_heads = ", c.n_heads, "; ",
        try_multiples(width, c.n_heads));
  check(c.head_width() % 2 == 0, key, width, "gives heads of ", c.head_width(),
        " channels, but rotary embedding needs an even number; ", try_multiples(width, 2 * c.n_heads));
  check(c.n_kv_heads == 0 || c.n_kv_heads == c.n_heads, "n_kv_heads", c.n_kv_heads,
        "the transformer has as many key/value heads as query heads; use 0, and model.attn_dim for a smaller KV cache");
  check(c.sliding_window >= 0, "sliding_window", c.sliding_window, "must not be negative; use 0 to attend to every token");
}

void check_released(const ModelConfig& c) {
  check(c.kind == "attamba", "semantics", "\"released\"",
        "only model.kind = \"attamba\" differs from the paper; use \"paper\"");
  check(
      c.chunking.strategy != "random", "semantics", "\"released\"",
      "what the released code does with random chunk ends is not known; use model.chunking.strategy = \"cyclic\", \"uniform\", "
      "\"none\" or \"explicit\", or \"paper\"");
  check(!c.document_mask, "document_mask", "true",
        "the released code knows no documents, its states pass from row to row; use model.semantics = \"paper\"");
}

void check_kind(const ModelConfig& c) {
  if (c.has_attention()) {
    check(std::isfinite(c.rope_theta) && c.rope_theta > 1, "rope_theta", c.rope_theta,
          "must be a number above 1; the paper uses 10000");
  }
  if (c.kind == "attamba") {
    check_heads_of_attamba(c);
    check_ssm(c.ssm);
    check_chunking(c.chunking);
  } else if (c.kind == "transformer") {
    check_heads_of_transformer(c);
  } else if (c.kind == "mamba") {
    check_ssm(c.ssm);
  } else {
    check(c.hidden >= 1, "hidden", c.hidden, "a ", c.kind, " needs its inner width; the paper uses ",
          c.kind == "hawk" ? 768 : 1280);
    check_extent("hidden", c.hidden);
    check(c.conv >= 0 && c.conv <= kernels::kMostConvTaps, "conv", c.conv, "0 (none) to ", kernels::kMostConvTaps,
          " taps are possible; the paper uses 4");
    check(c.kind != "hawk" || c.hidden % c.n_heads == 0, "hidden", c.hidden,
          "must be a multiple of model.n_heads = ", c.n_heads, "; ", try_multiples(c.hidden, c.n_heads));
  }
}

/// Parameters of one SSM whose input and output are `width` wide.
std::int64_t ssm_parameters(const SsmConfig& s, std::int64_t width) {
  const std::int64_t convolved = s.hidden + 2 * s.groups * s.state;
  const std::int64_t in_proj = (s.hidden + convolved + s.heads) * width;
  const std::int64_t per_head = s.heads * (s.dt_bias ? 3 : 2);  // A_log, D and dt_bias
  return in_proj + convolved * s.conv + per_head + s.hidden + width * s.hidden;
}

/// Parameters of the part of one block that mixes tokens, without its norm.
std::int64_t mixer_parameters(const ModelConfig& c) {
  const std::int64_t dim = c.dim, hidden = c.hidden;
  if (c.kind == "attamba") {
    const std::int64_t projections = c.kv_proj ? 2 * c.kv_width() * dim : 0;
    return 2 * c.attention_width() * dim + projections + 2 * ssm_parameters(c.ssm, c.kv_proj ? c.kv_width() : dim);
  }
  if (c.kind == "transformer") {
    return 4 * c.attention_width() * dim;
  }
  if (c.kind == "mamba") {
    return ssm_parameters(c.ssm, dim);
  }
  if (c.kind == "mingru") {
    return 4 * hidden * dim + hidden * c.conv;
  }
  return 3 * hidden * dim + 2 * hidden * hidden + hidden / c.n_heads + hidden * c.conv;  // hawk
}

}  // namespace

const std::vector<std::string_view>& model_kinds() {
  static const std::vector<std::string_view> kKinds = {"attamba", "transformer", "mamba", "mingru", "hawk"};
  return kKinds;
}

std::int64_t ModelConfig::attention_width() const {
  if (kind == "transformer") {
    return attn_dim == 0 ? dim : attn_dim;
  }
  return n_heads * head_width();
}

std::int64_t ModelConfig::head_width() const {
  if (kind == "transformer") {
    return attention_width() / n_heads;
  }
  return head_dim == 0 ? dim / n_heads : head_dim;
}

void validate(const ModelConfig& config) {
  require_known("model.kind", config.kind, model_kinds());
  require_known("model.semantics", config.semantics, {"paper", "released"});
  check_extent("vocab_size", config.vocab_size, 2, kLargestVocabulary);
  check_extent("dim", config.dim);
  check_extent("n_layers", config.n_layers, 1, 65536);
  check_extent("n_heads", config.n_heads);
  check(std::isfinite(config.norm_eps) && config.norm_eps > 0, "norm_eps", config.norm_eps,
        "must be a positive number; the paper uses 1e-5");
  if (config.has_feed_forward()) {
    check_extent("ffn_dim", config.ffn_dim);
  }
  check_kind(config);
  if (config.released()) {
    check_released(config);
  }
  require_trainable(config);
}

void validate(const ModelConfig& config, std::int64_t sequence_length) {
  validate(config);
  require<UsageError>(sequence_length >= 1, "data.sequence_length = ", sequence_length,
                      ": must be at least 1; the paper uses 1024");
  if (config.kind == "attamba") {
    check(config.chunking.strategy != "explicit" || !config.chunking.ends_file.empty(), "chunking.strategy", "\"explicit\"",
          "name the file that lists the chunk ends in model.chunking.ends_file");
    check(config.chunking.strategy != "explicit" || !config.document_mask, "document_mask", "true",
          "explicit chunk ends are those of whole sequences, not of documents; set one of them otherwise");
    check(config.chunking.leading_tokens <= sequence_length, "chunking.leading_tokens", config.chunking.leading_tokens,
          "more than a sequence holds (data.sequence_length = ", sequence_length, "); use at most ", sequence_length,
          ", or model.chunking.strategy = \"none\" for full attention");
  }
}

std::int64_t parameter_count(const ModelConfig& config) {
  std::int64_t block = config.dim + mixer_parameters(config);
  if (config.has_feed_forward()) {
    block += config.dim + 3 * config.ffn_dim * config.dim;
  }
  const std::int64_t vocabulary = config.vocab_size * config.dim * (config.tie_embeddings ? 1 : 2);
  return vocabulary + config.dim + config.n_layers * block;
}

}  // namespace attamba
