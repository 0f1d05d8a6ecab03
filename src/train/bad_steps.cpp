#include "src/train/bad_steps.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <map>

#include "src/core/error.h"

namespace attamba {

double BadSteps::norm_limit() const {
  if (settings_.spike_factor == 0 || norms_.size() < kEnough) {
    return 0;
  }
  std::vector<double> sorted(norms_.begin(), norms_.end());
  const auto middle = sorted.begin() + static_cast<std::ptrdiff_t>(sorted.size() / 2);
  std::nth_element(sorted.begin(), middle, sorted.end());
  return settings_.spike_factor * *middle;
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

void BadSteps::rolled_back(std::vector<double> norms) {
  norms_.assign(norms.begin(), norms.end());
  skipped_in_a_row_ = 0;
  ++rollbacks_;
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
  std::map<std::int64_t, std::int64_t> count;
  for (const RankNews& rank : news) {
    ++count[rank.fingerprint];
  }
  if (count.size() <= 1) {
    return;
  }
  const auto most =
      std::max_element(count.begin(), count.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
  std::string ranks;
  for (std::size_t r = 0; r < news.size(); ++r) {
    ranks += news[r].fingerprint == most->first ? std::string() : concat(ranks.empty() ? "" : ", ", r);
  }
  throw Error(concat("ranks came to different results of step ", step, ": loss or gradient norm of rank ", ranks,
                     " is not that of ", most->second == 1 ? "the others" : "most ranks",
                     ", bit for bit; its memory or "
                     "processor may be faulty. Run the same command again, without that host if it comes back"));
}

}  // namespace attamba
