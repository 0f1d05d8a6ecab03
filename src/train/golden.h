// Golden files (docs/model.md): what the float64 oracle computed, and how far a correct program may be from it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "src/core/device.h"
#include "src/core/dtype.h"
#include "src/models/model_config.h"
#include "src/optim/optimizer.h"
#include "src/optim/schedule.h"

namespace attamba {

struct GoldenTensor {
  Shape shape;
  std::vector<double> values;
  double float32_error = 0, bfloat16_error = 0;  ///< of gradients: the oracle's own drift in that type
};

struct GoldenFile {
  std::filesystem::path path;
  ModelConfig model;
  OptimizerSettings optimizer;
  ScheduleSettings schedule;
  std::int64_t steps = 0, sequences = 0, length = 0;  ///< optimizer steps, B, n
  std::vector<std::int32_t> tokens;                   ///< [steps, B, n+1]
  std::vector<std::vector<std::int32_t>> chunk_ends;  ///< per layer, of explicit chunking
  std::map<std::string, GoldenTensor> parameters, gradients, parameters_after;
  GoldenTensor logits;
  std::vector<double> losses, gradient_norms;
  std::map<std::string, double> float32_error, bfloat16_error;  ///< logits, loss, grads_together, losses, params_after
};

/// Throws Error that names the file and what is missing or malformed.
GoldenFile read_golden(const std::filesystem::path& path);

/// One line of the verdict.
struct GoldenCheck {
  std::string quantity;
  double error = 0, tolerance = 0;
  bool passed() const { return error <= tolerance; }  // false for NaN
};

/// Runs the file's model in `dtype` on a device and compares: logits, loss, all gradients together and each one (bfloat16: each
/// kind, over all layers); in float32 and float64 also the losses, gradient norms and weights of the training steps.
std::vector<GoldenCheck> verify_golden(const GoldenFile& golden, DType dtype, Device device = Device::cpu);

}  // namespace attamba
