// Optimizers are ops on the tape that turn gradients into new weights. One file each, one line in registry.cpp.
#pragma once

#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "src/graph/tape.h"

namespace attamba {

/// What an optimizer may be told; the defaults are those of the paper's runs.
struct OptimizerSettings {
  double beta1 = 0.9, beta2 = 0.95, epsilon = 1e-8, weight_decay = 0.033;
  double clip = 1.0;  ///< largest global gradient norm; 0: no clipping
};

/// One weight as the optimizer sees it.
struct OptimizedParameter {
  std::string name;
  Value compute;   ///< the copy in the compute type; empty when the model reads the master weights themselves
  Value master;    ///< accumulator type
  Value gradient;  ///< accumulator type; the optimizer leaves it 0
};

class Optimizer {
 public:
  virtual ~Optimizer() = default;
  /// Emits the update of all parameters. `step` is the float64 leaf of kernels::StepField, `norm_squared` the squared global
  /// gradient norm. State lives in leaves named "STATE/PARAMETER" of Role::state.
  virtual void emit(Tape& tape, Value step, Value norm_squared, std::span<const OptimizedParameter> parameters) const = 0;
  /// Names of its state tensors per parameter, as they appear in checkpoints: {"moment1", "moment2"}.
  virtual std::vector<std::string_view> state_names() const = 0;
};

/// Throws UsageError for names it does not know.
std::unique_ptr<Optimizer> make_optimizer(std::string_view name, const OptimizerSettings& settings);

/// Every name that `make_optimizer` knows.
const std::vector<std::string_view>& optimizer_names();

std::unique_ptr<Optimizer> make_adamw(const OptimizerSettings& settings);

}  // namespace attamba
