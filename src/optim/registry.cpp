#include <array>
#include <utility>

#include "src/core/error.h"
#include "src/optim/optimizer.h"

namespace attamba {
namespace {

using Factory = std::unique_ptr<Optimizer> (*)(const OptimizerSettings&);

constexpr std::array kOptimizers{
    std::pair<std::string_view, Factory>{"adamw", make_adamw},
};

}  // namespace

std::unique_ptr<Optimizer> make_optimizer(std::string_view name, const OptimizerSettings& settings) {
  for (const auto& [known, factory] : kOptimizers) {
    if (known == name) {
      return factory(settings);
    }
  }
  throw UsageError(concat("optim.name: no optimizer named ", name));
}

const std::vector<std::string_view>& optimizer_names() {
  static const std::vector<std::string_view> kNames = [] {
    std::vector<std::string_view> names;
    for (const auto& [name, factory] : kOptimizers) {
      names.push_back(name);
    }
    return names;
  }();
  return kNames;
}

}  // namespace attamba
