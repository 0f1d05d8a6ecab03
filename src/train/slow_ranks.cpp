#include "src/train/slow_ranks.h"

#include <algorithm>
#include <functional>
#include <utility>

#include "src/core/median.h"

namespace attamba {

namespace {

double median_of(const std::deque<double>& values) {
  return median({values.begin(), values.end()});
}

}  // namespace

std::vector<SlowRanks::Slow> SlowRanks::observe(std::span<const double> seconds, double step) {
  gathered_.resize(seconds.size());
  std::transform(seconds.begin(), seconds.end(), gathered_.begin(), gathered_.begin(), std::plus<>());
  gathered_time_ += step;
  if (gathered_time_ < kShortest) {
    return {};
  }
  gathered_time_ = 0;
  return judge(std::exchange(gathered_, {}));
}

std::vector<SlowRanks::Slow> SlowRanks::judge(std::span<const double> seconds) {
  std::vector<Slow> found;
  ranks_.resize(seconds.size());
  for (std::size_t rank = 0; rank < seconds.size(); ++rank) {
    std::vector<double> others;
    for (std::size_t other = 0; other < seconds.size(); ++other) {
      if (other != rank && seconds[other] > 0) {
        others.push_back(seconds[other]);
      }
    }
    if (seconds[rank] == 0 || others.empty()) {
      continue;
    }
    History& history = ranks_[rank];
    history.ratios.push_back(seconds[rank] / median(std::move(others)));
    history.seconds.push_back(seconds[rank]);
    if (history.ratios.size() > kWindow) {
      history.ratios.pop_front();
      history.seconds.pop_front();
    }
    if (history.ratios.size() < kWindow) {
      continue;
    }
    const double ratio = median_of(history.ratios);
    if (ratio > kRatio && !history.named) {
      history.named = true;
      const double own = median_of(history.seconds);
      found.push_back({.rank = static_cast<int>(rank), .ratio = ratio, .seconds = own, .others = own / ratio});
    } else if (ratio < (1 + kRatio) / 2) {
      history.named = false;
    }
  }
  return found;
}

}  // namespace attamba
