#include <sys/ioctl.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <ostream>

#include "src/core/clock.h"
#include "src/core/error.h"
#include "src/train/metrics.h"

namespace attamba {
namespace {

std::string printed(const char* format, double value) {
  std::array<char, 64> text{};
  std::snprintf(text.data(), text.size(), format, value);
  return text.data();
}

}  // namespace

ProgressLine::Options ProgressLine::for_standard_error() {
  Options options;
  const char* kind = std::getenv("TERM");
  options.terminal = ::isatty(STDERR_FILENO) == 1 && kind != nullptr && std::string_view(kind) != "dumb";
  winsize size{};
  if (options.terminal && ::ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0) {
    options.columns = size.ws_col;
  }
  return options;
}

ProgressLine::ProgressLine(std::ostream& out, std::int64_t steps, std::int64_t step, Options options)
    : out_(out), options_(std::move(options)), steps_(steps), first_step_(step) {
  if (!options_.now) {
    options_.now = monotonic_seconds;
  }
  began_ = options_.now();
  shown_ = began_ - 1e9;
}

ProgressLine::~ProgressLine() {
  try {
    finish();
  } catch (...) {  // the terminal may be gone; the run's result is not
  }
}

std::string ProgressLine::text(const MetricsRecord& record, double now) const {
  std::string line = concat("step ", format_integer(record.step), "/", format_integer(steps_));
  const auto add = [&line](const auto&... parts) { line += concat("  ", parts...); };
  if (record.loss) {
    add("loss ", printed("%.4f", *record.loss));
  }
  if (record.eval_loss) {
    add("eval ", printed("%.4f", *record.eval_loss));
  }
  if (record.lr) {
    add("lr ", printed("%.2e", *record.lr));
  }
  if (record.grad_norm) {
    add("grad ", printed("%.3g", *record.grad_norm));
  }
  if (record.tokens_per_s) {
    add(format_quantity(*record.tokens_per_s, "tok/s"));
  }
  if (record.model_flops_per_s) {
    add(format_quantity(*record.model_flops_per_s, "FLOP/s"));
    if (record.share_of_peak) {
      line += concat(" (", printed("%.0f", 100 * *record.share_of_peak), "% of peak)");
    }
  }
  const std::int64_t done = record.step - first_step_, left = steps_ - record.step;
  if (done > 0 && left > 0) {
    // Wall time per step, so that evaluation and saving are part of it.
    add("ETA ", format_duration((now - began_) / static_cast<double>(done) * static_cast<double>(left)));
  }
  return line;
}

void ProgressLine::draw() {
  if (options_.terminal) {
    line_ = pending_.substr(0, static_cast<std::size_t>(options_.columns > 1 ? options_.columns - 1 : 1));
    out_ << '\r' << line_ << "\x1b[K" << std::flush;
  } else {
    out_ << pending_ << '\n' << std::flush;
  }
  pending_.clear();
}

void ProgressLine::update(const MetricsRecord& record) {
  const double now = options_.now();
  const double interval = options_.terminal ? options_.seconds_between_redraws : options_.seconds_between_lines;
  pending_ = text(record, now);
  if (now - shown_ >= interval || record.step >= steps_) {
    shown_ = now;
    draw();
  }
}

void ProgressLine::message(std::string_view text) {
  if (line_.empty()) {
    out_ << text << '\n' << std::flush;
    return;
  }
  out_ << "\r\x1b[K" << text << '\n' << line_ << std::flush;
}

void ProgressLine::finish() {
  if (options_.terminal && !pending_.empty()) {
    draw();
  }
  if (!line_.empty()) {
    out_ << '\n' << std::flush;
    line_.clear();
  }
}

}  // namespace attamba
