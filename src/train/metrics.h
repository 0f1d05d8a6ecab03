// What a run reports while it trains: metrics.jsonl (one JSON object per line, the source of every curve) and the progress line
// on the terminal. Only one rank owns these objects.
#pragma once

#include <cstdint>
#include <deque>
#include <filesystem>
#include <functional>
#include <iosfwd>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace attamba {

/// One line of metrics.jsonl. A quantity that was not measured is absent; one that is not a finite number is written as null,
/// because JSON knows neither NaN nor infinity, and read as NaN.
struct MetricsRecord {
  std::int64_t step = 0;    ///< optimizer steps done, so the first record of a run is not before step 1
  std::int64_t tokens = 0;  ///< trained on since the run's beginning
  std::optional<double> loss = {}, lr = {}, grad_norm = {};
  std::optional<double> tokens_per_s = {}, model_flops_per_s = {};
  std::optional<double> share_of_peak = {};  ///< of the machine's measured matrix-multiply rate; 1 = all of it
  std::optional<double> seconds = {};        ///< since the run's beginning, without the time in which it did not run
  std::optional<double> eval_loss = {};
  std::vector<std::pair<std::string, double>> more = {};  ///< any further named numbers
};

/// One line, without its newline.
std::string to_json_line(const MetricsRecord& record);

/// Throws Error that says what is wrong with the line; unknown numbers go to `more`.
MetricsRecord metrics_from_json_line(std::string_view line);

/// Every record of the file. A last line without its newline is being written and is left out; any other malformed line is an
/// Error that names file and line.
std::vector<MetricsRecord> read_metrics(const std::filesystem::path& file);

/// The open metrics.jsonl of a running training. A line is one write, so a reader and a crash see whole lines, except perhaps
/// the last. What cannot be written, on a full disk or by an error of the file system, is kept and tried again with the next
/// line.
class MetricsLog {
 public:
  /// Goes on with `file` after step `step` (0: from the beginning): removes what a crash left behind at its end, and the
  /// records of later steps, which will be computed again.
  MetricsLog(std::filesystem::path file, std::int64_t step);
  ~MetricsLog();
  MetricsLog(const MetricsLog&) = delete;
  MetricsLog& operator=(const MetricsLog&) = delete;

  /// Returns why there are lines that are not in the file yet; nothing when all are. Throws Error when the file is spoilt.
  std::optional<std::string> append(const MetricsRecord& record);
  /// Throws Error when there are lines that cannot be written.
  void finish();

 private:
  std::optional<std::string> write_waiting();

  std::filesystem::path file_;
  int descriptor_ = -1;
  std::deque<std::string> waiting_;
};

/// Says how far training is: one line that is redrawn on a terminal, else plain lines at a bounded rate.
class ProgressLine {
 public:
  struct Options {
    bool terminal = false;
    int columns = 120;                      ///< of the terminal; longer lines are cut
    double seconds_between_redraws = 0.1;   ///< on a terminal
    double seconds_between_lines = 10;      ///< elsewhere
    std::function<double()> now = nullptr;  ///< seconds on a clock that never goes back; null = the machine's
  };

  /// Is standard error a terminal, and how wide?
  static Options for_standard_error();

  /// `out` must outlive this object. `steps`: of the whole run; `step`: those done before.
  ProgressLine(std::ostream& out, std::int64_t steps, std::int64_t step, Options options);
  ~ProgressLine();
  ProgressLine(const ProgressLine&) = delete;
  ProgressLine& operator=(const ProgressLine&) = delete;

  /// Shows the record, unless something was shown a moment ago; the last step is always shown.
  void update(const MetricsRecord& record);
  /// Prints a line of its own without disturbing the progress line.
  void message(std::string_view text);
  /// Ends the progress line; called by the destructor.
  void finish();

 private:
  std::string text(const MetricsRecord& record, double now) const;
  void draw();

  std::ostream& out_;
  Options options_;
  std::int64_t steps_, first_step_;
  double began_, shown_;
  std::string line_;     ///< what the terminal shows now, or empty
  std::string pending_;  ///< newer than that, not yet shown
};

/// "850 ms", "42 s", "3 min 20 s", "5 h 7 min", "12 d 3 h"
std::string format_duration(double seconds);
/// At most two decimals and a prefix: "62.75 M", "1.3 G", "950"
std::string format_count(double value);
/// Three digits, prefix and unit: "1.3 GFLOP/s", "57.3 ktokens/s"
std::string format_quantity(double value, std::string_view unit);
/// "60,000"
std::string format_integer(std::int64_t value);

}  // namespace attamba
