// The smallest models that still have every part, for tests of models and of what runs them.
#pragma once

#include <string>
#include <vector>

#include "src/core/error.h"
#include "src/models/model_config.h"

namespace attamba::testing_support {

/// Values that suit every kind; each reads its own.
inline ModelConfig tiny_config(const std::string& kind) {
  ModelConfig c;
  c.kind = kind;
  c.vocab_size = 29;
  c.dim = 16;
  c.n_layers = 2;
  c.n_heads = 2;
  c.ffn_dim = 12;
  c.ssm.hidden = 8;
  c.ssm.state = 3;
  c.ssm.heads = 2;
  c.chunking.size = 4;
  c.chunking.leading_tokens = 3;
  c.hidden = 12;
  return c;
}

/// Kinds that the registry of models can declare.
inline std::vector<std::string> trainable_kinds() {
  std::vector<std::string> all;
  for (const std::string_view kind : model_kinds()) {
    try {
      require_trainable(tiny_config(std::string(kind)));
      all.emplace_back(kind);
    } catch (const UsageError&) {  // described, but not in the registry
    }
  }
  return all;
}

}  // namespace attamba::testing_support
