#include "src/train/programs.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <set>
#include <utility>

#include "src/core/error.h"
#include "src/core/random.h"
#include "src/train/config.h"

namespace attamba {

namespace {

constexpr const char* kStepLeaf = "step.state";             // float64 [kStepFields], written by the host once per step
constexpr const char* kTotalsLeaf = "step.totals";          // int64 [2]: losses in fixed point, losses that are not finite
constexpr const char* kNewsLeaf = "step.news";              // int64 [ranks, 4]: what each rank tells (RankNews)
constexpr const char* kPoisonedLeaf = "step.poisoned";      // int64 [1]: gradient elements that fixed point cannot hold
constexpr const char* kEvaluationLeaf = "evaluate.totals";  // as step.totals
constexpr const char* kFixedPointPrefix = "fixed_point/";   // int64 sums of gradients

/// By ProgramKind; what profilers show.
constexpr std::array<const char*, 5> kProgramNames{"accumulate", "last micro-batch, reduce and update", "reduce and update",
                                                   "evaluate", "logits"};

const TensorType kTotalsType{DType::int64, {2}};
const TensorType kPoisonedType{DType::int64, {1}};
constexpr double kLargestFixedPoint = 0x1p15;
const TensorType kStepType{DType::float64, {kernels::kStepFields}};

TensorType news_type(int ranks) {
  static_assert(sizeof(RankNews) == 4 * sizeof(std::int64_t));
  return {DType::int64, {ranks, 4}};
}

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

double flops_without_recomputation(const Tape& tape, const Plan& plan) {
  double sum = 0;
  for (const int step : plan.steps) {
    const Tape::Node& node = tape.nodes()[static_cast<std::size_t>(step)];
    std::vector<TensorType> inputs, outputs;
    for (const Value value : node.inputs) {
      inputs.push_back(tape.type(value));
    }
    for (const Value value : node.outputs) {
      outputs.push_back(tape.type(value));
    }
    sum += node.recomputed ? 0 : node.op->flops(inputs, outputs);
  }
  return sum;
}

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
      return leaf.name.starts_with("master/") ? "master weights" : leaf.name.substr(0, leaf.name.find_first_of("/."));
  }
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

/// Emits and plans the programs of one rank.
class ProgramPlanner {
 public:
  ProgramPlanner(const ProgramOptions& options, Communicator& communicator)
      : options_(options),
        communicator_(communicator),
        optimizer_(make_optimizer(options.optimizer, options.optimizer_settings)) {}

  ProgramPlans run();

 private:
  using Kind = ProgramKind;

  void emit(ProgramPlans::Planned& built);
  void emit_gradients(Tape& tape);
  void emit_closing(Tape& tape);
  std::vector<Value> gradient_leaves(Tape& tape);
  void lay_out_gradients();
  void lay_out_other_leaves();
  bool has_master_copy(const ParameterInfo& parameter) const;
  DType parameter_dtype(const ParameterInfo& parameter) const;

  const ProgramOptions& options_;
  Communicator& communicator_;
  std::unique_ptr<Optimizer> optimizer_;
  std::vector<ParameterInfo> parameters_;
  ProgramPlans plans_;
};

std::uint64_t hash_name(const std::string& name) {
  std::uint64_t hash = 0xcbf29ce484222325;  // FNV-1a
  for (const char c : name) {
    hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  }
  return hash;
}

template <class A>
void initialize_tensor(std::span<A> out, const ParameterInfo& parameter, std::uint64_t seed) {
  RandomStream random(seed ^ hash_name(parameter.name));
  const double sigma = 1.0 / std::sqrt(static_cast<double>(parameter.shape.columns()));
  for (A& x : out) {
    switch (parameter.initialization) {
      case Initialization::normal: {
        double z = random.normal();
        while (std::abs(z) > 3) {
          z = random.normal();
        }
        x = static_cast<A>(sigma * z);
        break;
      }
      case Initialization::ones:
        x = 1;
        break;
      case Initialization::zeros:
        x = 0;
        break;
      case Initialization::log_decay:
        x = static_cast<A>(std::log(0.01 + 1.99 * random.uniform()));
        break;
      case Initialization::log_rate:
        x = static_cast<A>(0.5 * std::log(0.81 + 0.188 * random.uniform()));
        break;
    }
  }
}

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
          .optimizer = o.name,
          .optimizer_settings = {o.beta1, o.beta2, o.eps, o.weight_decay, o.clip},
          .device = device};
}

ProgramPlans plan_programs(const ProgramOptions& options, Communicator& ranks) {
  return ProgramPlanner(options, ranks).run();
}

ModelPrograms::ModelPrograms(const ProgramOptions& options, Communicator& communicator)
    : options_(options),
      communicator_(communicator),
      optimizer_(make_optimizer(options.optimizer, options.optimizer_settings)),
      storage_(options.device),
      arena_(options.device) {
  ProgramPlans plans = plan_programs(options_, communicator_);
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

ProgramPlans ProgramPlanner::run() {
  require<UsageError>(options_.device == Device::cpu || options_.dtype != DType::float64,
                      "float64 is computed on the CPU only; use train.dtype float32 or bfloat16 here");
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
    emit(built);
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
  if (built.kind == Kind::empty_closing) {
    emit_closing(tape);
    return;
  }
  const bool gradients = built.kind == Kind::accumulate || built.kind == Kind::closing;
  const DeclaredModel model = declare_model(tape, {.config = options_.model,
                                                   .chunking = options_.chunking,
                                                   .batch = options_.micro_batch,
                                                   .dtype = options_.dtype,
                                                   .recompute = options_.recompute && gradients});
  parameters_ = model.parameters;
  if (built.kind == Kind::logits) {
    built.output = ops::linear(tape, model.hidden, model.output_weight);
    tape.mark_output(built.output);
    return;
  }
  const Value targets = tape.input(kTargetsLeaf, {DType::int32, {options_.micro_batch.rows()}});
  if (!gradients) {
    ops::accumulate_loss(tape, tape.leaf(kEvaluationLeaf, kTotalsType, Role::state),
                         ops::linear_cross_entropy(tape, model.hidden, model.output_weight, targets));
    return;
  }
  const double tokens = static_cast<double>(options_.global_batch * options_.micro_batch.length);
  const Value losses = ops::linear_cross_entropy_root(tape, model.hidden, model.output_weight, targets, 1.0 / tokens);
  ops::accumulate_loss(tape, tape.leaf(kTotalsLeaf, kTotalsType, Role::state), losses);
  tape.backward(losses);
  emit_gradients(tape);
  if (built.kind == Kind::closing) {
    emit_closing(tape);
  }
}

/// In deterministic mode each micro-batch's gradients go into fixed-point sums as soon as they are complete.
void ProgramPlanner::emit_gradients(Tape& tape) {
  if (!options_.deterministic) {
    return;
  }
  for (const Value gradient : gradient_leaves(tape)) {
    const std::string name = kFixedPointPrefix + tape.info(gradient).name;
    const Value sum = tape.leaf(name, {DType::int64, tape.type(gradient).shape}, Role::gradient);
    const auto additions = static_cast<double>(options_.global_batch / options_.micro_batch.sequences);
    ops::add_to_fixed_point(tape, sum, tape.leaf(kPoisonedLeaf, kPoisonedType, Role::state), gradient,
                            kLargestFixedPoint / additions);
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

/// The reduction over ranks in buckets, each started as soon as its gradients are complete, then the update.
void ProgramPlanner::emit_closing(Tape& tape) {
  const std::vector<Value> gradients = gradient_leaves(tape);
  std::vector<Value> sums = gradients;
  if (options_.deterministic) {
    for (Value& sum : sums) {
      sum = tape.leaf(kFixedPointPrefix + tape.info(sum).name, {DType::int64, tape.type(sum).shape}, Role::gradient);
    }
  }
  if (communicator_.size() > 1) {
    std::vector<std::pair<std::shared_ptr<ops::PendingReduction>, std::vector<Value>>> pending;
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
    bucket.insert(bucket.end(), {tape.leaf(kTotalsLeaf, kTotalsType, Role::state),
                                 tape.leaf(kNewsLeaf, news_type(communicator_.size()), Role::state),
                                 tape.leaf(kPoisonedLeaf, kPoisonedType, Role::state)});
    start();
    for (const auto& [reduction, leaves] : pending) {
      ops::wait_all_reduce(tape, reduction, leaves);
    }
  }
  if (options_.deterministic) {
    for (std::size_t i = 0; i < gradients.size(); ++i) {
      ops::fixed_point_to_float(tape, gradients[i], sums[i], tape.leaf(kPoisonedLeaf, kPoisonedType, Role::state));
    }
  }
  std::vector<OptimizedParameter> optimized;
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    const ParameterInfo& p = parameters_[parameters_.size() - 1 - i];
    const Value weight = tape.leaf(p.name, {parameter_dtype(p), p.shape}, Role::parameter);
    const bool copy = has_master_copy(p);
    const Value master = copy ? tape.leaf("master/" + p.name, {accumulator_of(options_.dtype), p.shape}, Role::state) : weight;
    optimized.push_back({.name = p.name, .compute = copy ? weight : Value{}, .master = master, .gradient = gradients[i]});
  }
  const Value norm = ops::square_sum(tape, gradients);
  optimizer_->emit(tape, tape.leaf(kStepLeaf, kStepType, Role::state), norm, optimized);
}

/// Buckets are ranges of memory: gradients lie next to each other in the order of reduction.
void ProgramPlanner::lay_out_gradients() {
  std::vector<Storage::Entry> gradients, fixed_point;
  for (auto p = parameters_.rbegin(); p != parameters_.rend(); ++p) {
    gradients.push_back({"gradient/" + p->name, {accumulator_of(options_.dtype), p->shape}});
    fixed_point.push_back({kFixedPointPrefix + gradients.back().name, {DType::int64, p->shape}});
  }
  const std::vector<Storage::Entry> totals{
      {kTotalsLeaf, kTotalsType}, {kNewsLeaf, news_type(communicator_.size())}, {kPoisonedLeaf, kPoisonedType}};
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
        const Tape::ValueInfo& info = planned.tape.info(value);
        if (info.role != Role::activation) {
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

Tensor ModelPrograms::master(const std::string& name) const {
  return storage_.contains("master/" + name) ? storage_.find("master/" + name) : storage_.find(name);
}

/// Fills a weight from float32 values, rounded where it is bfloat16.
void ModelPrograms::write_weights(const Tensor& to, std::span<const float> values) {
  if (to.dtype() == DType::bfloat16) {
    std::vector<bfloat16> rounded(values.size());
    std::transform(values.begin(), values.end(), rounded.begin(), [](float x) { return bfloat16(x); });
    copy_from_host(to, {rounded.data(), to.type});
  } else {
    copy_from_host(to, {const_cast<float*>(values.data()), to.type});  // a view has no const; it is only read
  }
}

void ModelPrograms::initialize(std::uint64_t seed) {
  for (const ParameterInfo& parameter : parameters_) {
    const Tensor tensor = master(parameter.name);
    const auto elements = static_cast<std::size_t>(tensor.elements());
    if (tensor.dtype() == DType::float64) {
      initialize_tensor(tensor.span<double>(), parameter, seed);
    } else {
      std::vector<float> values(elements);
      initialize_tensor(std::span(values), parameter, seed);
      write_weights(tensor, values);
    }
  }
  refresh_compute_weights();
}

void ModelPrograms::load_weights(const std::function<void(const std::vector<NamedTensor>&)>& read) {
  Storage temporary;
  std::vector<NamedTensor> tensors;
  for (const ParameterInfo& parameter : parameters_) {
    Tensor tensor = master(parameter.name);
    if (tensor.dtype() == DType::bfloat16) {
      tensor = temporary.get(parameter.name, {DType::float32, parameter.shape});
    }
    tensors.push_back({"parameters/" + parameter.name, tensor});
  }
  read(tensors);
  for (const auto& [name, tensor] : temporary.tensors()) {
    write_weights(storage_.find(name), tensor.span<float>());
  }
  refresh_compute_weights();
}

void ModelPrograms::refresh_compute_weights() {
  for (const ParameterInfo& parameter : parameters_) {
    if (storage_.contains("master/" + parameter.name)) {
      const HostCopy weights(master(parameter.name));
      write_weights(storage_.find(parameter.name), weights.tensor().span<float>());
    }
  }
}

/// The first run goes op by op (libraries choose their algorithms then), the second is recorded where the device can, and from
/// then on the recording is replayed: one launch a program. A rank runs either the closing program or the empty one in all
/// steps of a run, so all ranks record their reductions at the same step, as NCCL asks.
void ModelPrograms::run(Replay& replay) {
  const NamedRange range(runtime(options_.device), kProgramNames[static_cast<std::size_t>(&replay - replays_.data())]);
  const Launch launch{.device = options_.device, .stream = runtime(options_.device).stream()};
  const bool reduces = communicator_.size() > 1 &&
                       (&replay == &replay_of(ProgramKind::closing) || &replay == &replay_of(ProgramKind::empty_closing));
  if (once_) {
    replay.program.run_observed(launch, std::exchange(once_, nullptr), false);
  } else if (observed_) {
    replay.program.run_observed(launch, observer_, check_finite_);
  } else {
    if (replay.runs == 1 && (!reduces || communicator_.recordable())) {
      replay.recorded = runtime(options_.device).record([&] { replay.program.run(launch); });
    }
    ++replay.runs;
    if (replay.recorded) {
      replay.recorded->launch();
    } else {
      replay.program.run(launch);
    }
  }
  if (reduces) {
    communicator_.work_enqueued();
  }
}

void ModelPrograms::observe(Program::Observer observer, bool check_finite) {
  observer_ = std::move(observer);
  check_finite_ = check_finite;
  observed_ = true;
}

void ModelPrograms::accumulate() {
  run(replay_of(ProgramKind::accumulate));
}

StepResult ModelPrograms::finish_step(double learning_rate, std::int64_t updates, bool empty, const RankNews& news,
                                      double norm_limit) {
  const auto step = storage_.mirror(kStepLeaf).span<double>();
  const OptimizerSettings& o = options_.optimizer_settings;
  step[kernels::kStepLearningRate] = learning_rate;
  step[kernels::kStepBias1] = 1 - std::pow(o.beta1, static_cast<double>(updates + 1));
  step[kernels::kStepBias2] = 1 - std::pow(o.beta2, static_cast<double>(updates + 1));
  step[kernels::kStepNormLimit] = norm_limit;
  // Everybody's place is zero except on the rank itself, so their sum is what all ranks say.
  const auto all_news = storage_.mirror(kNewsLeaf).span<std::int64_t>();
  std::fill(all_news.begin(), all_news.end(), 0);
  std::memcpy(&all_news[sizeof(RankNews) / sizeof(std::int64_t) * static_cast<std::size_t>(communicator_.rank())], &news,
              sizeof news);
  storage_.upload(kStepLeaf);
  storage_.upload(kNewsLeaf);
  run(replay_of(empty ? ProgramKind::empty_closing : ProgramKind::closing));
  clear(storage_.find(kPoisonedLeaf));
  storage_.download(kStepLeaf);
  storage_.download(kNewsLeaf);
  const auto tokens = static_cast<double>(options_.global_batch * options_.micro_batch.length);
  const double loss = take_loss(storage_, kTotalsLeaf, tokens);
  std::vector<RankNews> heard(static_cast<std::size_t>(communicator_.size()));
  std::memcpy(static_cast<void*>(heard.data()), all_news.data(), all_news.size_bytes());
  return {.loss = loss,
          .gradient_norm = step[kernels::kStepGradientNorm],
          .learning_rate = learning_rate,
          .skipped = step[kernels::kStepSkipped] != 0,
          .news = std::move(heard)};
}

/// A NaN in one gradient makes the norm of all ranks' sum one.
void ModelPrograms::spoil_step() {
  if (options_.deterministic) {
    std::int64_t poisoned = 1;
    copy_from_host(storage_.find(kPoisonedLeaf), {&poisoned, kPoisonedType});
    return;
  }
  const Tensor gradient = this->gradient(parameters_.back().name);
  dispatch_floating(gradient.dtype(), "spoil_step", [&]<class T>() {
    T nan = std::numeric_limits<T>::quiet_NaN();
    copy_from_host({gradient.data, {gradient.dtype(), {1}}, gradient.device}, {&nan, {gradient.dtype(), {1}}});
  });
}

void ModelPrograms::discard_gradients() {
  for (const auto& [name, tensor] : storage_.tensors()) {
    if (name.starts_with("gradient/") || name.starts_with(kFixedPointPrefix) || name == kTotalsLeaf || name == kPoisonedLeaf) {
      clear(tensor);
    }
  }
}

double ModelPrograms::evaluate() {
  run(replay_of(ProgramKind::evaluate));
  return take_loss(storage_, kEvaluationLeaf, 1.0);
}

Tensor ModelPrograms::logits() {
  run(replay_of(ProgramKind::logits));
  return replay_of(ProgramKind::logits).program.tensor(logits_value_);
}

std::vector<std::string> ModelPrograms::state_leaves() const {
  std::vector<std::string> names;
  for (const std::string_view state : optimizer_->state_names()) {
    for (const ParameterInfo& parameter : parameters_) {
      names.push_back(concat(state, "/", parameter.name));
    }
  }
  return names;
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
  return found == programs.end() ? 0 : flops_without_recomputation(found->tape, found->plan);
}

MemoryReport ProgramPlans::memory() const {
  MemoryReport report;
  for (const Block& block : storage) {
    for (const auto& [name, type] : block.entries) {
      const bool gradient = name.starts_with("gradient/") || name.starts_with(kFixedPointPrefix);
      const bool state = name.starts_with("master/") || name.starts_with("moment") || name.starts_with("step.");
      const bool parameter = std::any_of(parameters.begin(), parameters.end(), [&](const auto& p) { return p.name == name; });
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
