#include "src/train/plot.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <limits>
#include <sstream>

#include "src/core/error.h"

namespace attamba {
namespace {

constexpr double kWidth = 960, kLeft = 76, kRight = 936, kLossHeight = 400, kRateHeight = 150, kGap = 34, kRow = 20;
// Okabe and Ito's colours, which colour-blind readers can tell apart; further rounds are dashed.
constexpr std::array<const char*, 7> kColours = {"#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444"};
constexpr std::array<const char*, 4> kDashes = {"", " stroke-dasharray=\"7 3\"", " stroke-dasharray=\"2 3\"",
                                                " stroke-dasharray=\"9 3 2 3\""};

struct Curve {
  std::vector<double> x, y, smoothed;
};

/// One run's curves over the chosen axis.
struct RunCurves {
  std::string name;
  Curve loss, validation, rate;
};

/// A rectangle with its axes.
struct Panel {
  PlotScale x, y;
  double top, bottom;
  std::string clip;
};

std::string number(double value) {
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "%.1f", value);
  return text.data();
}

/// What the x axis counts, in units that make its round values round.
struct XAxis {
  PlotAxis kind;
  double unit = 1;
  std::string label;

  double operator()(const MetricsRecord& record) const {
    if (kind == PlotAxis::seconds) {
      return record.seconds.value_or(std::numeric_limits<double>::quiet_NaN()) / unit;
    }
    return static_cast<double>(kind == PlotAxis::tokens ? record.tokens : record.step);
  }
};

XAxis x_axis_of(const std::vector<PlotRun>& runs, PlotAxis kind) {
  if (kind != PlotAxis::seconds) {
    return {.kind = kind, .label = kind == PlotAxis::tokens ? "training tokens" : "optimizer steps"};
  }
  double longest = 0;
  for (const PlotRun& run : runs) {
    for (const MetricsRecord& record : run.records) {
      longest = std::max(longest, record.seconds.value_or(0));
    }
  }
  constexpr double kMinute = 60, kHour = 3600, kDay = 86400;
  if (longest > 3 * kDay) {
    return {.kind = kind, .unit = kDay, .label = "training time (days)"};
  }
  if (longest > 2 * kHour) {
    return {.kind = kind, .unit = kHour, .label = "training time (hours)"};
  }
  const bool minutes = longest > 2 * kMinute;
  return {
      .kind = kind, .unit = minutes ? kMinute : 1, .label = concat("training time (", minutes ? "minutes" : "seconds", ")")};
}

RunCurves curves_of(const PlotRun& run, const XAxis& axis, bool log_x) {
  RunCurves result = {.name = run.name, .loss = {}, .validation = {}, .rate = {}};
  for (const MetricsRecord& record : run.records) {
    const double x = axis(record);
    if (!std::isfinite(x) || (log_x && x <= 0)) {
      continue;
    }
    const auto add = [x](Curve& curve, const std::optional<double>& y) {
      if (y) {
        curve.x.push_back(x);
        curve.y.push_back(*y);
      }
    };
    add(result.loss, record.loss);
    add(result.validation, record.eval_loss);
    add(result.rate, record.tokens_per_s);
  }
  for (Curve* curve : {&result.loss, &result.validation, &result.rate}) {
    curve->smoothed = smooth(curve->y);
  }
  return result;
}

struct Range {
  double low = std::numeric_limits<double>::infinity(), high = -low;

  void include(double value) {
    if (std::isfinite(value)) {
      low = std::min(low, value);
      high = std::max(high, value);
    }
  }
  bool empty() const { return low > high; }
};

Range x_range(const std::vector<RunCurves>& runs) {
  Range range;
  for (const RunCurves& run : runs) {
    for (const Curve* curve : {&run.loss, &run.validation, &run.rate}) {
      for (const double x : curve->x) {
        range.include(x);
      }
    }
  }
  return range;
}

/// The loss axis. On a linear x axis the first steps would take most of the height for a line that nobody can see, so the axis
/// ends where the slowest run is after a fiftieth of the longest.
PlotScale loss_scale(const std::vector<RunCurves>& runs, const Range& x, const PlotOptions& options, double top,
                     double bottom) {
  const double from = options.log_x || x.low > 0.02 * x.high ? 0 : 0.02 * x.high;
  Range all, shown;
  for (const RunCurves& run : runs) {
    for (const Curve* curve : {&run.loss, &run.validation}) {
      const std::vector<double>& y = curve == &run.loss ? curve->smoothed : curve->y;
      for (std::size_t i = 0; i < y.size(); ++i) {
        all.include(y[i]);
        if (curve->x[i] >= from) {
          shown.include(y[i]);
        }
      }
    }
  }
  Range range = shown.empty() ? all : shown;
  if (range.empty()) {
    range = {.low = 0, .high = 1};
  }
  if (options.loss_max > 0) {
    range.high = options.loss_max;
    range.low = std::min(range.low, 0.9 * options.loss_max);
  }
  const double margin = 0.04 * (range.high - range.low);
  return {range.low - margin, range.high + (options.loss_max > 0 ? 0 : margin), bottom, top, false};
}

PlotScale rate_scale(const std::vector<RunCurves>& runs, double top, double bottom) {
  Range range = {.low = 0, .high = 0};
  for (const RunCurves& run : runs) {
    for (const double rate : run.rate.smoothed) {
      range.include(rate);
    }
  }
  return {0, range.high > 0 ? 1.08 * range.high : 1, bottom, top, false};
}

/// `attributes`: empty, or with a space before each.
void text(std::ostream& out, double x, double y, std::string_view attributes, std::string_view words) {
  out << "<text x=\"" << number(x) << "\" y=\"" << number(y) << '"' << attributes << '>' << escape_xml(words) << "</text>\n";
}

void line(std::ostream& out, double x1, double y1, double x2, double y2, const char* kind) {
  out << "<path class=\"" << kind << "\" d=\"M" << number(x1) << ' ' << number(y1) << 'L' << number(x2) << ' ' << number(y2)
      << "\"/>\n";
}

/// A tick's value with as many decimals as its axis needs.
std::string tick_text(double value, double step) {
  if (std::max(std::abs(value), step) >= 1000 || value == 0) {
    return format_count(value);
  }
  std::array<char, 32> result{};
  const int decimals = std::clamp(static_cast<int>(std::ceil(-std::log10(step) - 1e-9)), 0, 6);
  std::snprintf(result.data(), result.size(), "%.*f", decimals, value);
  return result.data();
}

void draw_axes(std::ostream& out, const Panel& panel, const char* y_label, bool x_labels) {
  out << "<clipPath id=\"" << panel.clip << "\"><rect x=\"" << kLeft << "\" y=\"" << number(panel.top) << "\" width=\""
      << kRight - kLeft << "\" height=\"" << number(panel.bottom - panel.top) << "\"/></clipPath>\n";
  const std::vector<double> y_ticks = panel.y.ticks(static_cast<int>((panel.bottom - panel.top) / 45));
  const double y_step = y_ticks.size() > 1 ? y_ticks[1] - y_ticks[0] : 1;
  for (const double tick : y_ticks) {
    line(out, kLeft, panel.y(tick), kRight, panel.y(tick), "grid");
    text(out, kLeft - 8, panel.y(tick) + 4, " text-anchor=\"end\"", tick_text(tick, y_step));
  }
  const std::vector<double> x_ticks = panel.x.ticks(9);
  const double x_step = x_ticks.size() > 1 ? x_ticks[1] - x_ticks[0] : 1;
  for (const double tick : x_ticks) {
    line(out, panel.x(tick), panel.top, panel.x(tick), panel.bottom, "grid");
    line(out, panel.x(tick), panel.bottom, panel.x(tick), panel.bottom + 5, "axis");
    if (x_labels) {
      text(out, panel.x(tick), panel.bottom + 19, " text-anchor=\"middle\"", tick_text(tick, x_step));
    }
  }
  out << "<path class=\"axis\" d=\"M" << kLeft << ' ' << number(panel.top) << 'V' << number(panel.bottom) << 'H' << kRight
      << "\"/>\n";
  out << "<text transform=\"translate(20 " << number((panel.top + panel.bottom) / 2)
      << ") rotate(-90)\" text-anchor=\"middle\" class=\"label\">" << y_label << "</text>\n";
}

/// Decides which points of a curve are worth drawing: more than a few per pixel only swell the file.
class Thinning {
 public:
  bool keep(double x) {
    const bool far = !(x - last_ < 0.7);
    last_ = far ? x : last_;
    return far;
  }

 private:
  double last_ = -std::numeric_limits<double>::infinity();
};

/// Values as faint dots.
void draw_points(std::ostream& out, const Panel& panel, const Curve& curve, const char* colour) {
  std::ostringstream path;
  Thinning thinning;
  for (std::size_t i = 0; i < curve.x.size(); ++i) {
    const double x = panel.x(curve.x[i]);
    if (std::isfinite(curve.y[i]) && panel.y.contains(curve.y[i]) && thinning.keep(x)) {
      path << 'M' << number(x) << ' ' << number(panel.y(curve.y[i])) << "h0";
    }
  }
  if (!path.view().empty()) {
    out << "<path class=\"points\" stroke=\"" << colour << "\" d=\"" << path.view() << "\"/>\n";
  }
}

/// The smoothed values, with a gap wherever a value is not finite.
void draw_curve(std::ostream& out, const Panel& panel, const Curve& curve, const char* colour, const char* dash) {
  std::ostringstream path;
  Thinning thinning;
  bool open = false;
  for (std::size_t i = 0; i < curve.x.size(); ++i) {
    const bool last = i + 1 == curve.x.size() || !std::isfinite(curve.smoothed[i + 1]);
    if (!std::isfinite(curve.smoothed[i])) {
      open = false;
      continue;
    }
    const double x = panel.x(curve.x[i]);
    if (thinning.keep(x) || !open || last) {
      // Far outside the panel a coordinate only has to be far outside: the clip hides it, and renderers keep their precision.
      const double y = std::clamp(panel.y(curve.smoothed[i]), panel.top - 1e4, panel.bottom + 1e4);
      path << (open ? 'L' : 'M') << number(x) << ' ' << number(y) << (!open && last ? "h0" : "");
      open = true;
    }
  }
  if (!path.view().empty()) {
    out << "<path class=\"curve\" stroke=\"" << colour << '"' << dash << " d=\"" << path.view() << "\"/>\n";
  }
}

void draw_markers(std::ostream& out, const Panel& panel, const Curve& curve, const char* colour) {
  for (std::size_t i = 0; i < curve.x.size(); ++i) {
    if (std::isfinite(curve.y[i]) && panel.y.contains(curve.y[i])) {
      out << "<circle class=\"marker\" cx=\"" << number(panel.x(curve.x[i])) << "\" cy=\"" << number(panel.y(curve.y[i]))
          << "\" r=\"3.4\" stroke=\"" << colour << "\"/>\n";
    }
  }
}

/// The mean of the curve's last `count` values; one step's loss alone is mostly noise.
std::string last_value(const Curve& curve, std::size_t count) {
  if (curve.y.empty()) {
    return "\xe2\x80\x93";  // an en dash: not measured
  }
  double sum = 0;
  for (std::size_t i = curve.y.size() - count; i < curve.y.size(); ++i) {
    sum += curve.y[i];
  }
  std::array<char, 32> result{};
  std::snprintf(result.data(), result.size(), "%.4f", sum / static_cast<double>(count));
  return std::isfinite(sum) ? result.data() : "not finite";
}

/// At most `limit` characters, the middle left out; both ends of a run's name tell runs apart.
std::string shortened(std::string_view name, std::size_t limit) {
  if (name.size() <= limit) {
    return std::string(name);
  }
  const auto boundary = [name](std::size_t i) {
    while (i < name.size() && (static_cast<unsigned char>(name[i]) & 0xc0) == 0x80) {
      ++i;
    }
    return i;
  };
  const std::size_t head = boundary(limit / 2), tail = boundary(name.size() - limit / 2);
  return concat(name.substr(0, head), "\xe2\x80\xa6", name.substr(tail));
}

void draw_legend(std::ostream& out, const std::vector<RunCurves>& runs) {
  const double loss = 620, validation = 740, rate = kRight;
  text(out, kLeft + 34, 26, " class=\"head\"", "run");
  text(out, loss, 26, " class=\"head\" text-anchor=\"end\"", "final training loss");
  text(out, validation, 26, " class=\"head\" text-anchor=\"end\"", "validation loss");
  text(out, rate, 26, " class=\"head\" text-anchor=\"end\"", "median throughput");
  for (std::size_t i = 0; i < runs.size(); ++i) {
    const double y = 26 + kRow * static_cast<double>(i + 1);
    const char* colour = kColours[i % kColours.size()];
    const char* dash = kDashes[i / kColours.size() % kDashes.size()];
    out << "<path class=\"curve\" stroke=\"" << colour << '"' << dash << " d=\"M" << kLeft << ' ' << number(y - 4)
        << "h26\"/>\n";
    if (!runs[i].validation.y.empty()) {
      out << "<circle class=\"marker\" cx=\"" << kLeft + 13 << "\" cy=\"" << number(y - 4) << "\" r=\"3.4\" stroke=\"" << colour
          << "\"/>\n";
    }
    const std::size_t losses = runs[i].loss.y.size();
    text(out, kLeft + 34, y, "", shortened(runs[i].name, 54));
    text(out, loss, y, " text-anchor=\"end\"", losses == 0 ? "no records" : last_value(runs[i].loss, losses / 100 + 1));
    text(out, validation, y, " text-anchor=\"end\"", last_value(runs[i].validation, 1));
    std::vector<double> rates = runs[i].rate.y;
    std::erase_if(rates, [](double value) { return !std::isfinite(value); });
    std::sort(rates.begin(), rates.end());
    text(out, rate, y, " text-anchor=\"end\"",
         rates.empty() ? "\xe2\x80\x93" : format_quantity(rates[rates.size() / 2], "tokens/s"));
  }
}

constexpr const char* kStyle =
    "<style>text{font:12px Helvetica,Arial,sans-serif;fill:#222}.label{font-size:13px}.head{fill:#666}"
    ".grid{stroke:#e6e6e6;fill:none}.axis{stroke:#444;fill:none}.curve{fill:none;stroke-width:1.8;stroke-linejoin:round;"
    "stroke-linecap:round}.points{fill:none;stroke-width:2;stroke-linecap:round;opacity:.18}"
    ".marker{fill:#fff;stroke-width:1.6}</style>\n";

}  // namespace

PlotRun read_plot_run(const std::filesystem::path& run) {
  const bool folder = std::filesystem::is_directory(run);
  const std::filesystem::path file = folder ? run / "metrics.jsonl" : run;
  require<UsageError>(std::filesystem::exists(file), "plot: ", file.string(),
                      " does not exist; name a run's folder or its metrics.jsonl");
  const std::filesystem::path named = std::filesystem::absolute(folder ? run / "." : file).lexically_normal().parent_path();
  return {.name = file.filename() == "metrics.jsonl" ? named.filename().string() : file.stem().string(),
          .records = read_metrics(file)};
}

std::string plot_svg(const std::vector<PlotRun>& runs, const PlotOptions& options) {
  const XAxis axis = x_axis_of(runs, options.x);
  std::vector<RunCurves> curves;
  for (const PlotRun& run : runs) {
    curves.push_back(curves_of(run, axis, options.log_x));
  }
  const Range x = x_range(curves);
  require<UsageError>(!x.empty(), "plot: no records to draw in ", runs.size(), runs.size() == 1 ? " run" : " runs",
                      runs.empty() ? std::string() : concat(" (", runs[0].name, ")"),
                      "; train for at least train.log_every steps first");
  const double loss_top = 44 + kRow * static_cast<double>(runs.size()), loss_bottom = loss_top + kLossHeight;
  const double rate_top = loss_bottom + kGap, rate_bottom = rate_top + kRateHeight, height = rate_bottom + 52;
  const bool from_zero = !options.log_x && x.low < 0.5 * x.high;
  const PlotScale x_scale(from_zero ? 0 : x.low, x.high, kLeft, kRight, options.log_x && x.low < x.high);
  const Panel loss = {x_scale, loss_scale(curves, x, options, loss_top, loss_bottom), loss_top, loss_bottom, "loss"};
  const Panel rate = {x_scale, rate_scale(curves, rate_top, rate_bottom), rate_top, rate_bottom, "rate"};

  std::ostringstream out;
  out << "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"" << kWidth
      << "\" height=\"" << number(height) << "\" viewBox=\"0 0 " << kWidth << ' ' << number(height) << "\">\n"
      << kStyle << "<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n";
  draw_legend(out, curves);
  draw_axes(out, loss, "loss (nats per token)", false);
  draw_axes(out, rate, "tokens/s", true);
  text(out, (kLeft + kRight) / 2, rate_bottom + 42, " text-anchor=\"middle\" class=\"label\"", axis.label);
  for (const Panel* panel : {&loss, &rate}) {
    out << "<g clip-path=\"url(#" << panel->clip << ")\">\n";
    const auto curve_of = [panel, &loss](const RunCurves& run) -> const Curve& { return panel == &loss ? run.loss : run.rate; };
    for (std::size_t i = 0; i < curves.size(); ++i) {
      draw_points(out, *panel, curve_of(curves[i]), kColours[i % kColours.size()]);
    }
    for (std::size_t i = 0; i < curves.size(); ++i) {
      draw_curve(out, *panel, curve_of(curves[i]), kColours[i % kColours.size()],
                 kDashes[i / kColours.size() % kDashes.size()]);
    }
    out << "</g>\n";
  }
  for (std::size_t i = 0; i < curves.size(); ++i) {
    draw_markers(out, loss, curves[i].validation, kColours[i % kColours.size()]);
  }
  out << "</svg>\n";
  return std::move(out).str();
}

}  // namespace attamba
