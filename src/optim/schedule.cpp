#include "src/optim/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "src/core/names.h"

namespace attamba {
namespace {

/// Progress after the warm-up, 0 to 1.
double progress(const ScheduleSettings& s, std::int64_t step) {
  const auto length = static_cast<double>(std::max<std::int64_t>(s.steps - s.warmup, 1));
  return std::min(1.0, static_cast<double>(step - s.warmup) / length);
}

double cosine(const ScheduleSettings& s, std::int64_t step) {
  return s.min_ratio + (1 - s.min_ratio) * (1 + std::cos(std::numbers::pi * progress(s, step))) / 2;
}

double linear(const ScheduleSettings& s, std::int64_t step) {
  return s.min_ratio + (1 - s.min_ratio) * (1 - progress(s, step));
}

double constant(const ScheduleSettings&, std::int64_t) {
  return 1;
}

double inverse_sqrt(const ScheduleSettings& s, std::int64_t step) {
  const auto reference = static_cast<double>(std::max<std::int64_t>(s.warmup, 1));
  return std::max(s.min_ratio, std::sqrt(reference / std::max(reference, static_cast<double>(step))));
}

double warmup_stable_decay(const ScheduleSettings& s, std::int64_t step) {
  const double length = s.decay * static_cast<double>(s.steps);
  const double left = std::max(0.0, static_cast<double>(s.steps - step));
  return left >= length ? 1 : s.min_ratio + (1 - s.min_ratio) * left / length;
}

using Factor = double (*)(const ScheduleSettings&, std::int64_t);
constexpr std::array kSchedules{
    std::pair<std::string_view, Factor>{"cosine", cosine},
    std::pair<std::string_view, Factor>{"constant", constant},
    std::pair<std::string_view, Factor>{"linear", linear},
    std::pair<std::string_view, Factor>{"wsd", warmup_stable_decay},
    std::pair<std::string_view, Factor>{"inverse_sqrt", inverse_sqrt},
};

}  // namespace

double learning_rate(const ScheduleSettings& settings, std::int64_t step) {
  const Factor factor = require_entry("optim.schedule", kSchedules, settings.name);
  if (step < settings.warmup) {
    return settings.peak * static_cast<double>(step) / static_cast<double>(settings.warmup);
  }
  return settings.peak * factor(settings, step);
}

const std::vector<std::string_view>& schedule_names() {
  static const std::vector<std::string_view> kNames = names_of(kSchedules);
  return kNames;
}

}  // namespace attamba
