#include "tests/ops/gradient_check.h"

#include <algorithm>
#include <cmath>

namespace attamba::testing_support {

std::vector<GradientError> check_gradients(const OpRow& row, double tolerance) {
  constexpr double kStep = 0x1p-13;
  RunnableRow runnable(row, DType::float64);
  runnable.run_gradients();
  std::map<std::string, std::vector<double>> gradients;
  for (const std::string& name : runnable.differentiated()) {
    gradients[name] = runnable.gradient(name);
  }
  std::vector<GradientError> errors;
  for (const auto& [name, computed] : gradients) {
    const auto leaf = runnable.leaf(name).span<double>();
    double largest = 0;
    for (const double g : computed) {
      largest = std::max(largest, std::abs(g));
    }
    for (std::size_t i = 0; i < leaf.size(); ++i) {
      const double x = leaf[i];
      const auto at = [&](double offset) {
        leaf[i] = x + offset;
        const double f = runnable.objective();
        leaf[i] = x;
        return f;
      };
      const double expected = (8 * (at(kStep) - at(-kStep)) - (at(2 * kStep) - at(-2 * kStep))) / (12 * kStep);
      const double allowed = tolerance * std::max(largest, 1.0);
      if (!(std::abs(computed[i] - expected) <= allowed)) {
        errors.push_back({.leaf = name, .element = i, .computed = computed[i], .expected = expected, .tolerance = allowed});
      }
    }
  }
  return errors;
}

}  // namespace attamba::testing_support
