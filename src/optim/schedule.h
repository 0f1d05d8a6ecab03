// Learning rate as a function of the optimizer step (docs/model.md).
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace attamba {

struct ScheduleSettings {
  std::string name = "cosine";
  double peak = 3e-3;
  std::int64_t warmup = 5000;  ///< steps of linear warm-up; step 0 has rate 0
  std::int64_t steps = 60000;  ///< steps of the whole run
  double min_ratio = 1e-6;     ///< last rate as a fraction m of the peak
  double decay = 0.2;          ///< wsd: the last fraction of the steps, in which the rate falls linearly to m
};

/// The rate at step i, counted from 0. During the warm-up peak * i / warmup; then, with s the progress after it:
///   cosine m + (1-m)(1+cos(pi s))/2 · linear m + (1-m)(1-s) · constant 1 · inverse_sqrt sqrt(warmup / i), not below m
///   wsd 1, then linear to m over the last `decay` of the run. Throws UsageError for other names.
double learning_rate(const ScheduleSettings& settings, std::int64_t step);

/// Every name that `learning_rate` knows.
const std::vector<std::string_view>& schedule_names();

}  // namespace attamba
