#include "src/train/trainer.h"

#include <algorithm>
#include <array>
#include <csignal>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <limits>

#include "comm/single_process.h"
#include "data/files.h"
#include "src/core/clock.h"
#include "src/core/error.h"
#include "src/core/parallel.h"
#include "src/core/version.h"
#include "src/optim/schedule.h"
#include "src/train/inspect.h"
#include "src/train/run_folder.h"
#include "src/train/run_plan.h"

namespace attamba {

namespace {

constexpr std::int64_t kMostSkippedInARow = 3;
constexpr double kPeakSeconds = 0.3;

volatile std::sig_atomic_t stop_requested = 0;

}  // namespace

void Trainer::request_stop() {
  stop_requested = 1;
}

template <class Body>
void Trainer::on_first_rank(const Body& body) {
  std::int64_t failed = 0;
  std::exception_ptr error;
  if (leads()) {
    try {
      body();
    } catch (...) {
      failed = 1;
      error = std::current_exception();
    }
  }
  communicator_.broadcast({&failed, {DType::int64, {1}}}, 0);
  if (error) {
    std::rethrow_exception(error);
  }
  require(failed == 0, "rank 0 could not go on; its message says why");
}

Trainer::Trainer(const Config& config, Communicator& communicator, Device device)
    : config_(config), communicator_(communicator), device_(device) {
  validate(config_);
  require<UsageError>(!config_.run.folder.empty(), "run.folder is not set; name a folder for this run's results");
  share_ = {.per_step = config_.train.global_batch / config_.train.micro_batch,
            .rank = communicator_.rank(),
            .ranks = communicator_.size()};
  open_data();
  chunking_ = make_model_chunking(config_.model, config_.data.sequence_length);
  programs_ = make_run_programs(config_, chunking_.get(), device_, communicator_);
  set_up_debugging();
  open_run_folder();
  resume();
  start_loader();
  report_setup();
}

Trainer::~Trainer() = default;

void Trainer::set_up_debugging() {
  compare_cpu_ = config_.train.compare_cpu;
  const std::string& pattern = config_.train.watch;
  if (config_.train.debug || !pattern.empty()) {
    const Program::Observer watch = pattern.empty() ? Program::Observer() : watch_tensors(pattern, std::cerr);
    programs_->observe(
        [this, watch](const Program::Step& step, double seconds) {
          profile_.add(step, seconds);
          if (watch) {
            watch(step, seconds);
          }
        },
        config_.train.debug);
  }
}

/// Adds the step, and the samples where the number that is not finite was found, to the message.
template <class Body>
auto Trainer::naming_samples(const std::vector<std::int64_t>& batch_samples, const Body& body) {
  try {
    return body();
  } catch (const NotFinite& error) {
    const auto tokens = static_cast<std::int64_t>(batch_samples.size()) * config_.data.sequence_length;
    std::string samples;
    if (error.rows() == tokens && tokens > 0) {
      samples = concat(", sample ", batch_samples[static_cast<std::size_t>(error.row() / config_.data.sequence_length)],
                       ", token ", error.row() % config_.data.sequence_length);
    }
    throw Error(concat(error.what(), "; step ", state_.step + 1, samples));
  }
}

/// The first difference between this device and the CPU on one batch, with the weights as they are.
void Trainer::compare_with_cpu(const Batch& batch, const std::vector<std::int64_t>& samples) {
  compare_cpu_ = false;
  SingleProcess alone;
  ModelPrograms on_cpu(program_options(config_, chunking_.get(), Device::cpu), alone);
  for (const ParameterInfo& parameter : programs_->parameters()) {
    copy_from_host(on_cpu.master(parameter.name), HostCopy(programs_->master(parameter.name)).tensor());
  }
  on_cpu.refresh_compute_weights();
  on_cpu.inputs().write(batch.tokens, batch.document_starts, samples, static_cast<std::uint64_t>(config_.train.seed),
                        state_.step);
  const std::vector<OpDifference> differences = compare_devices(*programs_, on_cpu);
  if (leads()) {
    print_differences(differences, config_.train.compute_dtype(), std::cerr);
  }
}

void Trainer::open_data() {
  samples_.emplace(open_training_data(config_));
  if (!config_.data.valid.empty()) {
    Dataset valid = Dataset::open(config_.data.valid);
    valid.require_vocabulary(config_.model.vocab_size);
    const Dataset& train = samples_->config().sources.front().dataset;
    require(valid.tokenizer_hash() == train.tokenizer_hash(), config_.data.valid, ": was prepared with another tokenizer than ",
            train.folder().string(), "; prepare it again with that one's");
    evaluator_ =
        std::make_unique<Evaluator>(std::move(valid), BatchShape{config_.train.micro_batch, config_.data.sequence_length},
                                    config_.eval.windows, communicator_);
  }
}

void Trainer::open_run_folder() {
  on_first_rank([&] { claim_run_folder(config_, samples_->config().sources, evaluator_ ? &evaluator_->dataset() : nullptr); });
}

void Trainer::open_checkpoints() {
  const CheckpointConfig& c = config_.checkpoint;
  checkpoints_ = std::make_unique<CheckpointWriter>(
      folder() / kCheckpointFolder,
      CheckpointWriter::Settings{.background = c.background,
                                 .retention = {.keep = c.keep, .keep_every = c.keep_every, .keep_best = c.keep_best},
                                 .say = [this](std::string_view text) { progress_->message(text); }},
      communicator_);
}

void Trainer::resume() {
  open_checkpoints();
  const auto found = newest_checkpoint(folder() / kCheckpointFolder, communicator_);
  if (!found) {
    programs_->initialize(static_cast<std::uint64_t>(config_.train.seed));
    state_.data_fingerprint = samples_->fingerprint();
  } else {
    state_ = found->manifest.state;
    require(
        state_.data_fingerprint == samples_->fingerprint(), found->folder.string(),
        ": was trained on other data (or another seed, sequence length or weights of sources); resuming would skip and repeat "
        "samples. Put the data back, or start another run.folder");
    load_slices(*found, programs_->kept_state());
    programs_->refresh_compute_weights();
    checkpoints_->loaded(state_.step);
  }
  state_.configuration = to_toml(config_);
}

void Trainer::start_loader() {
  const std::int64_t count = share_.count(), first_step = state_.step;
  if (count > 0) {
    const auto plan = [share = share_, count, first_step, train = config_.train](std::uint64_t k) {
      std::vector<std::uint64_t> samples;
      const std::int64_t at_step = first_step + static_cast<std::int64_t>(k) / count;
      if (at_step < train.steps) {
        const std::int64_t micro = share.micro_batch(static_cast<std::int64_t>(k) % count);
        for (std::int64_t i = 0; i < train.micro_batch; ++i) {
          samples.push_back(static_cast<std::uint64_t>(at_step * train.global_batch + micro * train.micro_batch + i));
        }
      }
      return samples;
    };
    loader_ = std::make_unique<Loader>(*samples_, plan, static_cast<std::size_t>(config_.data.prefetch));
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
  metrics_ = std::make_unique<MetricsLog>(folder() / kMetricsFile, state_.step);
  progress_ = std::make_unique<ProgressLine>(out, config_.train.steps, state_.step, ProgressLine::for_standard_error());
}

Trainer::Outcome Trainer::run() {
  if (state_.step >= config_.train.steps) {
    if (leads()) {
      progress_->message(
          "this run has finished already; give it more train.steps in a new run.folder, or look at it with eval");
    }
    return Outcome::finished;
  }
  while (state_.step < config_.train.steps) {
    const StepResult result = step();
    after_step(result);
    if (result.stop_votes > 0 && state_.step < config_.train.steps) {
      checkpoints_->save_now(state_, programs_->saved_state());
      if (leads()) {
        progress_->message(concat("stopped after step ", format_integer(state_.step),
                                  ", as asked; everything is saved, run the same command to go on"));
        progress_->finish();
      }
      return Outcome::stopped;
    }
  }
  if (evaluator_ && evaluated_step_ != state_.step) {
    evaluate();
  }
  checkpoints_->save_now(state_, programs_->saved_state());
  if (leads()) {
    progress_->finish();
    if (config_.train.debug) {
      profile_.print(std::cerr, peak_flops_);
    }
  }
  return Outcome::finished;
}

StepResult Trainer::step() {
  step_began_ = monotonic_seconds();
  if (leads() && !config_.train.watch.empty()) {
    std::cerr << "step " << state_.step + 1 << '\n';
  }
  std::vector<std::int64_t> samples;
  for (std::int64_t j = 0; j < share_.count(); ++j) {
    const Batch batch = loader_->next();
    samples.assign(batch.sample_indices.begin(), batch.sample_indices.end());
    programs_->inputs().write(batch.tokens, batch.document_starts, samples, static_cast<std::uint64_t>(config_.train.seed),
                              state_.step);
    if (compare_cpu_) {
      compare_with_cpu(batch, samples);
    }
    if (j + 1 < share_.rounds()) {
      naming_samples(samples, [&] { programs_->accumulate(); });
    }
  }
  const OptimConfig& o = config_.optim;
  const ScheduleSettings schedule{.name = o.schedule,
                                  .peak = o.lr,
                                  .warmup = o.warmup,
                                  .steps = config_.train.steps,
                                  .min_ratio = o.lr_min_ratio,
                                  .decay = o.decay};
  return naming_samples(samples, [&] {
    return programs_->finish_step(learning_rate(schedule, state_.step), state_.updates, share_.count() < share_.rounds(),
                                  stop_requested != 0);
  });
}

void Trainer::after_step(const StepResult& result) {
  const double seconds = monotonic_seconds() - step_began_;
  ++state_.step;
  state_.validation_loss.reset();
  state_.updates += result.skipped ? 0 : 1;
  state_.seconds += seconds;
  window_seconds_ += seconds;
  ++window_steps_;
  skipped_in_a_row_ = result.skipped ? skipped_in_a_row_ + 1 : 0;
  if (result.skipped && leads()) {
    progress_->message(concat("step ", format_integer(state_.step), ": loss ", result.loss, ", gradient norm ",
                              result.gradient_norm, ": not finite, so the update was skipped"));
  }
  require(skipped_in_a_row_ < kMostSkippedInARow, "training: the loss or gradient of steps ",
          state_.step - kMostSkippedInARow + 1, " to ", state_.step, " was not finite (last loss ", result.loss,
          "); lower optim.lr, or run again with --train.debug true to see which operation makes it");
  if (due(config_.train.log_every) || state_.step == config_.train.steps) {
    log(result);
  }
  if (evaluator_ && due(config_.eval.every)) {
    evaluate();
  }
  checkpoints_->poll();
  if (due(config_.checkpoint.every) && state_.step < config_.train.steps) {  // `run` saves the last step
    checkpoints_->save(state_, programs_->saved_state());
  }
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
    record.more.emplace_back("loader_wait_seconds", loader_ ? loader_->wait_seconds() : 0.0);
    metrics_->append(record);
    progress_->update(record);
  }
  window_seconds_ = 0;
  window_steps_ = 0;
}

void Trainer::evaluate() {
  const EvaluationResult result = evaluator_->run(*programs_);
  evaluated_step_ = state_.step;
  state_.validation_loss = result.loss;
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
  metrics_->append(record);
  char text[160];
  std::snprintf(
      text, sizeof text, "validation after step %s: loss %.4f, perplexity %.2f per token, %.1f per word, %.4f bits per byte",
      format_integer(state_.step).c_str(), result.loss, result.perplexity(), result.word_perplexity(), result.bits_per_byte());
  progress_->message(text);
}

}  // namespace attamba
