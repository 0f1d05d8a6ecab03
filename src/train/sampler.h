// Drawing text from a trained model.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "src/train/programs.h"

namespace attamba {

struct SamplingOptions {
  std::int64_t tokens = 128;  ///< to draw
  double temperature = 0.8;   ///< 0: always the likeliest
  std::int64_t top_k = 50;    ///< draw among the k likeliest; 0: all
  std::uint64_t seed = 0;
  std::int32_t stop_token = -1;  ///< ends the text; -1: none
};

/// Continues `prompt` (at least one token). Calls `emit` with each token drawn. `programs` were built with logits for one
/// sequence of n tokens; a longer text is continued from its last n - 1 tokens.
void sample(ModelPrograms& programs, std::int64_t n, std::span<const std::int32_t> prompt, const SamplingOptions& options,
            const std::function<void(std::int32_t)>& emit);

/// Draws from softmax(logits / temperature) over the top k; `uniform` in (0, 1).
std::int32_t draw_token(std::span<const double> logits, const SamplingOptions& options, double uniform);

}  // namespace attamba
