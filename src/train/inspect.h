// Looking inside a program while it runs one op at a time: statistics of tensors by name, and where two devices begin to
// differ.
#pragma once

#include <iosfwd>
#include <optional>
#include <string>
#include <vector>

#include "src/train/programs.h"

namespace attamba {

/// What one tensor holds. Elements that are not finite are counted and left out of the rest.
struct TensorStatistics {
  double least = 0, most = 0, mean = 0, rms = 0;
  std::int64_t not_finite = 0;
};
TensorStatistics statistics_of(const Tensor& tensor);

/// Prints a line for every tensor that an op writes (activations, gradients, optimizer state) whose name matches the shell
/// pattern, e.g. "layers.0.attention/*" or "gradient/*wq*": name, type, range, mean, root mean square, count of NaN and
/// infinity.
Program::Observer watch_tensors(const std::string& pattern, std::ostream& out);

/// How far one op's result on a device is from the CPU's.
struct OpDifference {
  std::string name;                  ///< of the result: "layers.0.attention/matmul.0"
  std::string op;                    ///< kind of op
  double error = 0;                  ///< norm of the difference relative to the CPU's norm; NaN where either is not finite
  std::int64_t row = 0, column = 0;  ///< of the element that differs most
  double expected = 0, found = 0;    ///< there
};

/// Runs forward and backward of the batch in both programs' inputs, which must have the same model, weights, types and batch,
/// op by op, and compares all that the ops compute and the gradients they add to. In the order of execution. Gradients are
/// discarded.
std::vector<OpDifference> compare_devices(ModelPrograms& programs, ModelPrograms& on_cpu);

/// The first difference above what the compute type explains, then the largest by kind of op. Returns whether there was one.
bool print_differences(const std::vector<OpDifference>& differences, DType dtype, std::ostream& out);

}  // namespace attamba
