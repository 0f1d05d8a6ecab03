#include "src/train/trainer.h"

#include <algorithm>
#include <exception>
#include <iostream>
#include <nlohmann/json.hpp>
#include <utility>

#include "comm/single_process.h"
#include "src/core/clock.h"
#include "src/core/error.h"
#include "src/optim/schedule.h"
#include "src/train/events.h"
#include "src/train/inspect.h"
#include "src/train/run_folder.h"
#include "src/train/run_plan.h"

namespace attamba {

namespace {

namespace fs = std::filesystem;

/// A stop waits for data so long before the step is abandoned.
constexpr double kPatienceWithData = 1;
/// When data does not come for so many seconds, a message says what is being read.
constexpr double kSlowData = 4;

}  // namespace

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
    : config_(config),
      communicator_(communicator),
      device_(device),
      time_limit_(config.run.time_limit, config.run.stop_before_seconds),
      bad_steps_({.spike_factor = config.train.spike_factor,
                  .skips_before_rollback = config.train.skips_before_rollback,
                  .rollbacks = config.train.rollbacks}) {
  validate(config_);
  require<UsageError>(!config_.run.folder.empty(), "run.folder is not set; name a folder for this run's results");
  share_ = {.per_step = config_.train.global_batch / config_.train.micro_batch,
            .rank = communicator_.rank(),
            .ranks = communicator_.size()};
  watchdog_ = std::make_unique<Watchdog>(
      communicator_, Watchdog::Settings{.seconds = config_.run.watchdog_seconds,
                                        .patience = config_.run.watchdog_patience,
                                        .events = folder() / kEventsFile,
                                        .asked_to_stop = [this](double step) { return own_stop_request(step); }});
  using Part = void (Trainer::*)();
  for (const Part part : {&Trainer::open_data, &Trainer::make_programs, &Trainer::open_run_folder, &Trainer::resume,
                          &Trainer::open_metrics, &Trainer::start_reading, &Trainer::report_setup}) {
    watchdog_->enter(part == &Trainer::resume ? Phase::loading : Phase::starting, state_.step);
    (this->*part)();
    if (vote_on_stop()) {
      return;
    }
  }
}

Trainer::~Trainer() = default;

void Trainer::make_programs() {
  chunking_ = make_model_chunking(config_.model, config_.data.sequence_length);
  programs_ = make_run_programs(config_, chunking_.get(), device_, communicator_);
  set_up_debugging();
}

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
  } catch (const RanksDisagree& error) {
    throw Error(concat(error.what(), "; step ", state_.step + 1));
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
                                 .say = [this](std::string_view text) { say(std::string(text)); },
                                 .saved =
                                     [this](std::int64_t step) {
                                       append_event(folder() / kEventsFile, {{"event", "saved"}, {"step", step}});
                                     }},
      communicator_);
}

void Trainer::resume() {
  open_checkpoints();
  on_first_rank([&] { tidy_checkpoints(folder() / kCheckpointFolder); });
  if (!load_newest_checkpoint()) {
    require_no_checkpoint_was_lost();
    programs_->initialize(static_cast<std::uint64_t>(config_.train.seed));
    state_.data_fingerprint = samples_->fingerprint();
  }
  state_.configuration = to_toml(config_);
  bad_steps_.restore(state_);
  rolled_back_to_ = state_.step;
  const std::int64_t every = config_.checkpoint.every, last_good = state_.step - state_.skipped_in_a_row;
  save_due_ = every > 0 && state_.step / every > last_good / every;  // between bad steps none was made
}

/// Beginning again would throw away what the run has done, so it has to be meant.
void Trainer::require_no_checkpoint_was_lost() {
  on_first_rank([&] {
    const fs::path checkpoints = folder() / kCheckpointFolder, events = folder() / kEventsFile;
    require<UsageError>(config_.run.resume != "must", checkpoints.string(),
                        ": holds no checkpoint, and run.resume is must; is run.folder right, and its file system there?");
    const std::optional<std::int64_t> saved = last_saved_step(events);
    require<UsageError>(!saved, checkpoints.string(), ": holds no checkpoint, but the run has saved one after step ",
                        saved.value_or(0), " (", events.string(),
                        "); is its file system there? To begin again choose another run.folder, or remove ", events.string());
  });
}

bool Trainer::load_newest_checkpoint(bool to_go_back_to) {
  const auto found = newest_checkpoint(folder() / kCheckpointFolder, communicator_, to_go_back_to);
  if (!found) {
    return false;
  }
  state_ = found->manifest.state;
  state_.configuration = to_toml(config_);
  require(
      state_.data_fingerprint == samples_->fingerprint(), found->folder.string(),
      ": was trained on other data (or another seed, sequence length or weights of sources); resuming would skip and repeat "
      "samples. Put the data back, or start another run.folder");
  load_slices(*found, programs_->kept_state());
  programs_->refresh_compute_weights();
  checkpoints_->loaded(state_.step);
  return true;
}

/// Cuts the metrics back to the step that the run is at, and finds out which step was evaluated last.
void Trainer::open_metrics() {
  on_first_rank([&] {
    metrics_.reset();
    metrics_ = std::make_unique<MetricsLog>(folder() / kMetricsFile, state_.step);
    evaluated_step_ = -1;
    for (const MetricsRecord& record : read_metrics(folder() / kMetricsFile)) {
      evaluated_step_ = record.eval_loss ? record.step : evaluated_step_;
    }
  });
  communicator_.broadcast({&evaluated_step_, {DType::int64, {1}}}, 0);
}

void Trainer::start_reading() {
  inputs_hold_.reset();
  batches_.reset();
  batches_ = std::make_unique<BatchFeed>(*samples_, BatchFeed::Settings{.share = share_,
                                                                        .micro_batch = config_.train.micro_batch,
                                                                        .first_step = state_.step,
                                                                        .end_step = config_.train.steps,
                                                                        .passed_over = state_.passed_over,
                                                                        .depth = config_.data.prefetch});
}

// ---------------------------------------------------------------------------------------------- stopping

/// A signal of this rank's own, or the end of the job's time (rank 0 has the clock). The watchdog's thread asks, too.
std::optional<StopRequest> Trainer::own_stop_request(double median_step) const {
  if (const std::int64_t signal = stop_signal(); signal != 0) {
    return StopRequest{communicator_.rank(), signal};
  }
  if (leads() && time_limit_.is_up(monotonic_seconds(), median_step, save_seconds_)) {
    return StopRequest{0, kTimeIsUp};
  }
  return std::nullopt;
}

bool Trainer::vote_on_stop() {
  watchdog_->tick();
  std::vector<std::int64_t> votes(static_cast<std::size_t>(communicator_.size()));
  votes[static_cast<std::size_t>(communicator_.rank())] = pack(watchdog_->asked_to_stop());
  communicator_.all_reduce_sum({votes.data(), {DType::int64, {communicator_.size()}}});
  for (const std::int64_t vote : votes) {
    stop_ = stop_ ? stop_ : unpack_stop(vote);
  }
  return stop_.has_value();
}

// ---------------------------------------------------------------------------------------------- the loop

Trainer::Outcome Trainer::run() {
  if (!stop_ && complete()) {
    say("this run has finished already; give it more train.steps in a new run.folder, or look at it with eval");
    return Outcome::finished;
  }
  if (!stop_ && state_.step > 0 && evaluation_is_due() && evaluated_step_ != state_.step) {
    evaluate();  // what a stop cut short
  }
  while (!stop_ && state_.step < config_.train.steps) {
    const StepResult result = step();
    bool abandoned = false;
    for (const RankNews& news : result.news) {
      stop_ = stop_ ? stop_ : unpack_stop(news.stop);
      abandoned = abandoned || news.abandoned != 0;
    }
    if (!abandoned) {
      after_step(result);
    }
  }
  if (!stop_ && evaluator_ && evaluated_step_ != state_.step) {
    evaluate();
  }
  if (checkpoints_ && (state_.step > 0 || state_.passed_over > 0)) {
    watchdog_->enter(Phase::saving, state_.step);
    bad_steps_.store(state_);
    checkpoints_->save_now(state_, programs_->saved_state());
  }
  if (metrics_) {
    metrics_->finish();
  }
  report_end();
  return complete() ? Outcome::finished : Outcome::stopped;
}

bool Trainer::complete() const {
  return state_.step >= config_.train.steps && (!evaluator_ || evaluated_step_ == state_.step);
}

/// The next batch; null when the ranks are to stop and it does not come.
const Batch* Trainer::next_batch() {
  constexpr double kLook = 0.05;
  if (!batches_->wait(0)) {
    watchdog_->enter(Phase::data, state_.step);
    double asked = 0;
    for (int looks = 1; !batches_->wait(kLook); ++looks) {
      asked += watchdog_->asked_to_stop() ? kLook : 0;
      if (asked >= kPatienceWithData) {
        data_stuck_ = true;
        return nullptr;
      }
      if (looks == static_cast<int>(kSlowData / kLook)) {
        report_slow_data(kSlowData);
      }
    }
    watchdog_->enter(Phase::step, state_.step);
  }
  return &batches_->next();
}

/// `step` steps are done before the one that computes them.
void Trainer::write_inputs(const Batch& batch, std::int64_t step) {
  const std::vector<std::int64_t> samples(batch.sample_indices.begin(), batch.sample_indices.end());
  programs_->inputs().write(batch.tokens, batch.document_starts, samples, static_cast<std::uint64_t>(config_.train.seed), step);
  inputs_hold_ = batch.micro_batch;
}

/// While a device ends a step: the next one's first batch, if it has been read.
void Trainer::write_ahead() {
  if (state_.step + 1 < config_.train.steps && !data_stuck_) {
    if (const Batch* batch = batches_->peek()) {
      write_inputs(*batch, state_.step + 1);
    }
  }
}

/// Of this process, for other ranks or for data.
double Trainer::seconds_waited() const {
  return communicator_.progress().waited() + batches_->wait_seconds();
}

StepResult Trainer::step() {
  step_began_ = monotonic_seconds();
  const double waited = seconds_waited();
  watchdog_->enter(Phase::step, state_.step);
  if (leads() && !config_.train.watch.empty()) {
    std::cerr << "step " << state_.step + 1 << '\n';
  }
  std::vector<std::int64_t> samples;
  for (std::int64_t j = 0; j < share_.rounds(); ++j) {
    const bool last = j + 1 == share_.rounds();
    if (j < share_.count() && !data_stuck_) {
      if (const Batch* batch = next_batch()) {
        samples.assign(batch->sample_indices.begin(), batch->sample_indices.end());
        if (inputs_hold_ != batch->micro_batch) {
          write_inputs(*batch, state_.step);
        }
        if (compare_cpu_) {
          compare_with_cpu(*batch, samples);
        }
      } else {
        programs_->poison_step();
      }
    }
    // A rank whose data does not come replays what it has, where the others' replays need it: the step does not count.
    if (!last && (!data_stuck_ || programs_->runs_together(ProgramKind::accumulate))) {
      naming_samples(samples, [&] { programs_->accumulate(); });
    }
    watchdog_->tick();
  }
  const OptimConfig& o = config_.optim;
  const ScheduleSettings schedule{.name = o.schedule,
                                  .peak = o.lr,
                                  .warmup = o.warmup,
                                  .steps = config_.train.steps,
                                  .min_ratio = o.lr_min_ratio,
                                  .decay = o.decay};
  news_.stop = pack(watchdog_->asked_to_stop());
  news_.abandoned = data_stuck_ ? 1 : 0;
  norm_limit_ = bad_steps_.norm_limit();
  const StepResult result = naming_samples(samples, [&] {
    return programs_->finish_step(learning_rate(schedule, state_.step), state_.updates, share_.count() < share_.rounds(), news_,
                                  norm_limit_, [this] { write_ahead(); });
  });
  const double own = monotonic_seconds() - step_began_ - (seconds_waited() - waited);
  // The host's time says nothing about a GPU's.
  news_.nanoseconds = ++steps_here_ <= Watchdog::kFirstSteps || share_.count() == 0 || device_ != Device::cpu
                          ? 0
                          : static_cast<std::int64_t>(1e9 * own / static_cast<double>(share_.count()));
  news_.fingerprint = fingerprint(result);
  return result;
}

void Trainer::after_step(const StepResult& result) {
  require_agreement(result.news, fingerprinted_step_);
  fingerprinted_step_ = state_.step + 1;  // is told with the next step
  const double seconds = monotonic_seconds() - step_began_;
  watchdog_->step_took(seconds);
  ++state_.step;
  state_.validation_loss.reset();
  state_.updates += result.skipped ? 0 : 1;
  state_.seconds += seconds;
  window_seconds_ += seconds;
  ++window_steps_;
  watchdog_->enter(Phase::writing, state_.step);
  find_slow_ranks(result.news);
  const BadSteps::Verdict verdict = bad_steps_.judge(result);
  if (result.skipped || due(config_.train.log_every) || state_.step == config_.train.steps) {
    log(result);
  }
  if (verdict == BadSteps::Verdict::roll_back) {
    roll_back(result);
    return;
  }
  if (!stop_ && evaluation_is_due()) {
    evaluate();
  }
  watchdog_->enter(Phase::saving, state_.step);
  checkpoints_->poll();
  note_recovery();
  save_due_ = save_due_ || due(config_.checkpoint.every);
  // A bad step's checkpoint would be no place to go back to; the last step, and one to stop at, are saved by `run`.
  if (save_due_ && bad_steps_.skipped_in_a_row() == 0 && !stop_ && state_.step < config_.train.steps) {
    save_due_ = false;
    bad_steps_.store(state_);
    state_.rollbacks = 0;  // where this is on the disk, the run has got over them
    checkpoints_->save(state_, programs_->saved_state());
    vote_on_stop();
  }
  save_seconds_ = checkpoints_->save_seconds();
}

/// A checkpoint after good steps is on the disk: earlier rollbacks do not count any more.
void Trainer::note_recovery() {
  if (checkpoints_->saved_step() > rolled_back_to_) {
    bad_steps_.recovered();
  }
}

/// Checkpoints that end with bad steps behind the one that the run goes back to.
void Trainer::remove_abandoned() {
  try {
    remove_bad_checkpoints(folder() / kCheckpointFolder, state_.step);
  } catch (const std::exception& error) {
    say(concat("a checkpoint that ends with bad steps could not be removed: ", error.what()));
  }
}

/// Back to the newest checkpoint, and on with the samples after those of the step that was last: all in between are left out.
void Trainer::roll_back(const StepResult& result) {
  const std::int64_t from = state_.step, passed_over = state_.passed_over;
  const std::int64_t first_bad = from - bad_steps_.skipped_in_a_row() + 1;
  const std::string what = concat("training: steps ", first_bad, " to ", from, " were skipped (last loss ", result.loss,
                                  ", gradient norm ", result.gradient_norm, ": ", describe_bad(result), ")");
  const std::string advice =
      "; lower optim.lr, raise train.spike_factor if such norms are right, or run again with --train.debug true to see which "
      "operation makes a number that is not finite";
  watchdog_->enter(Phase::loading, from);
  checkpoints_->finish();
  note_recovery();
  require(bad_steps_.may_roll_back(), what, " after ", bad_steps_.rollbacks(), " rollbacks in a row", advice);
  require(load_newest_checkpoint(true), what, ", and there is no checkpoint to go back to", advice);
  state_.passed_over = passed_over + (from - state_.step);
  bad_steps_.rolled_back(state_);
  rolled_back_to_ = state_.step;
  checkpoints_->changed();  // a stop from now on has to save these numbers
  if (leads()) {
    remove_abandoned();
  }
  save_due_ = false;
  window_seconds_ = 0;
  window_steps_ = 0;
  open_metrics();
  start_reading();
  watchdog_->enter(Phase::writing, from);
  report_rollback(first_bad, from);
}

void Trainer::evaluate() {
  inputs_hold_.reset();
  const auto stop = [this] {
    const bool asked = vote_on_stop();
    watchdog_->enter(Phase::data, state_.step);
    return asked;
  };
  const auto computing = [this] { watchdog_->enter(Phase::evaluation, state_.step); };
  if (const std::optional<EvaluationResult> result = evaluator_->run(*programs_, {.stop = stop, .computing = computing})) {
    watchdog_->enter(Phase::writing, state_.step);
    evaluated_step_ = state_.step;
    state_.validation_loss = result->loss;
    report_evaluation(*result);
    checkpoints_->evaluated(state_);
  }
}

}  // namespace attamba
