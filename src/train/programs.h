// Everything that one rank runs: the model's programs over one set of weights. A step is any number of `accumulate` replays and
// then one closing replay, with or without a last micro-batch in it (docs/architecture.md).
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "comm/communicator.h"
#include "src/core/storage.h"
#include "src/graph/program.h"
#include "src/models/inputs.h"
#include "src/models/model.h"
#include "src/optim/optimizer.h"
#include "src/train/sharding.h"
#include "src/train/state_slice.h"

namespace attamba {

/// A tensor as a checkpoint names it.
struct NamedTensor {
  std::string name;
  Tensor tensor;
};

struct ProgramOptions {
  ModelConfig model;
  const ChunkingStrategy* chunking = nullptr;  ///< outlives the programs
  BatchShape micro_batch;
  DType dtype = DType::float32;
  bool recompute = false;
  bool deterministic = false;     ///< gradients summed as 64-bit fixed point: the same bits for any number of ranks
  std::int64_t global_batch = 1;  ///< sequences per step over all ranks; the loss is their mean over tokens
  bool zero_on_node = false;      ///< ranks of one host divide among them, and hosts hold the same
  int zero = 0;  ///< what ranks divide instead of each keeping it: 1 optimizer state, 2 gradients too, 3 weights too
  std::string optimizer = "adamw";
  OptimizerSettings optimizer_settings = {};
  bool training = true;
  bool logits = false;                              ///< also a program that keeps logits (checks, sampling)
  std::size_t bucket_bytes = std::size_t{4} << 20;  ///< gradients travel in pieces of about this size
  Device device = Device::cpu;
};

enum class ProgramKind : std::uint8_t { accumulate, closing, empty_closing, evaluate, logits };

/// What one rank will run, before it has any memory: its programs emitted, differentiated and planned, and every tensor that
/// lasts from step to step.
struct ProgramPlans {
  struct Planned {
    ProgramKind kind = ProgramKind::evaluate;
    Tape tape;
    Plan plan;
    Value output;  ///< of the logits program
  };
  /// Tensors that are made together and lie next to each other, in this order.
  struct Block {
    std::string purpose;
    std::vector<Storage::Entry> entries;
    std::size_t bytes() const;
  };

  std::vector<Planned> programs;
  std::vector<ParameterInfo> parameters;
  std::vector<Block> storage;
  std::shared_ptr<const Sharding> sharding;  ///< empty when every rank keeps everything

  const Planned& program(ProgramKind kind) const;
  /// The program whose arena is the largest: all share one.
  const Planned& largest() const;
  /// FLOPs of the ops that compute one micro-batch's gradients, recomputation not counted.
  double model_flops() const;
  MemoryReport memory() const;
};

/// Calls body(node, input types, output types) for everything that a program runs, in order.
template <class Body>
void for_each_op(const ProgramPlans::Planned& program, const Body& body) {
  for (const int step : program.plan.steps) {
    const Tape::Node& node = program.tape.nodes()[static_cast<std::size_t>(step)];
    std::vector<TensorType> inputs, outputs;
    for (const Value value : node.inputs) {
      inputs.push_back(program.tape.type(value));
    }
    for (const Value value : node.outputs) {
      outputs.push_back(program.tape.type(value));
    }
    body(node, inputs, outputs);
  }
}

/// Who sums up what: all ranks, those that divide things among them, and those of other such groups that own the same parts.
struct RankGroups {
  Communicator* all = nullptr;
  Communicator* sharers = nullptr;  ///< may be `all`
  Communicator* copies = nullptr;   ///< empty when there is one group
};
/// The plans of rank `ranks.rank()` of `ranks.size()`. Nothing is allocated and the communicators are not used, only referred
/// to.
ProgramPlans plan_programs(const ProgramOptions& options, const RankGroups& groups);
inline ProgramPlans plan_programs(const ProgramOptions& options, Communicator& ranks) {
  return plan_programs(options, RankGroups{.all = &ranks, .sharers = &ranks});
}

/// The device has no room for a rank's programs: says what is largest among what they need.
class ProgramsTooLarge : public OutOfMemory {
 public:
  ProgramsTooLarge(const OutOfMemory& error, const ProgramPlans& plans, std::size_t available);
  /// Bytes that these programs could have had; 0 where nobody knows.
  std::size_t available() const { return available_; }

 private:
  std::size_t available_;
};

struct Config;
/// The programs that a run's configuration asks for, on a device.
ProgramOptions program_options(const Config& config, const ChunkingStrategy* chunking, Device device);

/// What a rank tells all others with a step's reduction.
struct RankNews {
  std::int64_t stop = 0;         ///< that a rank was asked to stop, packed (stop.h); 0: none was
  std::int64_t abandoned = 0;    ///< 1: its part of this step is missing, so the step must not count
  std::int64_t nanoseconds = 0;  ///< that it computed in the step before, per micro-batch; 0: not known
  std::int64_t fingerprint = 0;  ///< of what the step before came to, the same on all ranks
};

/// What one optimizer step came to, the same on all ranks.
struct StepResult {
  double loss = 0;           ///< mean over the global batch's tokens, nats; NaN when any token's loss was not finite
  double gradient_norm = 0;  ///< before clipping
  double learning_rate = 0;
  bool skipped = false;        ///< the norm was not finite, or above the limit: weights and moments are unchanged
  std::vector<RankNews> news;  ///< of every rank
};

class ModelPrograms {
 public:
  /// Makes memory for what `plan_programs` plans, and binds it. The communicator outlives this object.
  ModelPrograms(const ProgramOptions& options, Communicator& communicator);

  /// Truncated-normal weights and so on (docs/model.md): a pure function of the seed and each parameter's name.
  void initialize(std::uint64_t seed);
  /// Has `read` fill master weights ("parameters/NAME", accumulator type), also where this object keeps only compute weights.
  void load_weights(const std::function<void(const std::vector<NamedTensor>&)>& read);
  /// After writing master weights from outside: refreshes the copies in the compute type, and those of other ranks' parts, so
  /// all ranks call it.
  void refresh_compute_weights();
  /// What a checkpoint holds, and this rank keeps: master weights ("parameters/NAME") and optimizer state ("moment1/NAME",
  /// ...), whole or in part. Filling these and `refresh_compute_weights` is loading.
  std::vector<StateSlice> kept_state() const;
  /// Of these, what this rank saves: over all ranks, everything once.
  std::vector<StateSlice> saved_state() const;

  BatchWriter& inputs() { return *writer_; }
  /// Forward and backward of the batch in the inputs, gradients accumulating. Of a step, all ranks make as many replays.
  void accumulate();
  /// Ends a step: the batch in the inputs (unless `empty`, for a rank without a last micro-batch), the reduction over ranks,
  /// the update, unless the gradient norm is not finite or above `norm_limit` > 0. `updates` counts optimizer updates done so
  /// far, for the moments' bias. While a device still computes `meanwhile` is called, which may write the next inputs.
  StepResult finish_step(double learning_rate, std::int64_t updates, bool empty, const RankNews& news = {},
                         double norm_limit = 0, const std::function<void()>& meanwhile = {});
  /// Makes the step that is being gathered one that every rank skips.
  void poison_step();
  /// Forgets what `accumulate` has gathered since the last step.
  void discard_gradients();
  /// Sum of token losses of the batch in the inputs, in nats, without gradients.
  double evaluate();
  /// Logits [T, V] of the batch in the inputs, on the device; valid until the next replay.
  Tensor logits();

  /// Runs ops one at a time from now on: checks results for NaN and infinity, and reports to the observer (may be empty).
  void observe(Program::Observer observer, bool check_finite);
  /// The same for the next program alone, without checks.
  void observe_once(Program::Observer observer) { once_ = std::move(observer); }

  Device device() const { return options_.device; }
  Storage& storage() { return storage_; }
  const std::vector<ParameterInfo>& parameters() const { return parameters_; }
  /// 1 to 3 when something is divided among ranks.
  int zero() const { return sharding_ ? sharding_->stage() : 0; }
  /// Whether a replay of this kind needs all ranks: then each makes as many as any other.
  bool runs_together(ProgramKind kind) const;
  /// Master weights of a parameter, in the accumulator type; like gradients, of a rank that keeps everything.
  Tensor master(const std::string& name) const;
  Tensor gradient(const std::string& name) const { return storage_.find("gradient/" + name); }
  /// Leaves that a checkpoint must hold besides the master weights: "moment1/NAME", ...
  std::vector<std::string> state_leaves() const;

  const MemoryReport& memory() const { return memory_; }
  const Plan& largest_plan() const { return largest_plan_; }
  /// FLOPs of the ops that compute one micro-batch's gradients, recomputation not counted.
  double model_flops() const { return model_flops_; }
  const Program& closing_program() const { return replays_[static_cast<std::size_t>(ProgramKind::closing)].program; }

 private:
  static constexpr std::size_t kKinds = 5;
  /// A program, and its recording once it has run.
  struct Replay {
    Program program;
    std::int64_t runs = 0;
    std::unique_ptr<RecordedWork> recorded;
  };
  void make_memory(const ProgramPlans& plans);
  void run(ProgramKind kind);
  Replay& replay_of(ProgramKind kind) { return replays_[static_cast<std::size_t>(kind)]; }
  /// Elements of a parameter that this rank keeps, as a view of its master weights and one of their copies, if any.
  struct KeptWeights {
    std::size_t parameter = 0;
    std::int64_t begin = 0, end = 0;
    Tensor master, compute;
  };
  std::vector<KeptWeights> kept_weights() const;
  RankGroups make_groups();

  ProgramOptions options_;
  Communicator& communicator_;
  std::unique_ptr<Communicator> sharers_, copies_;  ///< groups of ranks, where they are not all
  std::unique_ptr<Optimizer> optimizer_;
  Storage storage_;
  Arena arena_;
  std::vector<ParameterInfo> parameters_;
  std::shared_ptr<const Sharding> sharding_;
  Plan largest_plan_;
  MemoryReport memory_;
  std::array<Replay, kKinds> replays_;
  Value logits_value_;
  std::unique_ptr<BatchWriter> writer_;
  double model_flops_ = 0;
  Program::Observer observer_, once_;
  bool observed_ = false, check_finite_ = false, poisoned_ = false;
};

}  // namespace attamba
