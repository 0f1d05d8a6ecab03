#include "tests/models/tiny_model.h"

#include <algorithm>
#include <cmath>

#include "src/core/error.h"
#include "src/core/random.h"
#include "tests/models/tiny_config.h"

namespace attamba::testing_support {

namespace {

std::vector<TinyConfig> make_configs() {
  std::vector<TinyConfig> all;
  for (const std::string& kind : trainable_kinds()) {
    all.push_back({kind, tiny_config(kind)});
  }
  const auto variant = [&](const std::string& kind, const std::string& name, const auto& change) {
    ModelConfig config = tiny_config(kind);
    change(config);
    all.push_back({kind + "_" + name, config});
  };
  variant("attamba", "kv_proj_grouped", [](ModelConfig& c) {
    c.kv_proj = true;
    c.n_heads = 4;
    c.n_kv_heads = 2;
    c.head_dim = 6;
  });
  variant("attamba", "groups_dt_bias_no_residual_tied", [](ModelConfig& c) {
    c.ssm.groups = 2;
    c.ssm.dt_bias = true;
    c.ssm.residual = false;
    c.tie_embeddings = true;
  });
  variant("attamba", "no_conv_own_chunk", [](ModelConfig& c) {
    c.ssm.conv = 0;
    c.chunking.leading_tokens = 0;
  });
  variant("attamba", "uniform", [](ModelConfig& c) { c.chunking.strategy = "uniform"; });
  variant("attamba", "random", [](ModelConfig& c) { c.chunking.strategy = "random"; });
  variant("attamba", "pseudo", [](ModelConfig& c) { c.chunking.strategy = "none"; });
  variant("attamba", "released", [](ModelConfig& c) { c.semantics = "released"; });
  variant("transformer", "kvc_tied", [](ModelConfig& c) {
    c.attn_dim = 8;
    c.tie_embeddings = true;
  });
  variant("transformer", "sliding", [](ModelConfig& c) { c.sliding_window = 3; });
  return all;
}

std::vector<double> values_of(const Tensor& tensor) {
  return dispatch_floating(tensor.dtype(), "test", [&]<class T>() {
    std::vector<double> values;
    for (const T x : tensor.span<T>()) {
      values.push_back(static_cast<double>(static_cast<Accumulator<T>>(x)));
    }
    return values;
  });
}

}  // namespace

const std::vector<TinyConfig>& tiny_configs() {
  static const std::vector<TinyConfig> kConfigs = make_configs();
  return kConfigs;
}

TinyModel::TinyModel(const ModelConfig& config, const Options& options)
    : config_(config), options_(options), chunking_(make_model_chunking(config, options.batch.length)) {
  model_ = declare_model(tape_, {.config = config_,
                                 .chunking = chunking_.get(),
                                 .batch = options.batch,
                                 .dtype = options.dtype,
                                 .recompute = options.recompute});
  const Value targets = tape_.input(kTargetsLeaf, {DType::int32, {options.batch.rows()}});
  losses_ = ops::linear_cross_entropy_root(tape_, model_.hidden, model_.output_weight, targets,
                                           1.0 / static_cast<double>(options.batch.rows()));
  tape_.mark_output(losses_);
  tape_.backward(losses_);
  plan_ = make_plan(tape_);
  arena_.reserve(plan_.arena_bytes);
  program_ = Program(tape_, plan_, storage_, arena_);
  writer_ = std::make_unique<BatchWriter>(storage_, config_, chunking_.get(), options.batch.sequences, options.batch.length,
                                          options.dtype);
  fill_weights();
  write(random_windows(1));
}

void TinyModel::fill_weights() {
  for (std::size_t p = 0; p < parameters().size(); ++p) {
    const ParameterInfo& parameter = parameters()[p];
    RandomStream random(7, static_cast<std::uint32_t>(p));
    const bool matrix = parameter.initialization == Initialization::normal;
    const double scale = matrix ? 1.0 / std::sqrt(static_cast<double>(parameter.shape.columns())) : 0.3;
    const double offset = parameter.initialization == Initialization::ones ? 1 : 0;
    const Tensor tensor = weight(parameter.name);
    dispatch_floating(tensor.dtype(), "test", [&]<class T>() {
      for (T& x : tensor.span<T>()) {
        x = static_cast<T>(
            static_cast<Accumulator<T>>(static_cast<float>(bfloat16(static_cast<float>(offset + scale * random.normal())))));
      }
    });
  }
}

std::vector<std::int32_t> TinyModel::random_windows(std::uint64_t seed) const {
  RandomStream random(seed);
  std::vector<std::int32_t> windows(static_cast<std::size_t>(options_.batch.sequences * (options_.batch.length + 1)));
  for (std::int32_t& token : windows) {
    token = static_cast<std::int32_t>(random.below(static_cast<std::uint64_t>(config_.vocab_size)));
  }
  return windows;
}

void TinyModel::write(const std::vector<std::int32_t>& windows, const std::vector<std::int32_t>& document_starts) {
  writer_->write(windows, document_starts, {}, 3, 5);
}

void TinyModel::run() {
  for (const ParameterInfo& parameter : parameters()) {
    const Tensor gradient = storage_.find("gradient/" + parameter.name);
    std::fill_n(static_cast<std::byte*>(gradient.data), gradient.bytes(), std::byte{0});
  }
  program_.run({});
}

std::vector<double> TinyModel::losses() const {
  return values_of(program_.tensor(losses_));
}

double TinyModel::mean_loss() const {
  double sum = 0;
  for (const double loss : losses()) {
    sum += loss;
  }
  return sum / static_cast<double>(options_.batch.rows());
}

std::vector<double> TinyModel::gradient(const std::string& parameter) const {
  return values_of(storage_.find("gradient/" + parameter));
}

}  // namespace attamba::testing_support
