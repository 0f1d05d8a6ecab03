// The training loop of one rank: batches in, weights and metrics out.
#pragma once

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "comm/communicator.h"
#include "data/batch_feed.h"
#include "src/train/bad_steps.h"
#include "src/train/checkpoint_writer.h"
#include "src/train/config.h"
#include "src/train/evaluate.h"
#include "src/train/metrics.h"
#include "src/train/op_profile.h"
#include "src/train/programs.h"
#include "src/train/slow_ranks.h"
#include "src/train/stop.h"
#include "src/train/watchdog.h"

namespace attamba {

class Trainer {
 public:
  enum class Outcome : std::uint8_t { finished, stopped };

  /// Opens data and the run folder, builds all programs, and loads the newest checkpoint when there is one. Every rank throws
  /// when any rank cannot go on.
  Trainer(const Config& config, Communicator& communicator, Device device = Device::cpu);
  ~Trainer();

  /// Trains to the last step, or until a rank was asked to stop (stop.h): all ranks then save the same step.
  Outcome run();

 private:
  void open_data();
  void make_programs();
  void open_run_folder();
  void resume();
  bool load_newest_checkpoint(bool to_go_back_to = false);
  void require_no_checkpoint_was_lost();
  void open_metrics();
  void start_reading();
  void report_setup();
  void set_up_debugging();
  std::optional<StopRequest> own_stop_request(double median_step) const;
  /// All ranks call it, and then either all stop or none does. Between votes, each step's reduction carries the wish.
  bool vote_on_stop();
  bool complete() const;
  const Batch* next_batch();
  void write_inputs(const Batch& batch, std::int64_t step);
  void write_ahead();
  double seconds_waited() const;
  StepResult step();
  /// Runs `body`; a number that is not finite is reported with the step and with the sample, one of those in the inputs.
  template <class Body>
  auto naming_samples(const std::vector<std::int64_t>& batch_samples, const Body& body);
  void compare_with_cpu(const Batch& batch, const std::vector<std::int64_t>& samples);
  void after_step(const StepResult& result);
  void note_recovery();
  void remove_abandoned();
  void roll_back(const StepResult& result);
  void evaluate();
  bool evaluation_is_due() const { return evaluator_ && due(config_.eval.every); }

  // trainer_report.cpp
  void say(const std::string& text);
  void log_event(nlohmann::json event);
  void log(const StepResult& result);
  void report_slow_data(double seconds);
  void append_metrics(const MetricsRecord& record);
  void find_slow_ranks(std::span<const RankNews> news);
  void report_skipped(const StepResult& result, MetricsRecord& record);
  void report_rollback(std::int64_t first_bad, std::int64_t last_bad);
  void report_evaluation(const EvaluationResult& result);
  void report_end();

  bool due(std::int64_t every) const { return every > 0 && state_.step % every == 0; }
  bool leads() const { return communicator_.rank() == 0; }
  std::filesystem::path folder() const { return config_.run.folder; }
  void open_checkpoints();
  /// Runs `body` on rank 0; when it throws there, every rank throws.
  template <class Body>
  void on_first_rank(const Body& body);

  Config config_;
  Communicator& communicator_;
  Device device_;
  MicroBatchShare share_;
  std::optional<SampleSource> samples_;
  std::unique_ptr<Evaluator> evaluator_;
  std::unique_ptr<ChunkingStrategy> chunking_;
  std::unique_ptr<ModelPrograms> programs_;
  std::unique_ptr<BatchFeed> batches_;
  std::optional<std::uint64_t> inputs_hold_;  ///< number of the feed's batch that is in the programs' inputs
  std::unique_ptr<CheckpointWriter> checkpoints_;
  TrainingState state_;
  double peak_flops_ = 0;
  std::unique_ptr<MetricsLog> metrics_;
  bool metrics_wait_ = false;  ///< lines could not be written so far
  std::unique_ptr<ProgressLine> progress_;
  OpProfile profile_;
  bool compare_cpu_ = false;  ///< still to be done, before the next micro-batch
  TimeLimit time_limit_;
  BadSteps bad_steps_;
  SlowRanks slow_ranks_;
  std::optional<StopRequest> stop_;  ///< all ranks have agreed on it
  RankNews news_;                    ///< told with the next step
  double norm_limit_ = 0;
  std::int64_t steps_here_ = 0;          ///< of this process
  std::int64_t fingerprinted_step_ = 0;  ///< whose fingerprint is told with the next step
  bool data_stuck_ = false, save_due_ = false;
  std::int64_t rolled_back_to_ = 0;  ///< step; or that of the checkpoint that was loaded
  std::atomic<double> save_seconds_ = 0;
  double step_began_ = 0, window_seconds_ = 0;  ///< seconds of steps since the last logged one
  std::int64_t window_steps_ = 0;
  std::int64_t evaluated_step_ = -1;
  std::unique_ptr<Watchdog> watchdog_;  ///< last, so that it goes first
};

}  // namespace attamba
