#include "src/train/run_plan.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "comm/planned_ranks.h"
#include "src/core/error.h"
#include "src/train/checkpoint.h"
#include "src/train/checkpoint_file.h"
#include "src/train/metrics.h"
#include "src/train/sharding.h"

namespace attamba {

namespace {

constexpr std::size_t kLargestShown = 6;
constexpr std::size_t kProposalsShown = 5;
constexpr std::size_t kManifestTensor = 80;  ///< bytes of a tensor's entry in a manifest, but for its name

/// A rank's plans, and who takes part.
class PlannedRun {
 public:
  explicit PlannedRun(const RunPlanRequest& request)
      : chunking_(make_model_chunking(request.config.model, request.config.data.sequence_length)),
        options_(program_options(request.config, chunking_.get(), request.kernels)),
        per_node_(static_cast<int>(std::min<std::int64_t>(request.ranks, request.machine.gpus_per_node))),
        all_(0, request.ranks, per_node_),
        sharers_(0, per_node_, per_node_),
        copies_(0, request.ranks / per_node_),
        plans_(plan_programs(options_, groups())) {}
  PlannedRun(const PlannedRun&) = delete;
  PlannedRun& operator=(const PlannedRun&) = delete;

  const ProgramOptions& options() const { return options_; }
  const ProgramPlans& plans() const { return plans_; }

 private:
  RankGroups groups() {
    if (!options_.zero_on_node || options_.zero == 0 || all_.size() == per_node_) {
      return {.all = &all_, .sharers = &all_};
    }
    require<UsageError>(all_.size() % per_node_ == 0, "train.zero_group = \"node\": ", all_.size(),
                        " ranks do not fill nodes of ", per_node_, " GPUs; use whole nodes, or train.zero_group = \"all\"");
    return {.all = &all_, .sharers = &sharers_, .copies = &copies_};
  }

  std::unique_ptr<ChunkingStrategy> chunking_;
  ProgramOptions options_;
  int per_node_;
  PlannedRanks all_, sharers_, copies_;
  ProgramPlans plans_;
};

double used_bytes(const RunPlanRequest& request, const Demands& demands) {
  return static_cast<double>(demands.allocated()) + request.machine.reserved;
}

StageRow stage_row(const RunPlanRequest& request, int stage, const Demands& demands) {
  return {.stage = stage,
          .bytes = used_bytes(request, demands),
          .sent_bytes = demands.time.sent_bytes,
          .network_seconds = demands.time.communication,
          .step_seconds = demands.time.total()};
}

std::string describe_change(const TrainConfig& from, const TrainConfig& to) {
  std::string change;
  const auto add = [&](bool differs, const auto&... text) {
    change += differs ? concat(change.empty() ? "" : " ", text...) : std::string();
  };
  add(to.zero != from.zero, "--train.zero ", to.zero);
  add(to.micro_batch != from.micro_batch, "--train.micro_batch ", to.micro_batch);
  add(to.recompute != from.recompute, "--train.recompute true");
  return change;
}

/// Whether the ranks make the groups that this stage asks for: whole nodes, with `train.zero_group = "node"`.
bool has_groups(const RunPlanRequest& request, std::int64_t zero) {
  const std::int64_t per_node = request.machine.gpus_per_node;
  return zero == 0 || request.config.train.zero_group != "node" || request.ranks <= per_node || request.ranks % per_node == 0;
}

/// The largest micro-batch of no more than this one with which the changed configuration fits.
std::optional<Proposal> largest_that_fits(RunPlanRequest request, std::int64_t zero, bool recompute) {
  const TrainConfig asked = request.config.train;
  TrainConfig& train = request.config.train;
  train.zero = zero;
  train.recompute = recompute;
  std::vector<std::int64_t> sizes;
  for (std::int64_t size = 1; size <= asked.micro_batch; ++size) {
    train.micro_batch = size;
    if (train != asked && train.global_batch % size == 0) {
      sizes.push_back(size);
    }
  }
  // Memory grows with the micro-batch, so the largest that fits is found by halving.
  std::optional<Proposal> found;
  for (std::size_t begin = 0, end = sizes.size(); begin < end;) {
    const std::size_t middle = begin + (end - begin) / 2;
    train.micro_batch = sizes[middle];
    const Demands demands = demands_of(request);
    const double bytes = used_bytes(request, demands);
    if (bytes <= request.machine.memory) {
      found = Proposal{describe_change(asked, train), bytes, demands.time.total(), request.config};
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return found;
}

/// Configurations that need less memory than this one: higher ZeRO stages, recomputation, smaller micro-batches.
std::vector<Proposal> propose(const RunPlanRequest& request) {
  std::vector<Proposal> proposals;
  const TrainConfig& asked = request.config.train;
  for (std::int64_t zero = asked.zero; zero <= (request.ranks > 1 ? 3 : asked.zero); ++zero) {
    for (const bool recompute : asked.recompute ? std::vector{true} : std::vector{false, true}) {
      const auto found = has_groups(request, zero) ? largest_that_fits(request, zero, recompute) : std::nullopt;
      if (found) {
        proposals.push_back(*found);
      }
    }
  }
  std::stable_sort(proposals.begin(), proposals.end(),
                   [](const Proposal& a, const Proposal& b) { return a.step_seconds < b.step_seconds; });
  proposals.resize(std::min(proposals.size(), kProposalsShown));
  return proposals;
}

/// What a rank saves, without values.
std::vector<StateSlice> slices_to_save(const PlannedRun& run, int rank, int ranks) {
  std::vector<std::string> prefixes{"parameters/"};
  for (const std::string_view state : make_optimizer(run.options().optimizer, {})->state_names()) {
    prefixes.push_back(concat(state, "/"));
  }
  const ProgramPlans& plans = run.plans();
  const auto type_of = [&](const ParameterInfo& p) { return TensorType{accumulator_of(run.options().dtype), p.shape}; };
  std::vector<StateSlice> slices;
  std::vector<NamedTensor> tensors;
  for (const std::string& prefix : prefixes) {
    if (plans.sharding) {
      for (const ShardLayout::Slice& slice : plans.sharding->layout().slices(rank)) {
        const ParameterInfo& parameter = plans.parameters[slice.parameter];
        slices.push_back({prefix + parameter.name, type_of(parameter), slice.begin, slice.end, {}});
      }
    } else {
      for (const ParameterInfo& parameter : plans.parameters) {
        tensors.push_back({prefix + parameter.name, {nullptr, type_of(parameter)}});
      }
    }
  }
  return plans.sharding ? slices : even_share(tensors, rank, ranks);
}

void add_warnings(RunPlan& plan) {
  const TrainConfig& t = plan.request.config.train;
  const std::int64_t ranks = plan.request.ranks, batches = plan.micro_batches;
  if (batches < ranks) {
    std::int64_t smaller = t.micro_batch;
    while (smaller > 1 && (t.global_batch % smaller != 0 || t.global_batch / smaller < ranks)) {
      --smaller;
    }
    const bool helps = t.global_batch / smaller >= ranks;
    plan.warnings.push_back(concat(ranks - batches, " of ", ranks, " GPUs have nothing to compute: a step has only ", batches,
                                   " micro-batches of ", t.micro_batch, "; use ",
                                   helps ? concat("--train.micro_batch ", smaller) : std::string(), helps ? " or " : "",
                                   "a train.global_batch of at least ", ranks * t.micro_batch, ", or fewer GPUs"));
  } else if (batches % ranks != 0) {
    plan.warnings.push_back(concat("a step's ", batches, " micro-batches do not divide evenly over ", ranks,
                                   " GPUs: ", ranks - batches % ranks, " of them wait for the others during the last one"));
  }
}

std::string list_proposals(const std::vector<Proposal>& proposals) {
  if (proposals.empty()) {
    return "; neither a smaller train.micro_batch nor train.recompute nor train.zero makes it fit: use devices with more "
           "memory";
  }
  std::string text = "; this would fit, the quickest first: ";
  for (const Proposal& proposal : proposals) {
    text += concat(text.ends_with(": ") ? "" : ", or ", proposal.change, " (",
                   in_binary_units(static_cast<std::size_t>(proposal.bytes)), ")");
  }
  return text;
}

}  // namespace

std::unique_ptr<ModelPrograms> make_run_programs(const Config& config, const ChunkingStrategy* chunking, Device device,
                                                 Communicator& communicator) {
  try {
    return std::make_unique<ModelPrograms>(program_options(config, chunking, device), communicator);
  } catch (const ProgramsTooLarge& error) {
    if (error.available() == 0) {
      throw OutOfMemory(error, "; use a smaller train.micro_batch, or train.recompute = true");
    }
    // Which is the quickest is the same on all machines of the table, or nearly so.
    RunPlanRequest request{.config = config, .ranks = communicator.size(), .machine = known_machine("H100"), .kernels = device};
    request.machine.memory = static_cast<double>(error.available());
    request.machine.reserved = 0;
    request.machine.gpus_per_node = communicator.local_size();
    throw OutOfMemory(error, list_proposals(propose(request)));
  }
}

std::size_t Demands::allocated() const {
  std::size_t sum = arena;
  for (const MemoryRow& row : lasting) {
    sum += row.bytes;
  }
  return sum;
}

Demands demands_of(const RunPlanRequest& request) {
  const PlannedRun run(request);
  const ProgramPlans& plans = run.plans();
  Demands demands;
  for (const ProgramPlans::Block& block : plans.storage) {
    demands.lasting.push_back({block.purpose, block.bytes()});
  }
  const Plan& largest = plans.largest().plan;
  demands.arena = largest.arena_bytes;
  for (const FoldedBuffer& buffer : fold_layers(largest.peak(), kLargestShown)) {
    demands.largest.push_back({buffer.label(), buffer.bytes});
  }
  const std::int64_t batches = request.config.train.global_batch / request.config.train.micro_batch;
  demands.time = predict_step(plans, request.machine, run.options().dtype, request.ranks, batches);
  for (const ParameterInfo& parameter : plans.parameters) {
    demands.parameters += parameter.shape.elements();
  }
  demands.model_flops = plans.model_flops() * static_cast<double>(batches);
  return demands;
}

double checkpoint_bytes(const RunPlanRequest& request) {
  const PlannedRun run(request);
  const auto file_of = [&](int rank, int ranks) {
    SavedFile file{.name = "rank-00000.h5"};
    std::vector<StateSlice> slices = slices_to_save(run, rank, ranks);
    file.bytes = checkpoint_file_bytes(slices);
    std::size_t values = 0;
    for (StateSlice& slice : slices) {
      values += slice.bytes();
      file.slices.push_back({.slice = std::move(slice), .offset = file.bytes});
    }
    return std::pair(file, static_cast<double>(file.bytes - values));
  };
  // All ranks' files have about as many slices, so they take about as much besides values.
  const auto [file, besides] = file_of(0, request.ranks);
  double values = 0, described = 0;
  const double copies = 1 + static_cast<double>(make_optimizer(run.options().optimizer, {})->state_names().size());
  for (const ParameterInfo& parameter : run.plans().parameters) {
    values += copies * static_cast<double>(TensorType{accumulator_of(run.options().dtype), parameter.shape}.bytes());
    described += copies * static_cast<double>(parameter.name.size() + kManifestTensor);
  }
  return values + request.ranks * (besides + static_cast<double>(to_text(file).size())) + described +
         static_cast<double>(to_toml(request.config).size());
}

double RunPlan::tokens_per_step() const {
  return static_cast<double>(request.config.train.global_batch * request.config.data.sequence_length);
}

double RunPlan::efficiency() const {
  return demands.model_flops /
         (demands.time.total() * request.ranks * request.machine.peak(request.config.train.compute_dtype()));
}

RunPlan plan_run(const RunPlanRequest& request) {
  validate(request.config);
  require<UsageError>(request.ranks > 0, "--ranks ", request.ranks, ": must be at least 1");
  require<UsageError>(request.tokens >= 0, "--tokens ", request.tokens, ": must be greater than 0");
  RunPlan plan{.request = request, .demands = demands_of(request)};
  const TrainConfig& t = request.config.train;
  plan.micro_batches = t.global_batch / t.micro_batch;
  plan.steps = request.tokens > 0 ? static_cast<std::int64_t>(std::ceil(request.tokens / plan.tokens_per_step())) : t.steps;
  plan.checkpoint_bytes = checkpoint_bytes(request);
  for (int stage = 0; stage <= 3 && request.ranks > 1; ++stage) {
    if (!has_groups(request, stage)) {
      continue;
    }
    RunPlanRequest divided = request;
    divided.config.train.zero = stage;
    plan.stages.push_back(stage_row(request, stage, stage == t.zero ? plan.demands : demands_of(divided)));
  }
  add_warnings(plan);
  if (!plan.fits()) {
    plan.proposals = propose(request);
  }
  return plan;
}

}  // namespace attamba
