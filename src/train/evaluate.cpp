#include "src/train/evaluate.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "src/core/error.h"

namespace attamba {

double EvaluationResult::perplexity() const {
  return std::exp(loss);
}
double EvaluationResult::word_perplexity() const {
  return std::exp(loss * static_cast<double>(tokens) / words);
}
double EvaluationResult::bits_per_byte() const {
  return loss * static_cast<double>(tokens) / bytes / std::log(2.0);
}

Evaluator::Evaluator(Dataset dataset, BatchShape micro_batch, std::int64_t windows, Communicator& communicator)
    : dataset_(std::move(dataset)), micro_batch_(micro_batch), communicator_(communicator) {
  const auto available = static_cast<std::int64_t>(dataset_.window_count(static_cast<std::uint64_t>(micro_batch.length)));
  require<UsageError>(available > 0, dataset_.folder().string(), ": ", dataset_.token_count(),
                      " tokens are fewer than one window of ", micro_batch.length + 1, "; use a smaller data.sequence_length");
  windows_ = windows == 0 ? available : std::min(windows, available);
}

std::optional<EvaluationResult> Evaluator::run(ModelPrograms& programs, const Hooks& hooks) const {
  const NamedRange range(runtime(programs.device()), "evaluation");
  const auto n = static_cast<std::size_t>(micro_batch_.length), rows = static_cast<std::size_t>(micro_batch_.sequences);
  std::vector<std::int32_t> tokens(rows * (n + 1)), starts(rows * n);
  std::vector<std::int64_t> samples(rows);
  std::int64_t totals[2] = {0, 0};  // fixed-point loss and sums that are not finite: integers add up alike in any order
  const std::int64_t stride = micro_batch_.sequences;
  const std::int64_t per_round = communicator_.size() * stride;
  const bool together = programs.runs_together(ProgramKind::evaluate);
  for (std::int64_t round = 0; round * per_round < windows_; ++round) {
    if (hooks.stop && hooks.stop()) {
      return std::nullopt;
    }
    // A rank that has no window left takes part with the first one, all of it masked, where ranks need each other.
    const std::int64_t own = round * per_round + communicator_.rank() * stride;
    if (own >= windows_ && !together) {
      break;
    }
    const std::int64_t first = own < windows_ ? own : 0;
    const auto used = static_cast<std::size_t>(std::clamp<std::int64_t>(windows_ - own, 0, stride));
    for (std::size_t i = 0; i < rows; ++i) {
      // A last, partial batch repeats its first window; the copies are masked below.
      samples[i] = first + static_cast<std::int64_t>(i < used ? i : 0);
      const std::uint64_t begin = static_cast<std::uint64_t>(samples[i]) * n;
      dataset_.read_tokens(begin, std::span(tokens).subspan(i * (n + 1), n + 1));
      dataset_.fill_document_starts(begin, std::span(starts).subspan(i * n, n));
    }
    if (hooks.computing) {
      hooks.computing();
    }
    programs.inputs().write(tokens, starts, samples, 0, 0, static_cast<std::int64_t>(used));
    const double loss = programs.evaluate();
    if (std::isfinite(loss)) {
      totals[0] += std::llround(loss * kernels::kLossOne);
    } else {
      ++totals[1];
    }
  }
  communicator_.all_reduce_sum({totals, {DType::int64, {2}}});
  EvaluationResult result;
  result.tokens = windows_ * micro_batch_.length;
  result.loss = totals[1] > 0 ? std::numeric_limits<double>::quiet_NaN()
                              : static_cast<double>(totals[0]) / kernels::kLossOne / static_cast<double>(result.tokens);
  const double share = static_cast<double>(result.tokens) / static_cast<double>(dataset_.token_count());
  result.words = share * static_cast<double>(dataset_.text_words());
  result.bytes = share * static_cast<double>(dataset_.text_bytes());
  return result;
}

}  // namespace attamba
