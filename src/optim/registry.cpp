#include "src/core/names.h"
#include "src/optim/optimizer.h"

namespace attamba {
namespace {

using Factory = std::unique_ptr<Optimizer> (*)(const OptimizerSettings&);

constexpr std::array kOptimizers{
    std::pair<std::string_view, Factory>{"adamw", make_adamw},
};

}  // namespace

std::unique_ptr<Optimizer> make_optimizer(std::string_view name, const OptimizerSettings& settings) {
  return require_entry("optim.name", kOptimizers, name)(settings);
}

const std::vector<std::string_view>& optimizer_names() {
  static const std::vector<std::string_view> kNames = names_of(kOptimizers);
  return kNames;
}

}  // namespace attamba
