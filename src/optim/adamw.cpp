#include "src/ops/ops.h"
#include "src/optim/optimizer.h"

namespace attamba {
namespace {

/// AdamW with decoupled weight decay on every parameter (docs/model.md; the arithmetic is that of kernels::adamw).
class AdamW final : public Optimizer {
 public:
  explicit AdamW(const OptimizerSettings& settings) : settings_(settings) {}

  void emit(Tape& tape, Value step, Value norm_squared, std::span<const OptimizedParameter> parameters) const override {
    std::vector<ops::AdamWLeaves> leaves;
    for (const OptimizedParameter& p : parameters) {
      const TensorType type = tape.type(p.master);
      leaves.push_back({.compute = p.compute,
                        .master = p.master,
                        .moment1 = tape.leaf("moment1/" + p.name, type, Role::state),
                        .moment2 = tape.leaf("moment2/" + p.name, type, Role::state),
                        .gradient = p.gradient});
    }
    ops::adamw(tape, step, norm_squared, leaves,
               {.beta1 = settings_.beta1,
                .beta2 = settings_.beta2,
                .epsilon = settings_.epsilon,
                .weight_decay = settings_.weight_decay,
                .clip = settings_.clip});
  }

  std::vector<std::string_view> state_names() const override { return {"moment1", "moment2"}; }

 private:
  OptimizerSettings settings_;
};

}  // namespace

std::unique_ptr<Optimizer> make_adamw(const OptimizerSettings& settings) {
  return std::make_unique<AdamW>(settings);
}

}  // namespace attamba
