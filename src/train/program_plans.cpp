// What one rank will run, before it has any memory.
#include <algorithm>
#include <set>

#include "src/core/error.h"
#include "src/train/config.h"
#include "src/train/programs.h"
#include "src/train/step_leaves.h"

namespace attamba {

namespace {

constexpr double kLargestFixedPoint = 0x1p15;

/// What the lasting tensors of one block are for, by role and name ("moment1/layers.0...").
std::string purpose_of(const Tape::ValueInfo& leaf) {
  switch (leaf.role) {
    case Role::parameter:
      return "weights";
    case Role::gradient:
      return "gradients";
    case Role::input:
      return "inputs";
    default:
      return leaf.name.starts_with("master/")           ? "master weights"
             : leaf.name.find('/') == std::string::npos ? "step totals"
                                                        : leaf.name.substr(0, leaf.name.find('/'));
  }
}

/// What travels besides gradients.
std::vector<Value> step_totals(Tape& tape, int ranks) {
  return {tape.leaf(kTotalsLeaf, kTotalsType, Role::state), tape.leaf(kNewsLeaf, news_type(ranks), Role::state),
          tape.leaf(kPoisonedLeaf, kPoisonedType, Role::state)};
}

/// Emits and plans the programs of one rank.
class ProgramPlanner {
 public:
  ProgramPlanner(const ProgramOptions& options, const RankGroups& groups)
      : options_(options),
        communicator_(*groups.all),
        groups_(groups),
        optimizer_(make_optimizer(options.optimizer, options.optimizer_settings)) {}

  ProgramPlans run();

 private:
  using Kind = ProgramKind;

  void emit(ProgramPlans::Planned& built);
  ModelOptions model_options(bool recompute) const;
  void set_up_sharding();
  void emit_gradients(Tape& tape, bool closing);
  void add_to_fixed_point(Tape& tape, Value sum, Value gradient) const;
  void to_float(Tape& tape, Value gradient, Value sum) const;
  void emit_closing(Tape& tape);
  /// Of whole gradients: the reduction over ranks, and what the optimizer updates.
  std::vector<OptimizedParameter> reduce_gradients(Tape& tape);
  Value emit_norm(Tape& tape, const std::vector<Value>& gradients) const;
  std::vector<Value> gradient_leaves(Tape& tape);
  void lay_out_gradients();
  void lay_out_other_leaves();
  bool has_master_copy(const ParameterInfo& parameter) const;
  DType parameter_dtype(const ParameterInfo& parameter) const;

  const ProgramOptions& options_;
  Communicator& communicator_;
  RankGroups groups_;
  std::unique_ptr<Optimizer> optimizer_;
  std::vector<ParameterInfo> parameters_;
  std::shared_ptr<Sharding> sharding_;  ///< empty when every rank keeps everything
  ProgramPlans plans_;
};

}  // namespace

ProgramOptions program_options(const Config& config, const ChunkingStrategy* chunking, Device device) {
  const OptimConfig& o = config.optim;
  return {.model = config.model,
          .chunking = chunking,
          .micro_batch = {config.train.micro_batch, config.data.sequence_length},
          .dtype = config.train.compute_dtype(),
          .recompute = config.train.recompute,
          .deterministic = config.train.deterministic,
          .global_batch = config.train.global_batch,
          .zero_on_node = config.train.zero_group == "node",
          .zero = static_cast<int>(config.train.zero),
          .optimizer = o.name,
          .optimizer_settings = {o.beta1, o.beta2, o.eps, o.weight_decay, o.clip},
          .device = device};
}

ProgramPlans plan_programs(const ProgramOptions& options, const RankGroups& groups) {
  return ProgramPlanner(options, groups).run();
}

ModelOptions ProgramPlanner::model_options(bool recompute) const {
  return {.config = options_.model,
          .chunking = options_.chunking,
          .batch = options_.micro_batch,
          .dtype = options_.dtype,
          .recompute = recompute};
}

/// Needs to know the parameters before any tape that is going to run names them.
void ProgramPlanner::set_up_sharding() {
  if (options_.zero == 0 || !options_.training || groups_.sharers->size() == 1) {
    return;
  }
  Tape declared;
  parameters_ = declare_model(declared, model_options(false)).parameters;
  std::vector<DType> dtypes;
  std::transform(parameters_.begin(), parameters_.end(), std::back_inserter(dtypes),
                 [&](const ParameterInfo& parameter) { return parameter_dtype(parameter); });
  const DType accumulator = accumulator_of(options_.dtype);
  sharding_ = std::make_shared<Sharding>(
      parameters_,
      ShardLayout(parameters_, dtypes,
                  {.ranks = groups_.sharers->size(),
                   .bucket_bytes = options_.bucket_bytes,
                   .width = size_of(options_.deterministic ? DType::int64 : accumulator),
                   .by_block = options_.zero == 3}),
      Sharding::Options{.stage = options_.zero, .accumulator = accumulator, .deterministic = options_.deterministic},
      *groups_.sharers, groups_.copies);
  plans_.sharding = sharding_;
}

ProgramPlans ProgramPlanner::run() {
  require<UsageError>(options_.device == Device::cpu || options_.dtype != DType::float64,
                      "float64 is computed on the CPU only; use train.dtype float32 or bfloat16 here");
  set_up_sharding();
  std::vector<Kind> kinds{Kind::evaluate};
  if (options_.training) {
    kinds.insert(kinds.end(), {Kind::accumulate, Kind::closing, Kind::empty_closing});
  }
  if (options_.logits) {
    kinds.push_back(Kind::logits);
  }
  plans_.programs.resize(kinds.size());
  for (std::size_t i = 0; i < kinds.size(); ++i) {
    ProgramPlans::Planned& built = plans_.programs[i];
    built.kind = kinds[i];
    if (built.kind == Kind::empty_closing) {
      built.tape = plans_.programs[i - 1].tape.closing_part();
    } else {
      emit(built);
    }
    built.plan = make_plan(built.tape, options_.device);
  }
  if (options_.training) {
    lay_out_gradients();
  }
  lay_out_other_leaves();
  plans_.parameters = parameters_;
  return std::move(plans_);
}

void ProgramPlanner::emit(ProgramPlans::Planned& built) {
  Tape& tape = built.tape;
  const bool gradients = built.kind == Kind::accumulate || built.kind == Kind::closing;
  if (sharding_) {
    sharding_->declare(tape, gradients);
  }
  const DeclaredModel model = declare_model(tape, model_options(options_.recompute && gradients));
  parameters_ = model.parameters;
  Value result;  // of the forward pass
  if (built.kind == Kind::logits) {
    result = built.output = ops::linear(tape, model.hidden, model.output_weight);
    tape.mark_output(built.output);
  } else {
    const Value targets = tape.input(kTargetsLeaf, {DType::int32, {options_.micro_batch.rows()}});
    const double tokens = static_cast<double>(options_.global_batch * options_.micro_batch.length);
    result = gradients ? ops::linear_cross_entropy_root(tape, model.hidden, model.output_weight, targets, 1.0 / tokens)
                       : ops::linear_cross_entropy(tape, model.hidden, model.output_weight, targets);
    ops::accumulate_loss(tape, tape.leaf(gradients ? kTotalsLeaf : kEvaluationLeaf, kTotalsType, Role::state), result);
  }
  if (gradients) {
    tape.backward(result);
    emit_gradients(tape, built.kind == Kind::closing);
  }
  if (built.kind == Kind::closing) {
    emit_closing(tape);
  }
  if (sharding_) {
    sharding_->gather_weights(tape, result);
  }
}

void ProgramPlanner::add_to_fixed_point(Tape& tape, Value sum, Value gradient) const {
  const auto additions = static_cast<double>(options_.global_batch / options_.micro_batch.sequences);
  ops::add_to_fixed_point(tape, sum, tape.leaf(kPoisonedLeaf, kPoisonedType, Role::state), gradient,
                          kLargestFixedPoint / additions);
}

void ProgramPlanner::to_float(Tape& tape, Value gradient, Value sum) const {
  ops::fixed_point_to_float(tape, gradient, sum, tape.leaf(kPoisonedLeaf, kPoisonedType, Role::state));
}

/// In deterministic mode each micro-batch's gradients go into fixed-point sums as soon as they are complete. Those of
/// parameters that are divided among ranks set out for their owners.
void ProgramPlanner::emit_gradients(Tape& tape, bool closing) {
  if (sharding_) {
    sharding_->collect_gradients(tape, closing, [&](Value sum, Value gradient) { add_to_fixed_point(tape, sum, gradient); });
    return;
  }
  if (!options_.deterministic) {
    return;
  }
  for (const Value gradient : gradient_leaves(tape)) {
    const std::string name = kFixedPointPrefix + tape.info(gradient).name;
    add_to_fixed_point(tape, tape.leaf(name, {DType::int64, tape.type(gradient).shape}, Role::gradient), gradient);
    tape.hoist_last();
  }
}

/// Gradient leaves in the order in which the backward pass completes them: last declared first.
std::vector<Value> ProgramPlanner::gradient_leaves(Tape& tape) {
  std::vector<Value> leaves;
  for (auto p = parameters_.rbegin(); p != parameters_.rend(); ++p) {
    leaves.push_back(tape.leaf("gradient/" + p->name, {accumulator_of(options_.dtype), p->shape}, Role::gradient));
  }
  return leaves;
}

/// The squared global norm, the same on all ranks; in deterministic mode the same for all partitions too.
Value ProgramPlanner::emit_norm(Tape& tape, const std::vector<Value>& gradients) const {
  Value sum = options_.deterministic ? ops::square_digits(tape, gradients) : ops::square_sum(tape, gradients);
  if (sharding_) {
    sum = ops::sum_over_ranks(tape, *groups_.sharers, sum);
  }
  return options_.deterministic ? ops::square_digits_to_float(tape, sum) : sum;
}

/// In buckets, each started as soon as its gradients are complete.
std::vector<OptimizedParameter> ProgramPlanner::reduce_gradients(Tape& tape) {
  const std::vector<Value> gradients = gradient_leaves(tape);
  std::vector<Value> sums = gradients;
  if (options_.deterministic) {
    for (Value& sum : sums) {
      sum = tape.leaf(kFixedPointPrefix + tape.info(sum).name, {DType::int64, tape.type(sum).shape}, Role::gradient);
    }
  }
  if (communicator_.size() > 1) {
    std::vector<std::pair<std::shared_ptr<ops::PendingCollective>, std::vector<Value>>> pending;
    std::size_t bytes = 0;
    std::vector<Value> bucket;
    const auto start = [&] {
      pending.emplace_back(ops::start_all_reduce(tape, communicator_, bucket), bucket);
      tape.hoist_last();
      bucket.clear();
      bytes = 0;
    };
    for (const Value sum : sums) {
      bucket.push_back(sum);
      bytes += tape.type(sum).bytes();
      if (bytes >= options_.bucket_bytes) {
        start();
      }
    }
    const std::vector<Value> totals = step_totals(tape, communicator_.size());
    bucket.insert(bucket.end(), totals.begin(), totals.end());
    start();
    for (const auto& [reduction, leaves] : pending) {
      ops::wait_all_reduce(tape, reduction, leaves);
    }
  }
  std::vector<OptimizedParameter> optimized;
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    if (options_.deterministic) {
      to_float(tape, gradients[i], sums[i]);
    }
    const ParameterInfo& p = parameters_[parameters_.size() - 1 - i];
    const Value weight = tape.leaf(p.name, {parameter_dtype(p), p.shape}, Role::parameter);
    const bool copy = has_master_copy(p);
    const Value master = copy ? tape.leaf("master/" + p.name, {accumulator_of(options_.dtype), p.shape}, Role::state) : weight;
    optimized.push_back({.name = p.name, .compute = copy ? weight : Value{}, .master = master, .gradient = gradients[i]});
  }
  return optimized;
}

/// The rest of a step, which a rank without a last micro-batch does too.
void ProgramPlanner::emit_closing(Tape& tape) {
  tape.set_closing(true);
  std::vector<Value> gradients;
  std::vector<OptimizedParameter> optimized;
  if (sharding_) {
    const std::vector<Value> totals = step_totals(tape, communicator_.size());
    const auto pending = ops::start_all_reduce(tape, communicator_, totals);
    tape.hoist_last();
    ops::wait_all_reduce(tape, pending, totals);
    gradients = sharding_->own_gradients(tape, [&](Value gradient, Value sum) { to_float(tape, gradient, sum); });
    optimized = sharding_->own_parameters(tape);
  } else {
    optimized = reduce_gradients(tape);
    std::transform(optimized.begin(), optimized.end(), std::back_inserter(gradients), [](const auto& p) { return p.gradient; });
  }
  optimizer_->emit(tape, tape.leaf(kStepLeaf, kStepType, Role::state), emit_norm(tape, gradients), optimized);
  if (sharding_) {
    sharding_->spread_weights(tape);
  }
}

/// Buckets are ranges of memory: gradients lie next to each other in the order of reduction.
void ProgramPlanner::lay_out_gradients() {
  const std::vector<Storage::Entry> totals{
      {kTotalsLeaf, kTotalsType}, {kNewsLeaf, news_type(communicator_.size())}, {kPoisonedLeaf, kPoisonedType}};
  if (sharding_) {  // a bucket is one leaf
    plans_.storage.push_back({"step totals", totals});
    return;
  }
  std::vector<Storage::Entry> gradients, fixed_point;
  for (auto p = parameters_.rbegin(); p != parameters_.rend(); ++p) {
    gradients.push_back({"gradient/" + p->name, {accumulator_of(options_.dtype), p->shape}});
    fixed_point.push_back({kFixedPointPrefix + gradients.back().name, {DType::int64, p->shape}});
  }
  std::vector<Storage::Entry>& reduced = options_.deterministic ? fixed_point : gradients;
  if (options_.deterministic) {
    reduced.insert(reduced.end(), totals.begin(), totals.end());
    plans_.storage.push_back({"fixed-point gradients", fixed_point});
  } else {
    plans_.storage.push_back({"step totals", totals});
  }
  plans_.storage.push_back({"gradients", gradients});
}

/// All other leaves that some program touches, and those that describe a batch; one block for each purpose.
void ProgramPlanner::lay_out_other_leaves() {
  std::set<std::string> known;
  for (const ProgramPlans::Block& block : plans_.storage) {
    for (const Storage::Entry& entry : block.entries) {
      known.insert(entry.name);
    }
  }
  const auto add = [&](const std::string& purpose, const Storage::Entry& entry) {
    if (known.insert(entry.name).second) {
      auto block =
          std::find_if(plans_.storage.begin(), plans_.storage.end(), [&](const auto& b) { return b.purpose == purpose; });
      if (block == plans_.storage.end()) {
        block = plans_.storage.insert(block, {purpose, {}});
      }
      block->entries.push_back(entry);
    }
  };
  for (const ProgramPlans::Planned& planned : plans_.programs) {
    for (const int step : planned.plan.steps) {
      for (const Value value : planned.tape.nodes()[static_cast<std::size_t>(step)].inputs) {
        const Tape::ValueInfo& info = planned.tape.info(planned.tape.memory_of(value));
        if (info.role != Role::activation && !info.temporary) {
          add(purpose_of(info), {info.name, info.type});
        }
      }
    }
  }
  for (const Storage::Entry& entry : batch_leaves(options_.model, options_.chunking, options_.micro_batch.sequences,
                                                  options_.micro_batch.length, options_.dtype)) {
    add("inputs", entry);
  }
}

DType ProgramPlanner::parameter_dtype(const ParameterInfo& parameter) const {
  const bool vector = parameter.shape.rank() < 2 || parameter.name.ends_with("conv.weight");
  return vector ? accumulator_of(options_.dtype) : options_.dtype;
}

bool ProgramPlanner::has_master_copy(const ParameterInfo& parameter) const {
  return options_.training && parameter_dtype(parameter) != accumulator_of(options_.dtype);
}

const ProgramPlans::Planned& ProgramPlans::largest() const {
  return *std::max_element(programs.begin(), programs.end(),
                           [](const Planned& a, const Planned& b) { return a.plan.arena_bytes < b.plan.arena_bytes; });
}

std::size_t ProgramPlans::Block::bytes() const {
  std::size_t sum = 0;
  for (const Storage::Entry& entry : entries) {
    sum += align_up(entry.type.bytes());
  }
  return sum;
}

const ProgramPlans::Planned& ProgramPlans::program(ProgramKind kind) const {
  const auto found = std::find_if(programs.begin(), programs.end(), [&](const Planned& p) { return p.kind == kind; });
  require(found != programs.end(), "programs: none of kind ", static_cast<int>(kind), " was asked for");
  return *found;
}

double ProgramPlans::model_flops() const {
  const auto found =
      std::find_if(programs.begin(), programs.end(), [](const Planned& p) { return p.kind == ProgramKind::accumulate; });
  double sum = 0;
  if (found != programs.end()) {
    for_each_op(*found, [&](const Tape::Node& node, const auto& inputs, const auto& outputs) {
      sum += node.recomputed ? 0 : node.op->flops(inputs, outputs);
    });
  }
  return sum;
}

MemoryReport ProgramPlans::memory() const {
  MemoryReport report;
  for (const Block& block : storage) {
    for (const auto& [name, type] : block.entries) {
      const bool gradient = name.starts_with("gradient/") || name.starts_with(kFixedPointPrefix);
      const bool state = name.starts_with("master/") || name.starts_with("moment") || name.starts_with("step.");
      const bool parameter = name.starts_with(kWeightsPrefix) ||
                             std::any_of(parameters.begin(), parameters.end(), [&](const auto& p) { return p.name == name; });
      (parameter  ? report.parameters
       : gradient ? report.gradients
       : state    ? report.state
                  : report.inputs) += align_up(type.bytes());
    }
  }
  report.arena = largest().plan.arena_bytes;
  return report;
}

}  // namespace attamba
