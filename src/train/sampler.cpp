#include "src/train/sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "src/core/error.h"
#include "src/core/random.h"

namespace attamba {

namespace {

/// Of logits of any device; no other row leaves it.
std::vector<double> row_of(const Tensor& logits, std::int64_t row) {
  const std::int64_t columns = logits.shape().columns();
  return values_on_host(part_of(logits, {logits.dtype(), {columns}}, row * columns));
}

}  // namespace

std::int32_t draw_token(std::span<const double> logits, const SamplingOptions& options, double uniform) {
  std::vector<std::int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  const auto likelier = [&](std::int32_t a, std::int32_t b) {
    return logits[static_cast<std::size_t>(a)] > logits[static_cast<std::size_t>(b)];
  };
  if (options.temperature <= 0) {
    return *std::min_element(order.begin(), order.end(), likelier);
  }
  if (options.top_k > 0 && options.top_k < static_cast<std::int64_t>(order.size())) {
    std::nth_element(order.begin(), order.begin() + options.top_k, order.end(), likelier);
    order.resize(static_cast<std::size_t>(options.top_k));
  }
  const std::int32_t best = *std::min_element(order.begin(), order.end(), likelier);
  std::vector<double> weights;
  for (const std::int32_t token : order) {
    const double difference = logits[static_cast<std::size_t>(token)] - logits[static_cast<std::size_t>(best)];
    weights.push_back(std::exp(difference / options.temperature));
  }
  double left = uniform * std::accumulate(weights.begin(), weights.end(), 0.0);
  for (std::size_t i = 0; i < order.size(); ++i) {
    left -= weights[i];
    if (left <= 0) {
      return order[i];
    }
  }
  return best;  // only by rounding
}

void sample(ModelPrograms& programs, std::int64_t n, std::span<const std::int32_t> prompt, const SamplingOptions& options,
            const std::function<void(std::int32_t)>& emit) {
  require<UsageError>(!prompt.empty(), "generate: the prompt has no tokens");
  std::vector<std::int32_t> text(prompt.begin(), prompt.end());
  std::vector<std::int32_t> window(static_cast<std::size_t>(n + 1));
  RandomStream random(options.seed);
  for (std::int64_t i = 0; i < options.tokens; ++i) {
    // What follows the text in the window is never seen by it: attention, scan and chunks look back only. The window keeps one
    // free place, because position n - 1 always ends a chunk.
    const auto used = std::min<std::int64_t>(static_cast<std::int64_t>(text.size()), n - 1);
    std::fill(window.begin(), window.end(), 0);
    std::copy(text.end() - used, text.end(), window.begin());
    programs.inputs().write(window, {}, {}, options.seed, 0);
    const std::int32_t token = draw_token(row_of(programs.logits(), used - 1), options, random.uniform());
    if (token == options.stop_token) {
      return;
    }
    text.push_back(token);
    emit(token);
  }
}

}  // namespace attamba
