// Steps of ranks that share a global batch, and everything they come to, put together from all ranks.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "comm/single_process.h"
#include "src/core/random.h"
#include "src/train/programs.h"
#include "src/train/trainer.h"

namespace attamba::testing_support {

inline ModelConfig small_model() {
  ModelConfig c;
  c.kind = "attamba";
  c.vocab_size = 40;
  c.dim = 64;
  c.n_layers = 3;
  c.n_heads = 2;
  c.ffn_dim = 48;
  c.ssm = {.hidden = 32, .state = 16, .heads = 2, .dt_bias = true};
  c.chunking = {.strategy = "random", .size = 4, .leading_tokens = 2};
  return c;
}

struct StepOptions {
  DType dtype = DType::float32;
  bool deterministic = true, recompute = false;
  int zero = 0;
  bool zero_on_node = false;
  std::int64_t micro_batches = 5;  ///< of one sequence, over all ranks
  std::size_t bucket_bytes = 60'000;
  Device device = Device::cpu;
};

inline constexpr std::int64_t kLength = 16;

/// One rank of those that `communicator` has.
class SteppingRank {
 public:
  SteppingRank(const StepOptions& options, Communicator& communicator)
      : communicator_(communicator),
        model_(small_model()),
        chunking_(make_model_chunking(model_, kLength)),
        share_{.per_step = options.micro_batches, .rank = communicator.rank(), .ranks = communicator.size()},
        programs_({.model = model_,
                   .chunking = chunking_.get(),
                   .micro_batch = {1, kLength},
                   .dtype = options.dtype,
                   .recompute = options.recompute,
                   .deterministic = options.deterministic,
                   .global_batch = options.micro_batches,
                   .zero_on_node = options.zero_on_node,
                   .zero = options.zero,
                   .bucket_bytes = options.bucket_bytes,
                   .device = options.device},
                  communicator) {
    programs_.initialize(5);
  }

  void write(std::int64_t sample, std::int64_t step) {
    std::vector<std::int32_t> window;
    RandomStream random(9, static_cast<std::uint32_t>(sample));
    for (std::int64_t t = 0; t <= kLength; ++t) {
      window.push_back(static_cast<std::int32_t>(random.below(40)));
    }
    const std::vector<std::int64_t> samples{sample};
    programs_.inputs().write(window, {}, samples, 3, step);
  }

  /// All replays of a step but the closing one; whether that has no batch.
  bool accumulate(std::int64_t step) {
    for (std::int64_t j = 0; j < share_.count(); ++j) {
      write(step * share_.per_step + share_.micro_batch(j), step);
      if (j + 1 < share_.rounds()) {
        programs_.accumulate();
      }
    }
    return share_.count() < share_.rounds();
  }
  StepResult step(std::int64_t number) {
    const bool empty = accumulate(number);
    return programs_.finish_step(1e-2, number, empty);
  }

  /// Weights and optimizer state, whole. All ranks call it.
  std::map<std::string, std::vector<double>> state() {
    std::vector<double> values;  // of all tensors; each element is 0 on all ranks but one
    std::map<std::string, std::pair<std::size_t, std::size_t>> places;
    for (const char* group : {"parameters/", "moment1/", "moment2/"}) {
      for (const ParameterInfo& parameter : programs_.parameters()) {
        const auto elements = static_cast<std::size_t>(parameter.shape.elements());
        places[group + parameter.name] = {values.size(), elements};
        values.resize(values.size() + elements);
      }
    }
    for (const StateSlice& slice : programs_.saved_state()) {
      const std::vector<double> own = values_on_host(slice.values);
      const std::size_t first = places.at(slice.name).first + static_cast<std::size_t>(slice.begin);
      std::copy(own.begin(), own.end(), values.begin() + static_cast<std::ptrdiff_t>(first));
    }
    communicator_.all_reduce_sum({values.data(), {DType::float64, {static_cast<std::int64_t>(values.size())}}});
    std::map<std::string, std::vector<double>> all;
    for (const auto& [name, place] : places) {
      const auto begin = values.begin() + static_cast<std::ptrdiff_t>(place.first);
      all[name] = {begin, begin + static_cast<std::ptrdiff_t>(place.second)};
    }
    return all;
  }

  /// Puts such a state into what this rank keeps.
  void load(const std::map<std::string, std::vector<double>>& state) {
    for (const StateSlice& slice : programs_.kept_state()) {
      const auto& whole = state.at(slice.name);
      dispatch_floating(slice.values.dtype(), "test", [&]<class T>() {
        std::vector<T> values;
        for (std::int64_t i = slice.begin; i < slice.end; ++i) {
          values.push_back(static_cast<T>(static_cast<Accumulator<T>>(whole[static_cast<std::size_t>(i)])));
        }
        copy_from_host(slice.values, {values.data(), slice.values.type});
      });
    }
    programs_.refresh_compute_weights();
  }

  ModelPrograms& programs() { return programs_; }
  const ModelPrograms& programs() const { return programs_; }
  const MicroBatchShare& share() const { return share_; }

 private:
  Communicator& communicator_;
  ModelConfig model_;
  std::unique_ptr<ChunkingStrategy> chunking_;
  MicroBatchShare share_;
  ModelPrograms programs_;
};

}  // namespace attamba::testing_support
