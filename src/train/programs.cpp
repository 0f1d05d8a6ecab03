#include "src/train/programs.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "src/core/error.h"
#include "src/train/step_leaves.h"

namespace attamba {

namespace {

/// By ProgramKind; what profilers show.
constexpr std::array<const char*, 5> kProgramNames{"accumulate", "last micro-batch, reduce and update", "reduce and update",
                                                   "evaluate", "logits"};

static_assert(sizeof(RankNews) == kNewsWords * sizeof(std::int64_t));

/// The mean loss in a totals leaf over `tokens`; leaves it zero. Waits for what was enqueued.
double take_loss(Storage& storage, const char* leaf, double tokens) {
  storage.download(leaf);
  runtime(storage.device()).synchronize();
  const auto sums = storage.mirror(leaf).span<std::int64_t>();
  const double loss =
      sums[1] > 0 ? std::numeric_limits<double>::quiet_NaN() : static_cast<double>(sums[0]) / kernels::kLossOne / tokens;
  clear(storage.find(leaf));
  return loss;
}

/// What takes most of a rank's memory.
std::string describe_largest(const ProgramPlans& plans) {
  constexpr std::size_t kShown = 4;
  std::vector<std::pair<std::size_t, std::string>> rows{{plans.largest().plan.arena_bytes, "activations and scratch"}};
  for (const ProgramPlans::Block& block : plans.storage) {
    rows.emplace_back(block.bytes(), block.purpose);
  }
  std::stable_sort(rows.begin(), rows.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
  rows.resize(std::min(rows.size(), kShown));
  std::string text = concat("; this rank needs ", in_binary_units(plans.memory().total()), ":");
  const auto add = [&text](const std::string& name, std::size_t bytes) {
    text += concat(text.ends_with(":") ? " " : ", ", name, " ", in_binary_units(bytes));
  };
  for (const auto& [bytes, purpose] : rows) {
    add(purpose, bytes);
  }
  text += "; largest at the activations' peak:";
  for (const FoldedBuffer& buffer : fold_layers(plans.largest().plan.peak(), kShown)) {
    add(buffer.label(), buffer.bytes);
  }
  return text;
}

}  // namespace

ModelPrograms::ModelPrograms(const ProgramOptions& options, Communicator& communicator)
    : options_(options),
      communicator_(communicator),
      optimizer_(make_optimizer(options.optimizer, options.optimizer_settings)),
      storage_(options.device),
      arena_(options.device) {
  ProgramPlans plans = plan_programs(options_, make_groups());
  memory_ = plans.memory();
  model_flops_ = plans.model_flops();
  make_memory(plans);
  for (const ProgramPlans::Planned& planned : plans.programs) {
    replay_of(planned.kind).program = Program(planned.tape, planned.plan, storage_, arena_);
    logits_value_ = planned.kind == ProgramKind::logits ? planned.output : logits_value_;
  }
  writer_ = std::make_unique<BatchWriter>(storage_, options_.model, options_.chunking, options_.micro_batch.sequences,
                                          options_.micro_batch.length, options_.dtype);
  largest_plan_ = plans.largest().plan;
  parameters_ = std::move(plans.parameters);
  sharding_ = std::move(plans.sharding);
}

void ModelPrograms::make_memory(const ProgramPlans& plans) {
  std::size_t made = 0;
  try {
    for (const ProgramPlans::Block& block : plans.storage) {
      storage_.make_contiguous(block.entries, block.purpose);
      made += block.bytes();
    }
    arena_.reserve(plans.largest().plan.arena_bytes);
    arena_.data();
  } catch (const OutOfMemory& error) {
    throw ProgramsTooLarge(error, plans, error.total() == 0 ? 0 : error.free() + made);
  }
}

ProgramsTooLarge::ProgramsTooLarge(const OutOfMemory& error, const ProgramPlans& plans, std::size_t available)
    : OutOfMemory(error, describe_largest(plans)), available_(available) {}

RankGroups ModelPrograms::make_groups() {
  if (!options_.zero_on_node || options_.zero == 0 || !options_.training || communicator_.size() == 1) {
    return {.all = &communicator_, .sharers = &communicator_};
  }
  std::int64_t sizes[] = {communicator_.local_size(), -communicator_.local_size()};  // the largest, and minus the smallest
  communicator_.all_reduce_max({sizes, {DType::int64, {2}}});
  require<UsageError>(sizes[0] == -sizes[1],
                      "train.zero_group = \"node\" divides the model among the ranks of a host, but some have ", -sizes[1],
                      " and some ", sizes[0], ": start equally many on each, or use train.zero_group = \"all\"");
  sharers_ = communicator_.split(communicator_.first_local_rank());
  copies_ = communicator_.split(communicator_.local_rank());
  return {.all = &communicator_, .sharers = sharers_.get(), .copies = copies_->size() > 1 ? copies_.get() : nullptr};
}

bool ModelPrograms::runs_together(ProgramKind kind) const {
  const int from_stage = kind == ProgramKind::closing || kind == ProgramKind::empty_closing ? 0
                         : kind == ProgramKind::accumulate                                  ? 2
                                                                                            : 3;
  return communicator_.size() > 1 && zero() >= from_stage;
}

/// The first run goes op by op (libraries choose their algorithms then), the second is recorded where the device can, and from
/// then on the recording is replayed: one launch a program. A rank runs either the closing program or the empty one in all
/// steps of a run, so all ranks record their reductions at the same step, as NCCL asks.
void ModelPrograms::run(ProgramKind kind) {
  const NamedRange range(runtime(options_.device), kProgramNames[static_cast<std::size_t>(kind)]);
  Replay& replay = replay_of(kind);
  const Launch launch{.device = options_.device, .stream = runtime(options_.device).stream()};
  const bool together = runs_together(kind);
  if (once_) {
    replay.program.run_observed(launch, std::exchange(once_, nullptr), false);
  } else if (observed_) {
    replay.program.run_observed(launch, observer_, check_finite_ && !poisoned_);
  } else {
    if (replay.runs == 1 && (!together || communicator_.recordable())) {
      replay.recorded = runtime(options_.device).record([&] { replay.program.run(launch); });
    }
    ++replay.runs;
    if (replay.recorded) {
      replay.recorded->launch();
    } else {
      replay.program.run(launch);
    }
  }
  if (together) {
    for (Communicator* ranks : {&communicator_, sharers_.get(), copies_.get()}) {
      if (ranks != nullptr) {
        ranks->work_enqueued(static_cast<int>(kind));
      }
    }
  }
}

void ModelPrograms::observe(Program::Observer observer, bool check_finite) {
  observer_ = std::move(observer);
  check_finite_ = check_finite;
  observed_ = true;
}

void ModelPrograms::accumulate() {
  run(ProgramKind::accumulate);
}

StepResult ModelPrograms::finish_step(double learning_rate, std::int64_t updates, bool empty, const RankNews& news,
                                      double norm_limit, const std::function<void()>& meanwhile) {
  const auto step = storage_.mirror(kStepLeaf).span<double>();
  const OptimizerSettings& o = options_.optimizer_settings;
  step[kernels::kStepLearningRate] = learning_rate;
  step[kernels::kStepBias1] = 1 - std::pow(o.beta1, static_cast<double>(updates + 1));
  step[kernels::kStepBias2] = 1 - std::pow(o.beta2, static_cast<double>(updates + 1));
  step[kernels::kStepNormLimit] = norm_limit;
  // Everybody's place is zero except on the rank itself, so their sum is what all ranks say.
  const auto all_news = storage_.mirror(kNewsLeaf).span<std::int64_t>();
  std::fill(all_news.begin(), all_news.end(), 0);
  std::memcpy(&all_news[kNewsWords * static_cast<std::size_t>(communicator_.rank())], &news, sizeof news);
  storage_.upload(kStepLeaf);
  storage_.upload(kNewsLeaf);
  run(empty ? ProgramKind::empty_closing : ProgramKind::closing);
  poisoned_ = false;
  clear(storage_.find(kPoisonedLeaf));
  storage_.download(kStepLeaf);
  storage_.download(kNewsLeaf);
  if (meanwhile) {
    meanwhile();
  }
  const auto tokens = static_cast<double>(options_.global_batch * options_.micro_batch.length);
  // A device's collectives are waited for here.
  const CollectiveProgress::Waiting waiting(communicator_.size() > 1 ? &communicator_.progress() : nullptr);
  const double loss = take_loss(storage_, kTotalsLeaf, tokens);
  std::vector<RankNews> heard(static_cast<std::size_t>(communicator_.size()));
  std::memcpy(static_cast<void*>(heard.data()), all_news.data(), all_news.size_bytes());
  return {.loss = loss,
          .gradient_norm = step[kernels::kStepGradientNorm],
          .learning_rate = learning_rate,
          .skipped = step[kernels::kStepSkipped] != 0,
          .news = std::move(heard)};
}

/// A NaN in one gradient, or one that fixed point cannot hold, makes the norm of all ranks' sum one.
void ModelPrograms::poison_step() {
  poisoned_ = true;
  if (options_.deterministic) {
    std::int64_t poisoned = 1;
    copy_from_host(storage_.find(kPoisonedLeaf), {&poisoned, kPoisonedType});
    return;
  }
  for (const auto& [name, gradient] : storage_.tensors()) {
    if (name.starts_with("gradient/")) {
      dispatch_floating(gradient.dtype(), "poison_step", [&, to = gradient]<class T>() {
        T nan = std::numeric_limits<T>::quiet_NaN();
        copy_from_host({to.data, {to.dtype(), {1}}, to.device}, {&nan, {to.dtype(), {1}}});
      });
    }
  }
}

void ModelPrograms::discard_gradients() {
  for (const auto& [name, tensor] : storage_.tensors()) {
    if (name.starts_with("gradient/") || name.starts_with(kFixedPointPrefix) || name == kTotalsLeaf || name == kPoisonedLeaf) {
      clear(tensor);
    }
  }
}

double ModelPrograms::evaluate() {
  run(ProgramKind::evaluate);
  const CollectiveProgress::Waiting waiting(runs_together(ProgramKind::evaluate) ? &communicator_.progress() : nullptr);
  return take_loss(storage_, kEvaluationLeaf, 1.0);
}

Tensor ModelPrograms::logits() {
  run(ProgramKind::logits);
  return replay_of(ProgramKind::logits).program.tensor(logits_value_);
}

}  // namespace attamba
