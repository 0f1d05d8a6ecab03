#include "src/train/run_plan.h"

#include <algorithm>
#include <cmath>

#include "comm/planned_ranks.h"
#include "src/core/error.h"
#include "src/train/metrics.h"

namespace attamba {

namespace {

constexpr std::size_t kLargestShown = 6;
constexpr double kBytesPerSavedTensor = 690;  ///< what describes a tensor in a checkpoint, as measured

/// Of the tensors that one checkpoint holds: master weights and the optimizer's state, in the accumulator type.
double checkpoint_bytes(const ProgramPlans& plans, const ProgramOptions& options) {
  double bytes = 0;
  const double copies = 1 + static_cast<double>(make_optimizer(options.optimizer, {})->state_names().size());
  for (const ParameterInfo& parameter : plans.parameters) {
    bytes += copies *
             (kBytesPerSavedTensor + static_cast<double>(TensorType{accumulator_of(options.dtype), parameter.shape}.bytes()));
  }
  return bytes;
}

std::size_t bytes_for(const Demands& demands, std::initializer_list<std::string_view> purposes) {
  std::size_t sum = 0;
  for (const MemoryRow& row : demands.lasting) {
    sum += std::find(purposes.begin(), purposes.end(), row.purpose) != purposes.end() ? row.bytes : 0;
  }
  return sum;
}

/// ZeRO by its rule. 1: optimizer state and master weights are divided, gradients reduce-scattered, weights gathered after the
/// update. 2: gradients are divided too, so each micro-batch's are reduce-scattered. 3: weights too, gathered for each forward
/// and each backward pass.
StageRow stage_by_rule(const RunPlanRequest& request, const Demands& demands, int stage, std::int64_t replays) {
  const auto share = [&](int from, std::size_t bytes) {
    return static_cast<double>(bytes) / (stage >= from ? request.ranks : 1);
  };
  const std::size_t weights = bytes_for(demands, {"weights"});
  const std::size_t gradients = bytes_for(demands, {"gradients", "fixed-point gradients"});
  const std::size_t travelling =
      bytes_for(demands, {request.config.train.deterministic ? "fixed-point gradients" : "gradients"});
  StageRow row{.stage = stage,
               .kept_bytes = share(3, weights) + share(2, gradients) +
                             share(1, bytes_for(demands, {"master weights", "moment1", "moment2"}))};
  const auto add = [&](Collective::Kind kind, std::size_t bytes, double times) {
    const Collective collective{.kind = kind, .bytes = bytes};
    row.sent_bytes += times * ring_bytes(collective, request.ranks);
    row.seconds += times * request.machine.collective_seconds(collective, request.ranks);
  };
  const auto passes = static_cast<double>(replays);
  if (stage == 0) {
    add(Collective::Kind::all_reduce, travelling, 1);
  } else {
    add(Collective::Kind::reduce_scatter, travelling, stage >= 2 ? passes : 1);
    add(Collective::Kind::all_gather, weights, stage >= 3 ? 2 * passes : 1);
  }
  return row;
}

/// Configurations that need less memory than this one: smaller micro-batches, each with and without recomputation.
std::vector<Proposal> propose(const RunPlanRequest& request) {
  std::vector<Proposal> proposals;
  const TrainConfig& asked = request.config.train;
  for (const bool recompute : asked.recompute ? std::vector{true} : std::vector{false, true}) {
    for (std::int64_t micro_batch = asked.micro_batch; micro_batch > 0; --micro_batch) {
      const bool same = micro_batch == asked.micro_batch && recompute == asked.recompute;
      if (same || asked.global_batch % micro_batch != 0) {
        continue;
      }
      RunPlanRequest changed = request;
      changed.config.train.micro_batch = micro_batch;
      changed.config.train.recompute = recompute;
      const Demands demands = demands_of(changed);
      const double bytes = static_cast<double>(demands.allocated()) + request.machine.reserved;
      if (bytes <= request.machine.memory) {
        std::string change;
        change += micro_batch != asked.micro_batch ? concat("--train.micro_batch ", micro_batch, " ") : std::string();
        change += recompute != asked.recompute ? "--train.recompute true " : "";
        change.pop_back();
        proposals.push_back({change, bytes, demands.time.total(), changed.config});
        break;  // a smaller one fits too, and is no quicker
      }
    }
  }
  std::stable_sort(proposals.begin(), proposals.end(),
                   [](const Proposal& a, const Proposal& b) { return a.step_seconds < b.step_seconds; });
  return proposals;
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
    return "; no smaller train.micro_batch fits either, even with train.recompute: use a device with more memory";
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
  const Config& config = request.config;
  const auto chunking = make_model_chunking(config.model, config.data.sequence_length);
  const ProgramOptions options = program_options(config, chunking.get(), request.kernels);
  PlannedRanks ranks(0, request.ranks);
  const ProgramPlans plans = plan_programs(options, ranks);
  Demands demands;
  for (const ProgramPlans::Block& block : plans.storage) {
    demands.lasting.push_back({block.purpose, block.bytes()});
  }
  const Plan& largest = plans.largest().plan;
  demands.arena = largest.arena_bytes;
  for (const FoldedBuffer& buffer : fold_layers(largest.peak(), kLargestShown)) {
    demands.largest.push_back({buffer.label(), buffer.bytes});
  }
  const std::int64_t batches = config.train.global_batch / config.train.micro_batch;
  demands.time = predict_step(plans, request.machine, options.dtype, request.ranks, batches);
  for (const ParameterInfo& parameter : plans.parameters) {
    demands.parameters += parameter.shape.elements();
  }
  demands.model_flops = plans.model_flops() * static_cast<double>(batches);
  demands.checkpoint_bytes = checkpoint_bytes(plans, options);
  return demands;
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
  const std::int64_t replays = (plan.micro_batches + request.ranks - 1) / request.ranks;
  RunPlanRequest undivided = request;
  undivided.config.train.zero = 0;
  const Demands whole = t.zero == 0 ? plan.demands : demands_of(undivided);
  for (int stage = 0; stage <= 3; ++stage) {
    plan.stages.push_back(stage_by_rule(request, whole, stage, replays));
  }
  add_warnings(plan);
  if (!plan.fits()) {
    plan.proposals = propose(request);
  }
  return plan;
}

}  // namespace attamba
