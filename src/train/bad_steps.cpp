#include "src/train/bad_steps.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <map>

#include "src/core/error.h"
#include "src/core/median.h"

namespace attamba {

double BadSteps::norm_limit() const {
  if (settings_.spike_factor == 0 || norms_.size() < kEnough) {
    return 0;
  }
  return settings_.spike_factor * median({norms_.begin(), norms_.end()});
}

BadSteps::Verdict BadSteps::judge(const StepResult& result) {
  if (!result.skipped) {
    skipped_in_a_row_ = 0;
    norms_.push_back(result.gradient_norm);
    if (norms_.size() > kWindow) {
      norms_.pop_front();
    }
    return Verdict::good;
  }
  ++skipped_in_a_row_;
  return skipped_in_a_row_ >= settings_.skips_before_rollback ? Verdict::roll_back : Verdict::skipped;
}

void BadSteps::rolled_back(const TrainingState& state) {
  const std::int64_t rollbacks = rollbacks_ + 1;
  restore(state);
  rollbacks_ = rollbacks;
}

void BadSteps::store(TrainingState& state) const {
  state.norms.assign(norms_.begin(), norms_.end());
  state.skipped_in_a_row = skipped_in_a_row_;
  state.rollbacks = rollbacks_;
}

void BadSteps::restore(const TrainingState& state) {
  norms_.assign(state.norms.begin(), state.norms.end());
  skipped_in_a_row_ = state.skipped_in_a_row;
  rollbacks_ = state.rollbacks;
}

std::string_view describe_bad(const StepResult& result) {
  return std::isfinite(result.gradient_norm) ? "a spike" : "not finite";
}

std::int64_t fingerprint(const StepResult& result) {
  // There are many NaNs, and which one comes out may differ between machines; they mean the same.
  const auto bits = [](double x) {
    return std::bit_cast<std::uint64_t>(std::isnan(x) ? std::numeric_limits<double>::quiet_NaN() : x);
  };
  std::uint64_t hash = bits(result.loss) * 0x9e3779b97f4a7c15u;
  hash = std::rotl(hash ^ bits(result.gradient_norm), 29) * 0xbf58476d1ce4e5b9u;
  return static_cast<std::int64_t>((hash ^ (result.skipped ? 2 : 0)) | 1);
}

void require_agreement(std::span<const RankNews> news, std::int64_t step) {
  std::map<std::int64_t, std::vector<std::size_t>> groups;  // by what they came to
  for (std::size_t rank = 0; rank < news.size(); ++rank) {
    groups[news[rank].fingerprint].push_back(rank);
  }
  if (groups.size() <= 1) {
    return;
  }
  std::size_t largest = 0;
  for (const auto& [fingerprint, ranks] : groups) {
    largest = std::max(largest, ranks.size());
  }
  const bool told_apart = 2 * largest > news.size();  // most ranks agree, so the others are wrong
  std::string text;
  for (const auto& [fingerprint, ranks] : groups) {
    if (told_apart && ranks.size() == largest) {
      continue;
    }
    text += text.empty() ? "" : told_apart ? ", " : " and of rank ";
    for (std::size_t i = 0; i < ranks.size(); ++i) {
      text += concat(i == 0 ? "" : ", ", ranks[i]);
    }
  }
  throw Error(concat(
      "ranks came to different results of step ", step, ": loss or gradient norm of rank ", text,
      told_apart ? " is not that of most ranks, bit for bit" : " differ bit for bit, and it cannot be told which is right",
      "; a host's memory or processor may be faulty. Run the same command again, ",
      told_apart ? "without that host if it comes back" : "on other hosts if it comes back"));
}

}  // namespace attamba
