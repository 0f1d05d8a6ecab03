#include <array>
#include <utility>

#include "src/core/error.h"
#include "src/models/model.h"

namespace attamba {

namespace {

constexpr std::array kModels{
    std::pair<std::string_view, DeclareBlocks>{"attamba", declare_attamba},
    std::pair<std::string_view, DeclareBlocks>{"transformer", declare_transformer},
};

DeclareBlocks find_blocks(std::string_view kind) {
  for (const auto& [name, declare] : kModels) {
    if (name == kind) {
      return declare;
    }
  }
  std::string known;
  for (const auto& [name, declare] : kModels) {
    known += concat(known.empty() ? "" : ", ", name);
  }
  throw UsageError(concat("model.kind is ", kind, "; this version can train ", known));
}

}  // namespace

DeclaredModel declare_model(Tape& tape, const ModelOptions& options) {
  const ModelConfig& config = options.config;
  const DeclareBlocks declare_blocks = find_blocks(config.kind);
  ModelBuilder builder(tape, options);
  const Value embeddings = builder.matrix("tok_embeddings.weight", config.vocab_size, config.dim);
  ResidualStream stream(builder, ops::embedding(tape, embeddings, builder.tokens()));
  declare_blocks(builder, stream);
  DeclaredModel model;
  model.hidden = stream.norm("norm.weight");
  model.output_weight = config.tie_embeddings ? embeddings : builder.matrix("output.weight", config.vocab_size, config.dim);
  model.parameters = builder.parameters();
  return model;
}

std::unique_ptr<ChunkingStrategy> make_model_chunking(const ModelConfig& config) {
  if (config.kind != "attamba") {
    return nullptr;
  }
  require<UsageError>(config.chunking.strategy != "explicit",
                      "model.chunking.strategy is explicit, so chunk ends must come with the data (as in golden files)");
  return make_chunking(config.chunking.strategy, config.chunking.size);
}

}  // namespace attamba
