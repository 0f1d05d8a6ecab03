// What a trainer says: the lines on standard error, metrics.jsonl and events.jsonl.
#include <algorithm>
#include <array>
#include <cstdio>
#include <iostream>
#include <nlohmann/json.hpp>

#include "src/core/clock.h"
#include "src/core/error.h"
#include "src/core/parallel.h"
#include "src/core/version.h"
#include "src/train/events.h"
#include "src/train/run_folder.h"
#include "src/train/trainer.h"

namespace attamba {

namespace {

constexpr double kPeakSeconds = 0.3;
/// Of a skipped step's samples, so many are listed one by one.
constexpr std::int64_t kSamplesListed = 64;

}  // namespace

void Trainer::say(const std::string& text) {
  if (!leads()) {
    return;
  }
  if (progress_) {
    progress_->message(text);
  } else {
    std::cerr << text << std::endl;
  }
}

void Trainer::log_event(nlohmann::json event) {
  if (leads()) {
    event["step"] = state_.step;
    append_event(folder() / kEventsFile, std::move(event));
  }
}

void Trainer::report_setup() {
  communicator_.barrier();
  double peak = kernels::on(device_).measure_matmul_peak(config_.train.compute_dtype(), kPeakSeconds);
  communicator_.all_reduce_sum({&peak, {DType::float64, {1}}});
  peak_flops_ = peak;
  if (!leads()) {
    return;
  }
  std::int64_t parameters = 0;
  for (const ParameterInfo& parameter : programs_->parameters()) {
    parameters += parameter.shape.elements();
  }
  std::ostream& out = std::cerr;
  out << version_line() << "\n  " << config_.model.kind << ", " << format_integer(parameters) << " parameters, "
      << config_.train.dtype << " (" << kernels::on(device_).matmul_library(config_.train.compute_dtype()) << "), "
      << communicator_.size() << (communicator_.size() == 1 ? " rank" : " ranks") << " x ";
  if (device_ == Device::cpu) {
    out << thread_count() << " threads (";
  } else {
    out << runtime(device_).description() << " (";
  }
  out << communicator_.description() << ")\n  " << format_integer(config_.train.steps) << " steps of "
      << format_integer(config_.train.global_batch) << " x " << format_integer(config_.data.sequence_length) << " tokens, "
      << format_quantity(
             programs_->model_flops() / static_cast<double>(config_.train.micro_batch * config_.data.sequence_length), "FLOP")
      << " per token; matrix products reach " << format_quantity(peak_flops_, "FLOP/s") << " here\n";
  if (programs_->zero() > 0) {
    const bool on_node = config_.train.zero_group == "node";
    constexpr std::array<std::string_view, 3> kDivided{"optimizer state", "optimizer state and gradients",
                                                       "optimizer state, gradients and weights"};
    out << "  ZeRO stage " << programs_->zero() << ": " << kDivided[static_cast<std::size_t>(programs_->zero() - 1)]
        << " divided among " << (on_node ? communicator_.local_size() : communicator_.size())
        << (on_node ? " ranks of each node\n" : " ranks\n");
  }
  print_memory_table(out, programs_->memory(), programs_->largest_plan());
  if (state_.step > 0) {
    out << "  resuming after step " << format_integer(state_.step) << '\n';
  }
  progress_ = std::make_unique<ProgressLine>(out, config_.train.steps, state_.step, ProgressLine::for_standard_error());
}

void Trainer::log(const StepResult& result) {
  if (leads()) {
    const double steps_per_second = static_cast<double>(window_steps_) / window_seconds_;
    const double tokens_per_step = static_cast<double>(config_.train.global_batch * config_.data.sequence_length);
    const double flops = programs_->model_flops() * static_cast<double>(share_.per_step) * steps_per_second;
    const std::int64_t next = state_.step;
    MetricsRecord record{.step = next,
                         .tokens = next * config_.train.global_batch * config_.data.sequence_length,
                         .loss = result.loss,
                         .grad_norm = result.gradient_norm,
                         .tokens_per_s = tokens_per_step * steps_per_second,
                         .model_flops_per_s = flops,
                         .share_of_peak = flops / peak_flops_,
                         .seconds = state_.seconds};
    record.lr = result.learning_rate;
    record.more.emplace_back("checkpoint_stall_seconds", checkpoints_->stall_seconds());
    record.more.emplace_back("loader_wait_seconds", batches_->wait_seconds());
    if (result.skipped) {
      report_skipped(result, record);
    }
    append_metrics(record);
    progress_->update(record);
  }
  window_seconds_ = 0;
  window_steps_ = 0;
}

/// Each rank by itself: the others wait for this one.
void Trainer::report_slow_data(double seconds) {
  const std::string reading = batches_->reading();
  const std::string text =
      concat("rank ", communicator_.rank(), watchdog_->on_host(communicator_.rank()), " has waited ", seconds,
             " s for data in step ", state_.step + 1, reading.empty() ? std::string() : concat(", reading ", reading));
  if (leads()) {
    say(text);
  } else {
    std::cerr << text << std::endl;
  }
  append_event(folder() / kEventsFile,
               {{"event", "slow data"}, {"step", state_.step}, {"rank", communicator_.rank()}, {"reading", reading}});
}

/// A line that cannot be written ends no training: it is tried again.
void Trainer::append_metrics(const MetricsRecord& record) {
  const std::optional<std::string> reason = metrics_->append(record);
  if (reason && !metrics_wait_) {
    say(*reason + "; training goes on, and tries again with the next line");
  }
  metrics_wait_ = reason.has_value();
}

/// The step's samples follow each other: `first_sample` to `last_sample` of the run.
void Trainer::report_skipped(const StepResult& result, MetricsRecord& record) {
  const std::int64_t batch = config_.train.global_batch, first = (state_.step - 1 + state_.passed_over) * batch;
  record.more.emplace_back("first_skipped_sample", static_cast<double>(first));
  record.more.emplace_back("last_skipped_sample", static_cast<double>(first + batch - 1));
  nlohmann::json windows = nlohmann::json::array();
  for (std::int64_t i = first; i < first + std::min(batch, kSamplesListed); ++i) {
    const Sample sample = samples_->sample(static_cast<std::uint64_t>(i));
    windows.push_back({{"sample", i},
                       {"data", samples_->config().sources[sample.source].dataset.folder().string()},
                       {"window", sample.window}});
  }
  log_event({{"event", "skipped step"},
             {"reason", describe_bad(result)},
             {"loss", result.loss},
             {"grad_norm", result.gradient_norm},
             {"norm_limit", norm_limit_},
             {"first_sample", first},
             {"last_sample", first + batch - 1},
             {"windows", windows}});
  say(concat("step ", format_integer(state_.step), ": loss ", result.loss, ", gradient norm ", result.gradient_norm, ": ",
             describe_bad(result), norm_limit_ > 0 ? concat(" (the limit is ", norm_limit_, ")") : std::string(),
             ", so the update was skipped; samples ", first, " to ", first + batch - 1));
}

void Trainer::report_rollback(std::int64_t first_bad, std::int64_t last_bad) {
  const std::int64_t batch = config_.train.global_batch;
  log_event({{"event", "rollback"},
             {"from", last_bad},
             {"first_bad_step", first_bad},
             {"passed_over", state_.passed_over},
             {"next_sample", (state_.step + state_.passed_over) * batch}});
  say(concat("steps ", format_integer(first_bad), " to ", format_integer(last_bad),
             " were skipped: going back to the checkpoint of step ", format_integer(state_.step),
             ", and on with the samples behind them, from ", (state_.step + state_.passed_over) * batch));
}

/// Rank 0 looks at what all ranks have told about the step before.
void Trainer::find_slow_ranks(std::span<const RankNews> news) {
  if (!leads()) {
    return;
  }
  std::vector<double> seconds;
  for (const RankNews& rank : news) {
    seconds.push_back(1e-9 * static_cast<double>(rank.nanoseconds));
  }
  for (const SlowRanks::Slow& slow : slow_ranks_.observe(seconds, monotonic_seconds() - step_began_)) {
    log_event({{"event", "slow rank"}, {"rank", slow.rank}, {"ratio", slow.ratio}, {"seconds", slow.seconds}});
    char text[160];
    std::snprintf(text, sizeof text, "rank %d%s is slow: it computes %.2f times as long as the others, %.3g s per micro-batch",
                  slow.rank, watchdog_->on_host(slow.rank).c_str(), slow.ratio, slow.seconds);
    say(text);
  }
}

void Trainer::report_evaluation(const EvaluationResult& result) {
  if (!leads()) {
    return;
  }
  MetricsRecord record{.step = state_.step,
                       .tokens = state_.step * config_.train.global_batch * config_.data.sequence_length,
                       .seconds = state_.seconds,
                       .eval_loss = result.loss};
  record.more = {{"perplexity", result.perplexity()},
                 {"word_perplexity", result.word_perplexity()},
                 {"bits_per_byte", result.bits_per_byte()}};
  append_metrics(record);
  char text[160];
  std::snprintf(
      text, sizeof text, "validation after step %s: loss %.4f, perplexity %.2f per token, %.1f per word, %.4f bits per byte",
      format_integer(state_.step).c_str(), result.loss, result.perplexity(), result.word_perplexity(), result.bits_per_byte());
  say(text);
}

void Trainer::report_end() {
  if (stop_ && !complete()) {
    const bool saved = checkpoints_ && checkpoints_->saved_step() >= 0;
    if (saved) {
      log_event({{"event", "stop"}, {"reason", describe(*stop_)}});
    }
    const std::string asked = concat(describe(*stop_), stop_->reason == kTimeIsUp ? "" : watchdog_->on_host(stop_->rank));
    say(!saved ? concat(asked, ": stopped while starting; nothing had to be saved, run the same command again")
               : concat(asked, ": stopped after step ", format_integer(state_.step),
                        "; everything is saved, run the same command to go on"));
  }
  if (leads() && progress_) {
    progress_->finish();
  }
  if (leads() && config_.train.debug && complete()) {
    profile_.print(std::cerr, peak_flops_);
  }
}

}  // namespace attamba
