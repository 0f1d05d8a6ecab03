// Whole models at the smallest sizes that still have every part, declared through the registry, with gradients.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "src/graph/program.h"
#include "src/models/inputs.h"
#include "src/models/model.h"

namespace attamba::testing_support {

struct TinyConfig {
  std::string name;
  ModelConfig config;
};

/// How GoogleTest shows a case.
inline void PrintTo(const TinyConfig& c, std::ostream* out) {
  *out << c.name;
}

/// Every kind that the registry can declare, and every variant of those kinds.
const std::vector<TinyConfig>& tiny_configs();

/// A declared model with memory and a batch: per-token losses, and gradients of their mean.
class TinyModel {
 public:
  struct Options {
    DType dtype = DType::float64;
    bool recompute = false;
    BatchShape batch{.sequences = 2, .length = 11};
  };
  TinyModel(const ModelConfig& config, const Options& options);

  /// Deterministic weights that leave no part of the model out, the same in every compute type up to rounding to bfloat16.
  void fill_weights();
  /// Windows of n + 1 tokens each; see BatchWriter.
  void write(const std::vector<std::int32_t>& windows, const std::vector<std::int32_t>& document_starts = {});
  /// A batch of random tokens.
  std::vector<std::int32_t> random_windows(std::uint64_t seed) const;

  /// Runs forward and backward, from zero gradients.
  void run();
  /// Per-token losses [T] of the last run.
  std::vector<double> losses() const;
  double mean_loss() const;
  std::vector<double> gradient(const std::string& parameter) const;
  Tensor weight(const std::string& parameter) const { return storage_.find(parameter); }

  const std::vector<ParameterInfo>& parameters() const { return model_.parameters; }
  const Tape& tape() const { return tape_; }
  const Plan& plan() const { return plan_; }
  const Program& program() const { return program_; }

 private:
  ModelConfig config_;
  Options options_;
  std::unique_ptr<ChunkingStrategy> chunking_;
  Tape tape_;
  DeclaredModel model_;
  Value losses_;
  Plan plan_;
  Storage storage_;
  Arena arena_;
  Program program_;
  std::unique_ptr<BatchWriter> writer_;
};

}  // namespace attamba::testing_support
