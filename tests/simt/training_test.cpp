// Whole programs through the GPU's path on the emulator: golden files, and training steps against the CPU's.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <string>

#include "comm/single_process.h"
#include "src/core/random.h"
#include "src/train/golden.h"
#include "src/train/programs.h"
#include "tests/simt/emulated_device.h"
#include "tests/simt/emulator.h"

namespace attamba {
namespace {

namespace fs = std::filesystem;

std::vector<std::string> golden_files() {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(fs::path(ATTAMBA_SOURCE_DIR) / "tests/golden")) {
    if (entry.path().extension() == ".h5") {
      names.push_back(entry.path().stem());
    }
  }
  std::sort(names.begin(), names.end());
  return names;
}

class GoldenOnTheEmulator : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { simt::connect(); }
  static void expect_all_passed(DType dtype) {
    const GoldenFile golden = read_golden(fs::path(ATTAMBA_SOURCE_DIR) / "tests/golden" / (GetParam() + ".h5"));
    for (const GoldenCheck& check : verify_golden(golden, dtype, Device::cuda)) {
      EXPECT_TRUE(check.passed()) << check.quantity << ": error " << check.error << ", tolerance " << check.tolerance;
    }
  }
};

TEST_P(GoldenOnTheEmulator, Float32IsWithinTheOraclesTolerances) {
  expect_all_passed(DType::float32);
}

TEST_P(GoldenOnTheEmulator, Bfloat16IsWithinTheOraclesTolerances) {
  expect_all_passed(DType::bfloat16);
}

INSTANTIATE_TEST_SUITE_P(Files, GoldenOnTheEmulator, testing::ValuesIn(golden_files()),
                         [](const auto& test) { return test.param; });

/// A model of this kind; "fused..." are Attamba models whose scan is one kernel each way, as in the paper's model.
ModelConfig tiny(const std::string& kind) {
  const bool fused = kind.starts_with("fused");
  ModelConfig c;
  c.kind = fused ? "attamba" : kind;
  c.vocab_size = 50;
  c.dim = 64;
  c.n_layers = 2;
  c.n_heads = 2;
  c.ffn_dim = 96;
  c.ssm = {.hidden = 32, .state = 16, .heads = 2};
  if (fused) {
    c.ssm = {.hidden = 256, .state = kind == "fused_large_state" ? 128 : 32, .heads = 8};
  }
  c.chunking = {.strategy = kind == "fused_long" ? "none" : "random", .size = 4, .leading_tokens = 2};
  if (kind == "fused_released") {
    c.semantics = "released";
    c.chunking.strategy = "cyclic";
  }
  c.hidden = 48;
  return c;
}

/// Tokens of a sequence: for the fused scan's tiles more than one.
std::int64_t length_of(const std::string& kind) {
  return kind.starts_with("fused") ? 60 : 24;
}

/// One rank's programs on a device, with the same weights everywhere.
struct Rank {
  Rank(const std::string& kind, DType dtype, Device device, bool deterministic = false, bool recompute = false)
      : model(tiny(kind)),
        length(length_of(kind)),
        chunking(make_model_chunking(model, length)),
        programs({.model = model,
                  .chunking = chunking.get(),
                  .micro_batch = {2, length},
                  .dtype = dtype,
                  .recompute = recompute,
                  .deterministic = deterministic,
                  .global_batch = 4,
                  .device = device},
                 communicator) {
    programs.initialize(5);
  }

  /// One of a step's two micro-batches, of random tokens or of tokens that mostly follow from the one before.
  void write(std::int64_t number, std::int64_t micro, bool learnable) {
    std::vector<std::int32_t> windows;
    for (std::int64_t s = 0; s < 2; ++s) {
      RandomStream random(9, static_cast<std::uint32_t>(4 * number + 2 * micro + s));
      for (std::int64_t t = 0; t <= length; ++t) {
        const bool follows = learnable && t > 0 && random.below(10) != 0;
        windows.push_back(static_cast<std::int32_t>(follows ? (7 * windows.back() + 3) % 50 : random.below(50)));
      }
    }
    const std::vector<std::int64_t> samples{4 * number + 2 * micro, 4 * number + 2 * micro + 1};
    programs.inputs().write(windows, {}, samples, 3, number);
  }

  StepResult step(std::int64_t number, double rate = 1e-2, bool learnable = false) {
    write(number, 0, learnable);
    programs.accumulate();
    write(number, 1, learnable);
    return programs.finish_step(rate, number, false);
  }

  std::vector<float> weights() {
    std::vector<float> all;
    for (const ParameterInfo& parameter : programs.parameters()) {
      const HostCopy copy(programs.master(parameter.name));
      const auto values = copy.tensor().span<float>();
      all.insert(all.end(), values.begin(), values.end());
    }
    return all;
  }

  ModelConfig model;
  std::int64_t length;
  SingleProcess communicator;
  std::unique_ptr<ChunkingStrategy> chunking;
  ModelPrograms programs;
};

class TrainingOnTheEmulator : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { simt::connect(); }
};

// Sums in another order move a loss by a few units of float32's last place, and each step passes that on; bfloat16 rounds
// hidden states to 2^-9, which moves a token's loss by about that much times its logits' size.
TEST_P(TrainingOnTheEmulator, LossesAndNormsAreTheCpus) {
  for (const auto& [dtype, tolerance] : {std::pair{DType::float32, 2e-5}, std::pair{DType::bfloat16, 2e-2}}) {
    Rank cpu(GetParam(), dtype, Device::cpu), gpu(GetParam(), dtype, Device::cuda);
    for (std::int64_t number = 0; number < 4; ++number) {  // op by op, recorded, replayed twice
      constexpr double kRate = 2e-3;                       // larger steps amplify bfloat16's roundings, on either device alike
      const StepResult expected = cpu.step(number, kRate), found = gpu.step(number, kRate);
      EXPECT_NEAR(found.loss, expected.loss, tolerance * expected.loss) << name_of(dtype) << ", step " << number;
      EXPECT_NEAR(found.gradient_norm, expected.gradient_norm, 3 * tolerance * expected.gradient_norm)
          << name_of(dtype) << ", step " << number;
      EXPECT_FALSE(found.skipped);
    }
  }
}

/// How far gradients are from float32's on the CPU, over all layers' parameters of one kind.
struct GradientErrors {
  double cpu = 0, gpu = 0;  ///< squares
  std::int64_t elements = 0;
};

// Both round to bfloat16 at the same places, in sums of another order: their errors are two draws of one size, whose ratio is
// near 1 where there are many elements. Of the few numbers that belong to heads, a factor of four is rare; a mistake in a
// kernel is off by far more.
TEST_P(TrainingOnTheEmulator, Bfloat16GradientsAreAsNearToFloat32AsTheCpus) {
  Rank exact(GetParam(), DType::float32, Device::cpu), cpu(GetParam(), DType::bfloat16, Device::cpu),
      gpu(GetParam(), DType::bfloat16, Device::cuda);
  for (Rank* const rank : {&exact, &cpu, &gpu}) {
    rank->write(0, 0, false);
    rank->programs.accumulate();
  }
  std::map<std::string, GradientErrors> kinds;
  for (const ParameterInfo& parameter : exact.programs.parameters()) {
    const HostCopy expected(exact.programs.gradient(parameter.name)), on_cpu(cpu.programs.gradient(parameter.name)),
        on_gpu(gpu.programs.gradient(parameter.name));
    const auto a = expected.tensor().span<float>(), b = on_cpu.tensor().span<float>(), c = on_gpu.tensor().span<float>();
    std::string name = parameter.name;
    name.resize(name.ends_with(".weight") ? name.size() - 7 : name.size());
    GradientErrors& kind = kinds[name.substr(name.find_last_of('.') + 1)];
    for (std::size_t i = 0; i < a.size(); ++i) {
      kind.cpu += (b[i] - a[i]) * (b[i] - a[i]);
      kind.gpu += (c[i] - a[i]) * (c[i] - a[i]);
      ++kind.elements;
    }
  }
  for (const auto& [name, kind] : kinds) {
    const double ratio = std::sqrt(kind.gpu / kind.cpu), most = kind.elements >= 64 ? 1.5 : 4;
    EXPECT_LT(ratio, most) << name << ", " << kind.elements << " elements";
    EXPECT_GT(ratio, 1 / most) << name << ", " << kind.elements << " elements";
  }
}

TEST_P(TrainingOnTheEmulator, TheOrderOfBlocksAndWarpsDoesNotMatter) {
  std::vector<float> first;
  for (const std::uint64_t seed : {1, 2}) {
    simt::options().seed = seed;
    Rank rank(GetParam(), DType::bfloat16, Device::cuda);
    rank.step(0);
    rank.step(1);
    if (first.empty()) {
      first = rank.weights();
    } else {
      EXPECT_EQ(first, rank.weights());
    }
  }
}

TEST_P(TrainingOnTheEmulator, RecomputingGivesTheSameBits) {
  Rank kept(GetParam(), DType::bfloat16, Device::cuda), recomputed(GetParam(), DType::bfloat16, Device::cuda, false, true);
  for (std::int64_t number = 0; number < 2; ++number) {
    EXPECT_EQ(kept.step(number).loss, recomputed.step(number).loss);
  }
  EXPECT_EQ(kept.weights(), recomputed.weights());
}

/// The device may still read its inputs when the host makes the next ones: the emulator's stream does everything as late as it
/// may.
TEST(InputsOnTheEmulator, AreWrittenWhileTheDeviceComputes) {
  simt::connect();
  Rank one_by_one("attamba", DType::float32, Device::cuda), ahead("attamba", DType::float32, Device::cuda);
  ahead.write(0, 0, false);
  for (std::int64_t number = 0; number < 3; ++number) {
    ahead.programs.accumulate();
    ahead.write(number, 1, false);
    bool called = false;
    const StepResult found = ahead.programs.finish_step(1e-2, number, false, {}, 0, [&] {
      called = true;
      ahead.write(number + 1, 0, false);
    });
    EXPECT_TRUE(called);
    EXPECT_EQ(found.loss, one_by_one.step(number).loss);
  }
  EXPECT_EQ(ahead.weights(), one_by_one.weights());
}

/// Where gradients are summed as integers; the fused scan takes no part in that.
class FixedPointOnTheEmulator : public TrainingOnTheEmulator {};

TEST_P(FixedPointOnTheEmulator, GradientsGiveTheLossesOfOrdinaryOnes) {
  Rank plain(GetParam(), DType::float32, Device::cuda), fixed(GetParam(), DType::float32, Device::cuda, true);
  for (std::int64_t number = 0; number < 3; ++number) {
    EXPECT_NEAR(plain.step(number).loss, fixed.step(number).loss, 1e-5);
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, TrainingOnTheEmulator,
                         testing::Values("attamba", "fused", "fused_large_state", "fused_long", "fused_released", "transformer",
                                         "mamba", "mingru", "hawk"),
                         [](const auto& test) { return test.param; });

INSTANTIATE_TEST_SUITE_P(Kinds, FixedPointOnTheEmulator, testing::Values("attamba", "transformer", "mamba", "mingru", "hawk"),
                         [](const auto& test) { return test.param; });

/// ATTAMBA_CURVE_STEPS=200 takes minutes; a few dozen steps see the loss fall, too.
TEST(CurvesOnTheEmulator, OfFloat32StayWithTheCpus) {
  simt::connect();
  const char* const asked = std::getenv("ATTAMBA_CURVE_STEPS");
  const std::int64_t steps = asked == nullptr ? 30 : std::stoll(asked);
  Rank cpu("attamba", DType::float32, Device::cpu), gpu("attamba", DType::float32, Device::cuda);
  double first = 0, last = 0, worst = 0;
  for (std::int64_t number = 0; number < steps; ++number) {
    const double expected = cpu.step(number, 2e-3, true).loss, found = gpu.step(number, 2e-3, true).loss;
    worst = std::max(worst, std::abs(found - expected) / expected);
    first = number == 0 ? expected : first;
    last = expected;
  }
  RecordProperty("worst_relative_difference", std::to_string(worst));
  RecordProperty("last_loss", std::to_string(last));
  EXPECT_LT(last, 0.97 * first);
  EXPECT_LT(worst, 1e-3);
}

TEST(ProgramsOnTheEmulator, RefuseFloat64) {
  simt::connect();
  EXPECT_THROW(Rank("attamba", DType::float64, Device::cuda), UsageError);
}

}  // namespace
}  // namespace attamba
