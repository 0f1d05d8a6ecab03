// The typed configuration of a run. Every struct lists its keys once, in `describe`; reading TOML, command-line overrides,
// help, writing the resolved configuration and JSON all follow that list.
#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "src/core/dtype.h"
#include "src/core/field.h"
#include "src/models/model_config.h"
#include "src/optim/optimizer.h"
#include "src/optim/schedule.h"

namespace attamba {

struct DataConfig {
  std::vector<std::string> train = {};  ///< "folder" or "folder:weight"; read it with `weighted_folders`
  std::string valid = "";               ///< empty = no evaluation while training
  std::int64_t sequence_length = 1024;  ///< n
  std::int64_t prefetch = 4;

  friend bool operator==(const DataConfig&, const DataConfig&) = default;

  template <class Self, class Visitor>
  static void describe(Self& self, Visitor&& visit) {
    visit.field("train", self.train, Field{"tokenized folders to train on, each \"folder\" or \"folder:weight\""});
    visit.field("valid", self.valid, Field{"tokenized folder to evaluate on while training; empty = none"});
    visit.field("sequence_length", self.sequence_length, Field{"length n of a training sequence", "tokens"});
    visit.field("prefetch", self.prefetch, Field{"micro-batches read ahead by the loader's thread", "batches"});
  }
};

struct OptimConfig {
  std::string name = "adamw";
  double lr = 3e-3;
  double beta1 = 0.9;
  double beta2 = 0.95;
  double eps = 1e-8;
  double weight_decay = 0.033;
  double clip = 1.0;
  std::string schedule = "cosine";
  std::int64_t warmup = 5000;
  double lr_min_ratio = 1e-6;
  double decay = 0.2;

  friend bool operator==(const OptimConfig&, const OptimConfig&) = default;

  template <class Self, class Visitor>
  static void describe(Self& self, Visitor&& visit);
};

struct TrainConfig {
  std::int64_t steps = 60000;
  std::int64_t micro_batch = 16;   ///< sequences per rank and program replay
  std::int64_t global_batch = 16;  ///< sequences per optimizer step, over all ranks
  std::int64_t seed = 0;
  std::string dtype = "float32";  ///< read it with `compute_dtype()`
  std::string device = "auto";
  std::string transport = "auto";
  bool recompute = false;
  bool deterministic = false;
  std::int64_t zero = 0;
  std::string zero_group = "all";
  std::int64_t threads = 0;
  double spike_factor = 10;
  std::int64_t skips_before_rollback = 3;
  std::int64_t rollbacks = 2;
  std::int64_t log_every = 10;
  bool debug = false;
  std::string watch = "";
  bool compare_cpu = false;

  friend bool operator==(const TrainConfig&, const TrainConfig&) = default;

  DType compute_dtype() const;

  template <class Self, class Visitor>
  static void describe(Self& self, Visitor&& visit) {
    visit.field("steps", self.steps, Field{"optimizer steps of the whole run", "steps"});
    visit.field("micro_batch", self.micro_batch, Field{"sequences that one rank computes at a time", "sequences"});
    visit.field("global_batch", self.global_batch,
                Field{"sequences per optimizer step over all ranks, a multiple of micro_batch", "sequences"});
    visit.field("seed", self.seed, Field{"seed of initialisation, sample order and random chunking"});
    visit.field("dtype", self.dtype,
                Field{"compute type; float32 master weights in any case", "", {"float32", "bfloat16", "float64"}});
    visit.field("device", self.device, Field{"where to compute; auto = cuda when present", "", {"auto", "cpu", "cuda"}});
    visit.field(
        "transport", self.transport,
        Field{"how ranks sum up gradients on GPUs: auto, nccl = NCCL, a GPU per rank; staged = through host memory, any "
              "number of ranks per GPU",
              "",
              {"auto", "nccl", "staged"}});
    visit.field("recompute", self.recompute, Field{"recompute each block in the backward pass: less memory, more time"});
    visit.field("deterministic", self.deterministic, Field{"the same bits for any number of ranks"});
    visit.field("zero", self.zero,
                Field{"what ranks divide among them instead of each keeping it: 0 = nothing; 1 = optimizer state and master "
                      "weights; 2 = gradients too; 3 = weights too"});
    visit.field(
        "zero_group", self.zero_group,
        Field{"who divides: all ranks, or those of each node among them, so that nodes exchange parts of gradients alone",
              "",
              {"all", "node"}});
    visit.field("threads", self.threads, Field{"threads per rank; 0 = all that this process may use", "threads"});
    visit.field(
        "spike_factor", self.spike_factor,
        Field{"a step is skipped when its gradient norm is above so many times the median of the last 64; 0 = only when "
              "it is not finite"});
    visit.field(
        "skips_before_rollback", self.skips_before_rollback,
        Field{"after so many skipped steps in a row the run goes back to its newest checkpoint, and on past their samples",
              "steps"});
    visit.field("rollbacks", self.rollbacks,
                Field{"rollbacks without a good checkpoint in between after which the run fails; 0 = fail at once"});
    visit.field("log_every", self.log_every, Field{"metrics are logged this often", "steps"});
    visit.field("debug", self.debug, Field{"run op by op: check each result for NaN and infinity, and time it"});
    visit.field("watch", self.watch,
                Field{"print statistics of every tensor whose name matches this pattern, like layers.0.* or gradient/*wq*"});
    visit.field(
        "compare_cpu", self.compare_cpu,
        Field{"before the first step, compare each op's result on its batch with the CPU's and name the first difference"});
  }
};

struct EvalConfig {
  std::int64_t every = 1000;
  std::int64_t windows = 0;

  friend bool operator==(const EvalConfig&, const EvalConfig&) = default;

  template <class Self, class Visitor>
  static void describe(Self& self, Visitor&& visit) {
    visit.field("every", self.every, Field{"evaluate on data.valid this often; 0 = only after the last step", "steps"});
    visit.field("windows", self.windows, Field{"sequences to evaluate on; 0 = all of data.valid", "sequences"});
  }
};

struct CheckpointConfig {
  std::int64_t every = 5000;
  bool background = true;
  std::int64_t keep = 2;
  std::int64_t keep_every = 0;
  bool keep_best = false;

  friend bool operator==(const CheckpointConfig&, const CheckpointConfig&) = default;

  template <class Self, class Visitor>
  static void describe(Self& self, Visitor&& visit) {
    visit.field("every", self.every, Field{"save this often; 0 = only after the last step or when told to stop", "steps"});
    visit.field("background", self.background,
                Field{"write while training goes on, from a copy in host memory of what each rank saves"});
    visit.field("keep", self.keep, Field{"checkpoints to keep, the newest; 0 = all", "checkpoints"});
    visit.field("keep_every", self.keep_every,
                Field{"keep for ever those of every so many steps, a multiple of every; 0 = none", "steps"});
    visit.field("keep_best", self.keep_best,
                Field{"keep the one with the lowest validation loss; every must be a multiple of eval.every"});
  }
};

struct RunConfig {
  std::string folder = "";
  std::string resume = "auto";
  double time_limit = 0;
  double stop_before_seconds = 60;
  double watchdog_seconds = 10;
  double watchdog_patience = 600;

  friend bool operator==(const RunConfig&, const RunConfig&) = default;

  template <class Self, class Visitor>
  static void describe(Self& self, Visitor&& visit) {
    visit.field("folder", self.folder, Field{"where metrics, the resolved configuration and checkpoints go"});
    visit.field(
        "resume", self.resume,
        Field{"auto = go on from the folder's newest valid checkpoint, if any; must = refuse a folder without one; never = "
              "refuse a folder that holds a run",
              "",
              {"auto", "must", "never"}});
    visit.field("time_limit", self.time_limit,
                Field{"stop and save in time before the program has run so long; 0 = only before SLURM_JOB_END_TIME, if set",
                      "seconds"});
    visit.field("stop_before_seconds", self.stop_before_seconds,
                Field{"reserve before the time limit, beyond what steps and saves have taken so far", "seconds"});
    visit.field(
        "watchdog_seconds", self.watchdog_seconds,
        Field{"a rank that hangs is named, and the job ended, within so long or 5 median steps; 0 = no watchdog", "seconds"});
    visit.field("watchdog_patience", self.watchdog_patience,
                Field{"the same for what takes longer: starting, first steps, waiting for data, loading, saving", "seconds"});
  }
};

struct Config {
  ModelConfig model;
  DataConfig data;
  OptimConfig optim;
  TrainConfig train;
  EvalConfig eval;
  CheckpointConfig checkpoint;
  RunConfig run;

  friend bool operator==(const Config&, const Config&) = default;

  template <class Self, class Visitor>
  static void describe(Self& self, Visitor&& visit) {
    visit.section("model", self.model, "the network");
    visit.section("data", self.data, "what to train and evaluate on");
    visit.section("optim", self.optim, "optimizer and learning rate");
    visit.section("train", self.train, "the loop");
    visit.section("eval", self.eval, "evaluation while training");
    visit.section("checkpoint", self.checkpoint, "saving");
    visit.section("run", self.run, "where the run lives");
  }
};

/// Reads TOML over the defaults. Errors name `source`:line:column. Nothing is validated beyond names and types.
Config parse_config(std::string_view toml, std::string_view source);
Config load_config(const std::filesystem::path& file);

/// Sets one key ("model.ssm.hidden") from text as given on a command line; lists are separated by commas.
void set_key(Config& config, std::string_view key, std::string_view text);

/// The whole configuration as TOML; `parse_config` gives back an equal one, every double bit for bit.
std::string to_toml(const Config& config);

/// One key as a user meets it in help, with the text of its default.
struct ConfigKey {
  std::string key;      ///< "model.ssm.hidden"
  std::string section;  ///< "model.ssm"
  std::string about;    ///< what the section holds
  std::string type;     ///< "integer", "number", "true|false", "text", "list", or the choices as "a|b|c"
  std::string help;
  std::string default_text;
  bool list = false;
};
std::vector<ConfigKey> config_keys();

/// JSON with the same keys, as in golden files. Reading: a missing key keeps its default, an unknown one or a wrong type is a
/// UsageError that names `source`.
nlohmann::json to_json(const ModelConfig& config);
nlohmann::json to_json(const Config& config);
ModelConfig model_config_from_json(const nlohmann::json& json, std::string_view source);
Config config_from_json(const nlohmann::json& json, std::string_view source);

/// Throws a UsageError that names the key, its value and the way out when no such run can exist.
void validate(const Config& config);

struct WeightedFolder {
  std::filesystem::path folder;
  double weight = 1.0;
  friend bool operator==(const WeightedFolder&, const WeightedFolder&) = default;
};
/// `data.train` taken apart: "folder" has weight 1, "folder:2.5" has 2.5.
std::vector<WeightedFolder> weighted_folders(const std::vector<std::string>& folders);

template <class Self, class Visitor>
void OptimConfig::describe(Self& self, Visitor&& visit) {
  visit.field("name", self.name, Field{"optimizer", "", optimizer_names()});
  visit.field("lr", self.lr, Field{"peak learning rate"});
  visit.field("beta1", self.beta1, Field{"decay of the first moment"});
  visit.field("beta2", self.beta2, Field{"decay of the second moment"});
  visit.field("eps", self.eps, Field{"added to the root of the second moment"});
  visit.field("weight_decay", self.weight_decay, Field{"decoupled weight decay, times the learning rate, on every parameter"});
  visit.field("clip", self.clip, Field{"largest global gradient norm; 0 = no clipping"});
  visit.field("schedule", self.schedule, Field{"shape of the learning rate after the warm-up", "", schedule_names()});
  visit.field("warmup", self.warmup, Field{"linear warm-up from 0", "steps"});
  visit.field("lr_min_ratio", self.lr_min_ratio, Field{"last learning rate as a fraction of the peak"});
  visit.field("decay", self.decay, Field{"wsd: fraction of the steps, at the end, that decays"});
}

}  // namespace attamba
