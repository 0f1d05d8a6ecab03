// What a run would take on a machine that need not be there: memory from the very plans that training allocates, time from a
// model of the machine (docs/plan.md).
#pragma once

#include <cstdint>
#include <iosfwd>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "src/train/config.h"
#include "src/train/machine.h"
#include "src/train/step_time.h"

namespace attamba {

struct RunPlanRequest {
  Config config;
  int ranks = 1;
  Machine machine;
  Device kernels = Device::cpu;  ///< whose kernels are asked how much scratch they need
  double tokens = 0;             ///< of the whole run; 0: train.steps decide
};

/// What one rank keeps for one purpose.
struct MemoryRow {
  std::string purpose;
  std::size_t bytes = 0;
};

/// A configuration's demands, without looking at other ones.
struct Demands {
  std::vector<MemoryRow> lasting;  ///< weights, moments, gradients, inputs, ...
  std::size_t arena = 0;           ///< activations and scratch
  std::vector<MemoryRow> largest;  ///< of the arena, where it is fullest; equal ones of many layers are one row
  StepTime time;
  std::int64_t parameters = 0;
  double model_flops = 0;  ///< of a step over all ranks, recomputation not counted
  double checkpoint_bytes = 0;

  /// What the program allocates.
  std::size_t allocated() const;
};
Demands demands_of(const RunPlanRequest& request);

/// A change to a configuration, and what comes of it.
struct Proposal {
  std::string change;  ///< as on the command line: "--train.micro_batch 8 --train.recompute true"
  double bytes = 0;    ///< on each GPU, `reserved` included
  double step_seconds = 0;
  Config config;
};

/// What a ZeRO stage keeps and moves, by its rule.
struct StageRow {
  int stage = 0;
  double kept_bytes = 0;  ///< weights, gradients and optimizer state of a rank
  double sent_bytes = 0;  ///< by each rank in a step
  double seconds = 0;     ///< that the network takes for it
};

struct RunPlan {
  RunPlanRequest request;
  Demands demands;
  std::vector<StageRow> stages = {};
  std::int64_t steps = 0;
  std::int64_t micro_batches = 0;  ///< of a step, over all ranks
  std::vector<std::string> warnings = {};
  std::vector<Proposal> proposals = {};  ///< when it does not fit: those that do, quickest step first

  double used_bytes() const { return static_cast<double>(demands.allocated()) + request.machine.reserved; }
  bool fits() const { return used_bytes() <= request.machine.memory; }
  double tokens_per_step() const;
  /// Of the ranks' largest products, what the model's own operations come to.
  double efficiency() const;
  double run_seconds() const { return static_cast<double>(steps) * demands.time.total(); }
};

/// Throws UsageError when no such run can exist. Needs no data, no GPU, and no other rank.
RunPlan plan_run(const RunPlanRequest& request);

/// The programs of a run. When its device has no room for them, the error also says what would fit.
std::unique_ptr<ModelPrograms> make_run_programs(const Config& config, const ChunkingStrategy* chunking, Device device,
                                                 Communicator& communicator);

void print_run_plan(std::ostream& out, const RunPlan& plan);
nlohmann::json to_json(const RunPlan& plan);

}  // namespace attamba
