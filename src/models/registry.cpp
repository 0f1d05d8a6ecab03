#include "src/core/names.h"
#include "src/models/model.h"

namespace attamba {

namespace {

constexpr std::array kModels{
    std::pair<std::string_view, DeclareBlocks>{"attamba", declare_attamba},
    std::pair<std::string_view, DeclareBlocks>{"transformer", declare_transformer},
    std::pair<std::string_view, DeclareBlocks>{"mamba", declare_mamba},
    std::pair<std::string_view, DeclareBlocks>{"mingru", declare_mingru},
    std::pair<std::string_view, DeclareBlocks>{"hawk", declare_hawk},
};

}  // namespace

void require_trainable(const ModelConfig& config) {
  std::string trainable;
  for (const std::string_view kind : names_of(kModels)) {
    trainable += concat(trainable.empty() ? "" : ", ", kind);
  }
  require<UsageError>(find_entry(kModels, config.kind) != nullptr, "model.kind = \"", config.kind,
                      "\": this version can train ", trainable);
}

DeclaredModel declare_model(Tape& tape, const ModelOptions& options) {
  const ModelConfig& config = options.config;
  require_trainable(config);
  ModelBuilder builder(tape, options);
  const Value embeddings = builder.matrix("tok_embeddings.weight", config.vocab_size, config.dim);
  ResidualStream stream(builder, ops::embedding(tape, embeddings, builder.tokens()));
  require_entry("model.kind", kModels, config.kind)(builder, stream);
  DeclaredModel model;
  model.hidden = stream.norm("norm.weight");
  model.output_weight = config.tie_embeddings ? embeddings : builder.matrix("output.weight", config.vocab_size, config.dim);
  model.parameters = builder.parameters();
  return model;
}

std::unique_ptr<ChunkingStrategy> make_model_chunking(const ModelConfig& config, std::int64_t n) {
  if (config.kind != "attamba") {
    return nullptr;
  }
  if (config.chunking.strategy == "explicit") {
    return read_explicit_chunking(config.chunking.ends_file, config.n_layers, n);
  }
  return config.released() ? make_released_chunking(config.chunking.strategy, config.chunking.size, config.n_layers)
                           : make_chunking(config.chunking.strategy, config.chunking.size);
}

}  // namespace attamba
