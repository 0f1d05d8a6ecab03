// What a curve needs before it is drawn: scales, smoothing, text that XML accepts.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "src/train/plot.h"

namespace attamba {
namespace {

/// Bytes of the UTF-8 character that `text` begins with, 0 if none does that XML allows.
std::size_t character_bytes(std::string_view text) {
  const auto byte = [text](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char first = byte(0);
  if (first < 0x80) {
    return first >= 0x20 || first == '\t' || first == '\n' ? 1 : 0;
  }
  const std::size_t length = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : 2;
  if (first < 0xc2 || first > 0xf4 || text.size() < length) {
    return 0;
  }
  std::uint32_t code = first & (0xffu >> (length + 1));
  for (std::size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xc0) != 0x80) {
      return 0;
    }
    code = (code << 6) | (byte(i) & 0x3fu);
  }
  const bool overlong = (length == 3 && code < 0x800) || (length == 4 && code < 0x10000);
  const bool allowed = code <= 0x10ffff && (code < 0xd800 || code > 0xdfff) && code != 0xfffe && code != 0xffff;
  return !overlong && allowed ? length : 0;
}

}  // namespace

std::string escape_xml(std::string_view text) {
  std::string result;
  while (!text.empty()) {
    const std::size_t bytes = character_bytes(text);
    switch (bytes == 1 ? text[0] : '\0') {
      case '&':
        result += "&amp;";
        break;
      case '<':
        result += "&lt;";
        break;
      case '>':
        result += "&gt;";
        break;
      case '"':
        result += "&quot;";
        break;
      default:
        result += bytes == 0 ? std::string_view("\xef\xbf\xbd") : text.substr(0, bytes);
    }
    text.remove_prefix(std::max<std::size_t>(bytes, 1));
  }
  return result;
}

PlotScale::PlotScale(double low, double high, double from, double to, bool logarithmic)
    : low_(low), high_(high), from_(from), to_(to), logarithmic_(logarithmic) {
  if (!(high_ > low_)) {
    const double margin = low_ == 0 ? 1 : std::abs(low_) * 0.1;
    high_ = low_ + margin;
    low_ -= margin;
  }
}

double PlotScale::operator()(double value) const {
  const double share = logarithmic_ ? std::log(value / low_) / std::log(high_ / low_) : (value - low_) / (high_ - low_);
  return from_ + share * (to_ - from_);
}

std::vector<double> PlotScale::ticks(int count) const {
  std::vector<double> result;
  if (logarithmic_ && high_ / low_ > 30) {
    // Powers of ten, with 2 and 5 between them while they fit.
    const double decades = std::log10(high_ / low_);
    for (double power = std::pow(10, std::floor(std::log10(low_))); power <= high_; power *= 10) {
      for (const int factor : {1, 2, 5}) {
        if (contains(power * factor) && (factor == 1 || 3 * decades <= count)) {
          result.push_back(power * factor);
        }
      }
    }
    return result;
  }
  const double rough = (high_ - low_) / std::max(count, 1);
  const double power = std::pow(10, std::floor(std::log10(rough)));
  const double step = power * (rough <= power ? 1 : rough <= 2 * power ? 2 : rough <= 5 * power ? 5 : 10);
  for (double i = std::ceil(low_ / step - 1e-9); i * step <= high_ + 1e-9 * step; ++i) {
    result.push_back(i * step + 0.0);  // -0 becomes 0
  }
  return result;
}

namespace {

/// The least-squares line through values[first, last) at index `at`.
double line_at(const std::vector<double>& values, std::int64_t first, std::int64_t last, std::int64_t at) {
  const auto count = static_cast<double>(last - first);
  const double middle = static_cast<double>(first + last - 1) / 2;
  double sum = 0, moment = 0, spread = 0;
  for (std::int64_t i = first; i < last; ++i) {
    const double offset = static_cast<double>(i) - middle;
    sum += values[i];
    moment += offset * values[i];
    spread += offset * offset;
  }
  return sum / count + (spread > 0 ? moment / spread * (static_cast<double>(at) - middle) : 0);
}

}  // namespace

std::vector<double> smooth(const std::vector<double>& values) {
  const auto count = static_cast<std::int64_t>(values.size());
  const std::int64_t widest = std::min<std::int64_t>(count / 100, 500);
  std::vector<double> result = values;
  for (std::int64_t begin = 0, end = 0; begin < count; begin = end + 1) {
    end = begin;
    while (end < count && std::isfinite(values[end])) {
      ++end;
    }
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t half = std::min(widest, (i - begin) / 8);
      result[i] = line_at(values, i - half, std::min(i + half + 1, end), i);
    }
  }
  return result;
}

}  // namespace attamba
