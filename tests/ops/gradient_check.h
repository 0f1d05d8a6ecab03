// Gradients against finite differences, for any row of op_rows.cpp.
#pragma once

#include <string>
#include <vector>

#include "tests/ops/op_case.h"

namespace attamba::testing_support {

/// The largest disagreement found in one leaf.
struct GradientError {
  std::string leaf;
  std::size_t element = 0;
  double computed = 0, expected = 0;
  double tolerance = 0;
};

/// Compares every element of every gradient of a row, in float64, with the fourth-order central difference of the objective
///   f'(x) ~ (8 (f(x+h) - f(x-h)) - (f(x+2h) - f(x-2h))) / 12h.
/// Truncation is h^4/30 of the fifth derivative (2e-17 of it for h = 2^-13), rounding about 1.5 eps |f| / h, below 1e-10 for
/// objectives below 50. Returns the elements that disagree by more than `tolerance` times the largest gradient of the leaf.
std::vector<GradientError> check_gradients(const OpRow& row, double tolerance = 1e-8);

}  // namespace attamba::testing_support
