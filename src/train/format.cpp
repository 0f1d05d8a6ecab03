// Numbers as people read them.
#include <array>
#include <cmath>
#include <cstdio>

#include "src/core/error.h"
#include "src/train/metrics.h"

namespace attamba {
namespace {

std::string fixed(double value, int decimals) {
  std::array<char, 64> text{};
  std::snprintf(text.data(), text.size(), "%.*f", decimals, value);
  std::string result = text.data();
  if (decimals > 0) {
    result.erase(result.find_last_not_of('0') + 1);
    if (result.back() == '.') {
      result.pop_back();
    }
  }
  return result;
}

struct Scaled {
  double value;
  std::string_view prefix;
};

/// The prefix under which `value`, rounded to `relative`, lies in [1, 1000).
Scaled scale(double value, double relative) {
  constexpr std::array<std::string_view, 7> kPrefixes = {"", "k", "M", "G", "T", "P", "E"};
  std::size_t prefix = 0;
  while (std::abs(value) * (1 + relative) >= 1000 && prefix + 1 < kPrefixes.size()) {
    value /= 1000;
    ++prefix;
  }
  return {value, kPrefixes[prefix]};
}

}  // namespace

std::string format_duration(double seconds) {
  if (!std::isfinite(seconds) || seconds < 0) {
    return "?";
  }
  if (seconds < 0.9995) {
    return concat(fixed(seconds * 1e3, seconds < 0.01 ? 1 : 0), " ms");
  }
  if (seconds < 9.95) {
    return concat(fixed(seconds, 1), " s");
  }
  const auto whole = static_cast<std::int64_t>(std::llround(seconds));
  constexpr std::int64_t kMinute = 60, kHour = 60 * kMinute, kDay = 24 * kHour;
  const auto two = [whole](std::int64_t large, const char* large_name, std::int64_t small, const char* small_name) {
    const std::int64_t rest = whole % large / small;
    const std::string head = concat(whole / large, " ", large_name);
    return rest == 0 ? head : concat(head, " ", rest, " ", small_name);
  };
  if (whole < kMinute) {
    return concat(whole, " s");
  }
  if (whole < kHour) {
    return two(kMinute, "min", 1, "s");
  }
  return whole < kDay ? two(kHour, "h", kMinute, "min") : two(kDay, "d", kHour, "h");
}

std::string format_count(double value) {
  const Scaled scaled = scale(value, 5e-6);
  const std::string digits = fixed(scaled.value, 2);
  return scaled.prefix.empty() ? digits : concat(digits, " ", scaled.prefix);
}

std::string format_quantity(double value, std::string_view unit) {
  const Scaled scaled = scale(value, 5e-4);
  const double size = std::abs(scaled.value);
  return concat(fixed(scaled.value, size < 9.995 ? 2 : size < 99.95 ? 1 : 0), " ", scaled.prefix, unit);
}

std::string format_integer(std::int64_t value) {
  std::string digits = std::to_string(value);
  const std::size_t first = value < 0 ? 1 : 0;
  for (std::size_t end = digits.size(); end > first + 3; end -= 3) {
    digits.insert(end - 3, 1, ',');
  }
  return digits;
}

}  // namespace attamba
