// Every model of the registry: its parameters, its gradients as a whole, what it may see, and recomputation.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "src/core/error.h"
#include "src/core/random.h"
#include "tests/models/tiny_model.h"

namespace attamba::testing_support {
namespace {

using Shapes = std::map<std::string, std::vector<std::int64_t>>;

class Models : public testing::TestWithParam<TinyConfig> {
 protected:
  const ModelConfig& config() const { return GetParam().config; }
};

// ---------------------------------------------------------------------------------------------- parameters

void add_ssm(Shapes& shapes, const std::string& prefix, const SsmConfig& s, std::int64_t width) {
  const std::int64_t channels = s.hidden + 2 * s.groups * s.state;
  shapes[prefix + "in_proj.weight"] = {s.hidden + channels + s.heads, width};
  if (s.conv > 0) {
    shapes[prefix + "conv.weight"] = {channels, s.conv};
  }
  shapes[prefix + "A_log"] = shapes[prefix + "D"] = {s.heads};
  if (s.dt_bias) {
    shapes[prefix + "dt_bias"] = {s.heads};
  }
  shapes[prefix + "norm.weight"] = {s.hidden};
  shapes[prefix + "out_proj.weight"] = {width, s.hidden};
}

/// The table of docs/model.md.
Shapes specified_parameters(const ModelConfig& c) {
  Shapes shapes{{"tok_embeddings.weight", {c.vocab_size, c.dim}}, {"norm.weight", {c.dim}}};
  if (!c.tie_embeddings) {
    shapes["output.weight"] = {c.vocab_size, c.dim};
  }
  const std::int64_t d = c.dim, e = c.hidden;
  for (std::int64_t l = 0; l < c.n_layers; ++l) {
    const std::string prefix = concat("layers.", l, ".");
    const auto at = [&](const std::string& name) -> std::vector<std::int64_t>& { return shapes[prefix + name]; };
    if (c.kind == "attamba" || c.kind == "transformer") {
      const bool attamba = c.kind == "attamba";
      const std::int64_t width = attamba           ? c.n_heads * (c.head_dim == 0 ? d / c.n_heads : c.head_dim)
                                 : c.attn_dim == 0 ? d
                                                   : c.attn_dim;
      const std::int64_t kv_width = attamba && c.n_kv_heads > 0 ? width / c.n_heads * c.n_kv_heads : width;
      at("attention_norm.weight") = {d};
      at("attention.wq.weight") = {width, d};
      at("attention.wo.weight") = {d, width};
      if (!attamba || c.kv_proj) {
        at("attention.wk.weight") = at("attention.wv.weight") = {kv_width, d};
      }
      if (attamba) {
        add_ssm(shapes, prefix + "attention.k_ssm.", c.ssm, c.kv_proj ? kv_width : d);
        add_ssm(shapes, prefix + "attention.v_ssm.", c.ssm, c.kv_proj ? kv_width : d);
      }
    } else if (c.kind == "mamba") {
      at("ssm_norm.weight") = {d};
      add_ssm(shapes, prefix + "ssm.", c.ssm, d);
    } else if (c.kind == "mingru") {
      at("gru_norm.weight") = {d};
      at("gru.w.weight") = at("gru.wz.weight") = at("gru.wh.weight") = {e, d};
      at("gru.wo.weight") = {d, e};
      at("gru.conv.weight") = {e, c.conv};
    } else if (c.kind == "hawk") {
      at("rglru_norm.weight") = {d};
      at("rglru.wx.weight") = at("rglru.wy.weight") = {e, d};
      at("rglru.wo.weight") = {d, e};
      at("rglru.input_gate.weight") = at("rglru.a_gate.weight") = {e, e};
      at("rglru.conv.weight") = {e, c.conv};
      at("rglru.a") = {e / c.n_heads};
    }
    if (c.has_feed_forward()) {
      at("ffn_norm.weight") = {d};
      at("feed_forward.w1.weight") = at("feed_forward.w3.weight") = {c.ffn_dim, d};
      at("feed_forward.w2.weight") = {d, c.ffn_dim};
    }
  }
  return shapes;
}

TEST_P(Models, HaveTheParametersOfTheSpecification) {
  const TinyModel model(config(), {});
  Shapes declared;
  std::int64_t count = 0;
  for (const ParameterInfo& parameter : model.parameters()) {
    EXPECT_TRUE(declared.emplace(parameter.name, std::vector(parameter.shape.begin(), parameter.shape.end())).second)
        << parameter.name << " is listed twice";
    count += parameter.shape.elements();
  }
  EXPECT_EQ(declared, specified_parameters(config()));
  EXPECT_EQ(count, parameter_count(config()));
  ASSERT_EQ(model.tape().parameters().size(), model.parameters().size());
  for (std::size_t i = 0; i < model.parameters().size(); ++i) {
    EXPECT_EQ(model.tape().info(model.tape().parameters()[i]).name, model.parameters()[i].name);
  }
}

// ---------------------------------------------------------------------------------------------- gradients

TEST_P(Models, GradientsEqualFiniteDifferencesAlongADirectionPerParameter) {
  // f(e) = loss at w + e u for a random unit vector u per parameter: f'(0) = u . gradient. With h = 2^-10 the fourth-order
  // difference is exact to about 1e-13 (fifth derivatives around 1), and rounding adds eps * loss / h = 1e-12.
  constexpr double kStep = 0x1p-10;
  TinyModel model(config(), {});
  model.run();
  std::map<std::string, std::vector<double>> gradients;
  for (const ParameterInfo& parameter : model.parameters()) {
    gradients[parameter.name] = model.gradient(parameter.name);
  }
  for (const auto& [name, gradient] : gradients) {
    RandomStream random(11);
    std::vector<double> direction(gradient.size());
    double norm = 0, largest = 0;
    for (double& u : direction) {
      u = random.normal();
      norm += u * u;
    }
    double expected = 0;
    for (std::size_t i = 0; i < direction.size(); ++i) {
      direction[i] /= std::sqrt(norm);
      expected += direction[i] * gradient[i];
      largest += gradient[i] * gradient[i];
    }
    EXPECT_GT(largest, 0) << "no gradient reaches " << name;
    const auto weight = model.weight(name).span<double>();
    const std::vector<double> start(weight.begin(), weight.end());
    const auto at = [&](double e) {
      for (std::size_t i = 0; i < start.size(); ++i) {
        weight[i] = start[i] + e * direction[i];
      }
      model.run();
      return model.mean_loss();
    };
    const double difference = (8 * (at(kStep) - at(-kStep)) - (at(2 * kStep) - at(-2 * kStep))) / (12 * kStep);
    std::copy(start.begin(), start.end(), weight.begin());
    EXPECT_NEAR(expected, difference, 1e-10 + 1e-7 * std::sqrt(largest)) << name;
  }
}

TEST_P(Models, RecomputationGivesTheSameBitsFromLessMemory) {
  ModelConfig deeper = config();
  deeper.n_layers = 5;
  const BatchShape batch{.sequences = 8, .length = 64};  // enough for activations to outweigh scratch
  for (const DType dtype : {DType::float32, DType::bfloat16}) {
    TinyModel kept(deeper, {.dtype = dtype, .batch = batch});
    TinyModel recomputed(deeper, {.dtype = dtype, .recompute = true, .batch = batch});
    kept.run();
    recomputed.run();
    EXPECT_EQ(kept.losses(), recomputed.losses());
    for (const ParameterInfo& parameter : kept.parameters()) {
      EXPECT_EQ(kept.gradient(parameter.name), recomputed.gradient(parameter.name)) << parameter.name;
    }
    const double share = config().has_feed_forward() ? 0.8 : 0.9;  // less in a block, less to forget
    EXPECT_LT(static_cast<double>(recomputed.plan().arena_bytes), share * static_cast<double>(kept.plan().arena_bytes));
  }
}

/// ||a - b|| / ||b|| over the gradients of all parameters together.
double gradients_apart(const TinyModel& a, const TinyModel& b) {
  double difference = 0, norm = 0;
  for (const ParameterInfo& parameter : b.parameters()) {
    const std::vector<double> computed = a.gradient(parameter.name), expected = b.gradient(parameter.name);
    for (std::size_t i = 0; i < expected.size(); ++i) {
      difference += (computed[i] - expected[i]) * (computed[i] - expected[i]);
      norm += expected[i] * expected[i];
    }
  }
  return std::sqrt(difference / norm);
}

/// How far the gradients of a float64 model move, root mean square of some draws, when each weight moves by up to one rounding
/// of `unit`.
double one_rounding_moves_gradients(const ModelConfig& config, const TinyModel& reference, double unit) {
  constexpr int kDraws = 8;
  RandomStream random(5);
  double squares = 0;
  for (int draw = 0; draw < kDraws; ++draw) {
    TinyModel moved(config, {});
    for (const ParameterInfo& parameter : moved.parameters()) {
      for (double& w : moved.weight(parameter.name).span<double>()) {
        w *= 1 + unit * (2 * random.uniform() - 1);
      }
    }
    moved.run();
    squares += std::pow(gradients_apart(moved, reference), 2);
  }
  return std::sqrt(squares / kDraws);
}

TEST_P(Models, ShorterTypesStayNearFloat64) {
  TinyModel reference(config(), {});
  reference.run();
  // Weights are multiples of a bfloat16 unit: all types start from the same model. Some models amplify roundings ten times more
  // than others, so float32 is held to what one rounding of each weight does to the float64 gradients. Through two layers and
  // back some tens of roundings of that size, independent of each other, add up: their square root, 6, times as much.
  // bfloat16 roundings are too large for that linear estimate: tens of them, amplified by norms. Single ops are held to a few
  // units in tests/ops.
  const double tens_of_float32_roundings = 6 * one_rounding_moves_gradients(config(), reference, 0x1p-24);
  const std::pair<DType, double> types[] = {{DType::float32, tens_of_float32_roundings}, {DType::bfloat16, 48 * 0x1p-9}};
  for (const auto& [dtype, tolerance] : types) {
    TinyModel model(config(), {.dtype = dtype});
    model.run();
    EXPECT_NEAR(model.mean_loss(), reference.mean_loss(), tolerance * reference.mean_loss()) << name_of(dtype);
    EXPECT_LE(gradients_apart(model, reference), tolerance) << name_of(dtype) << ", all gradients together";
  }
}

// ---------------------------------------------------------------------------------------------- what a token may see

TEST_P(Models, NeverLookAhead) {
  TinyModel model(config(), {.dtype = DType::float32});
  constexpr std::int64_t kLength = 11;
  std::vector<std::int32_t> windows = model.random_windows(21);
  model.run();
  model.write(windows);
  model.run();
  const std::vector<double> before = model.losses();
  for (const std::int64_t changed : {std::int64_t{5}, kLength - 1}) {
    std::vector<std::int32_t> other = windows;
    auto& token = other[static_cast<std::size_t>(changed)];
    token = (token + 1) % static_cast<std::int32_t>(config().vocab_size);
    model.write(other);
    model.run();
    const std::vector<double> after = model.losses();
    for (std::int64_t t = 0; t < kLength; ++t) {
      const auto at = static_cast<std::size_t>(t);
      if (t + 1 < changed) {
        EXPECT_EQ(after[at], before[at]) << "position " << t << " depends on the token at " << changed;
      } else if (t <= changed) {  // its target, or itself
        EXPECT_NE(after[at], before[at]) << t;
      }
    }
    for (std::size_t t = kLength; t < after.size() && !config().released(); ++t) {
      EXPECT_EQ(after[t], before[t]) << "the second sequence depends on the first";
    }
  }
}

TEST_P(Models, MaskedDocumentsAreIndependent) {
  if (config().released()) {
    GTEST_SKIP() << "the released code knows no documents";
  }
  ModelConfig masked = config();
  masked.document_mask = true;
  TinyModel model(masked, {.dtype = DType::float32});
  const std::vector<std::int32_t> starts{0, 0, 0, 0, 4, 4, 4, 4, 4, 9, 9, 0, 0, 0, 0, 0, 0, 6, 6, 6, 6, 6};
  const std::vector<std::int32_t> windows = model.random_windows(22);
  model.write(windows, starts);
  model.run();
  const std::vector<double> before = model.losses();
  std::vector<std::int32_t> other = windows;
  for (const std::size_t changed : {0u, 1u, 2u, 3u}) {  // the first document of the first sequence
    other[changed] = (other[changed] + 1) % static_cast<std::int32_t>(config().vocab_size);
  }
  model.write(other, starts);
  model.run();
  const std::vector<double> after = model.losses();
  EXPECT_NE(after[0], before[0]);
  for (std::size_t t = 4; t < after.size(); ++t) {
    EXPECT_EQ(after[t], before[t]) << "row " << t;
  }
  if (config().kind == "attamba" && config().chunking.strategy == "random") {
    return;  // draws differ with a document's place in its window
  }
  // A document reads the same wherever it stands: the second one (positions 4 to 8) moved to a window's start.
  std::vector<std::int32_t> moved = windows;
  std::copy(windows.begin() + 4, windows.begin() + 10, moved.begin());
  model.write(moved, {0, 0, 0, 0, 0, 5, 5, 5, 5, 5, 5, 0, 0, 0, 0, 0, 0, 6, 6, 6, 6, 6});
  model.run();
  for (std::size_t t = 0; t < 5; ++t) {
    EXPECT_NEAR(model.losses()[t], before[4 + t], 1e-5) << t;
  }
}

TEST_P(Models, ABatchWithoutDocumentsForgetsTheLastOnes) {
  if (config().released()) {
    GTEST_SKIP() << "the released code knows no documents";
  }
  ModelConfig masked = config();
  masked.document_mask = true;
  TinyModel model(masked, {.dtype = DType::float32});
  const std::vector<std::int32_t> windows = model.random_windows(23);
  model.write(windows);
  model.run();
  const std::vector<double> whole = model.losses();
  std::vector<std::int32_t> starts(22, 0);
  std::fill(starts.begin() + 3, starts.begin() + 11, 3);
  model.write(windows, starts);
  model.run();
  EXPECT_NE(model.losses(), whole);
  model.write(windows);
  model.run();
  EXPECT_EQ(model.losses(), whole);
}

INSTANTIATE_TEST_SUITE_P(Registry, Models, testing::ValuesIn(tiny_configs()), [](const auto& test) { return test.param.name; });

TEST(ModelRegistry, KnowsTheModelsOfThePaper) {
  std::vector<std::string> names;
  for (const TinyConfig& c : tiny_configs()) {
    names.push_back(c.name);
  }
  EXPECT_THAT(names, testing::IsSupersetOf({"attamba", "transformer"}));
}

TEST(ModelRegistry, RefusesUnknownKindsWithTheKnownOnes) {
  ModelConfig config = tiny_configs().front().config;
  config.kind = "perceiver";
  Tape tape;
  try {
    declare_model(tape, {.config = config, .batch = {1, 8}});
    FAIL() << "accepted";
  } catch (const UsageError& error) {
    EXPECT_THAT(error.what(), testing::AllOf(testing::HasSubstr("perceiver"), testing::HasSubstr("attamba, transformer")));
  }
}

TEST(ModelRegistry, ExplicitChunksComeFromAFile) {
  ModelConfig config = tiny_configs().front().config;
  config.kind = "attamba";
  config.chunking.strategy = "explicit";
  config.chunking.ends_file = "/no/such/file";
  EXPECT_THROW(make_model_chunking(config, 8), UsageError);
}

}  // namespace
}  // namespace attamba::testing_support
