// Curves of runs as one SVG picture: loss above, throughput below, a table of final values as the legend.
#pragma once

#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "src/train/metrics.h"

namespace attamba {

struct PlotRun {
  std::string name;
  std::vector<MetricsRecord> records;
};

/// Reads a run's folder (its metrics.jsonl) or such a file; the run is called after the folder.
PlotRun read_plot_run(const std::filesystem::path& run);

enum class PlotAxis : std::uint8_t { tokens, steps, seconds };

struct PlotOptions {
  PlotAxis x = PlotAxis::tokens;
  bool log_x = false;
  double loss_max = 0;  ///< top of the loss axis; 0 = chosen so that the first steps do not flatten the rest
};

/// The whole SVG file. Runs without records are named in the legend; throws UsageError when no run has any.
std::string plot_svg(const std::vector<PlotRun>& runs, const PlotOptions& options);

/// `text` with the characters that XML reserves escaped, and those that it forbids (control characters, bytes that are not
/// UTF-8) replaced by U+FFFD.
std::string escape_xml(std::string_view text);

/// An axis: maps [low, high] to [from, to] of the picture and names round values in between.
class PlotScale {
 public:
  /// A logarithmic scale needs low > 0. An empty interval is widened.
  PlotScale(double low, double high, double from, double to, bool logarithmic);

  double operator()(double value) const;
  bool contains(double value) const { return value >= low_ && value <= high_; }
  /// Round values inside the interval, at most about `count` of them.
  std::vector<double> ticks(int count) const;
  double low() const { return low_; }
  double high() const { return high_; }

 private:
  double low_, high_, from_, to_;
  bool logarithmic_;
};

/// The curve without its noise: at each value the line that fits its neighbourhood best, up to a hundredth of the curve to each
/// side. Neighbourhoods are narrower near the beginning, where losses fall steeply. Values that are not finite stay, and cut
/// the curve into pieces.
std::vector<double> smooth(const std::vector<double>& values);

}  // namespace attamba
