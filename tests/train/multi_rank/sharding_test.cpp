// Stages 0 to 3 on all ranks of this job: the weights of one process, and the memory that each stage promises.
#include "src/train/sharding.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>

#include "tests/comm/multi_rank/world.h"
#include "tests/comm/passing_on.h"
#include "tests/train/multi_rank/step_support.h"

namespace attamba {
namespace {

using testing_support::StepOptions;
using testing_support::SteppingRank;
using State = std::map<std::string, std::vector<double>>;

struct Outcome {
  std::vector<double> losses, norms;
  State state;
};

Outcome train(const StepOptions& options, Communicator& communicator, std::int64_t steps = 3) {
  SteppingRank rank(options, communicator);
  Outcome outcome;
  for (std::int64_t step = 0; step < steps; ++step) {
    const StepResult result = rank.step(step);
    EXPECT_FALSE(result.skipped);
    outcome.losses.push_back(result.loss);
    outcome.norms.push_back(result.gradient_norm);
  }
  outcome.state = rank.state();
  return outcome;
}

Outcome alone(StepOptions options, std::int64_t steps = 3) {
  SingleProcess communicator;
  options.zero = 0;
  return train(options, communicator, steps);
}

class Stages : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(All, Stages, testing::Values(0, 1, 2, 3), testing::PrintToStringParamName());

TEST_P(Stages, DeterministicStepsAreThoseOfOneProcessBitForBit) {
  // Neither 1 nor 5 micro-batches are a multiple of 2, 3 or 4 ranks.
  for (StepOptions options :
       {StepOptions{.dtype = DType::float32, .recompute = true}, StepOptions{.dtype = DType::bfloat16, .micro_batches = 1},
        StepOptions{.dtype = DType::bfloat16}, StepOptions{.dtype = DType::float64}}) {
    const Outcome expected = alone(options);
    options.zero = GetParam();
    const Outcome found = train(options, world());
    EXPECT_EQ(found.losses, expected.losses) << name_of(options.dtype) << ", " << options.micro_batches;
    EXPECT_EQ(found.norms, expected.norms) << name_of(options.dtype) << ", " << options.micro_batches;
    EXPECT_TRUE(found.state == expected.state) << name_of(options.dtype) << ", " << options.micro_batches;
  }
}

TEST_P(Stages, OtherStepsAreTheSameButForRounding) {
  StepOptions options{.dtype = DType::float64, .deterministic = false};
  const Outcome expected = alone(options);
  options.zero = GetParam();
  const Outcome found = train(options, world());
  for (std::size_t step = 0; step < expected.losses.size(); ++step) {
    EXPECT_NEAR(found.losses[step], expected.losses[step], 1e-9);  // losses are counted in steps of 2^-32
    EXPECT_NEAR(found.norms[step], expected.norms[step], 1e-11 * expected.norms[step]);
  }
  for (const auto& [name, values] : expected.state) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      ASSERT_NEAR(found.state.at(name)[i], values[i], 1e-9) << name << ' ' << i;
    }
  }
  options.dtype = DType::float32;
  const Outcome one = alone(options), many = train(options, world());
  for (std::size_t step = 0; step < one.losses.size(); ++step) {
    EXPECT_NEAR(many.losses[step], one.losses[step], 1e-6 * one.losses[step]) << step;
  }
}

TEST_P(Stages, AStepOfLargeBucketsIsTheSameToo) {
  StepOptions options{.dtype = DType::bfloat16, .micro_batches = 3, .bucket_bytes = std::size_t{4} << 20};
  const Outcome expected = alone(options);
  options.zero = GetParam();
  EXPECT_TRUE(train(options, world()).state == expected.state);
}

TEST_P(Stages, EvaluationIsThatOfOneProcess) {
  StepOptions options{.dtype = DType::bfloat16};
  SingleProcess communicator;
  SteppingRank reference(options, communicator);
  options.zero = GetParam();
  SteppingRank rank(options, world());
  for (std::int64_t step = 0; step < 2; ++step) {
    reference.step(step);
    reference.accumulate(step + 1);  // evaluation in between leaves gradients alone
    rank.step(step);
    rank.accumulate(step + 1);
    reference.write(77, 0);
    rank.write(77, 0);
    EXPECT_EQ(rank.programs().evaluate(), reference.programs().evaluate());
    reference.programs().discard_gradients();
    rank.programs().discard_gradients();
  }
  EXPECT_TRUE(rank.state() == reference.state()) << "discarded gradients leave no trace";
  EXPECT_EQ(rank.step(2).loss, reference.step(2).loss);
  EXPECT_TRUE(rank.state() == reference.state());
}

TEST_P(Stages, ANormThatIsNotFiniteSkipsTheUpdateEverywhere) {
  for (const bool deterministic : {false, true}) {
    StepOptions options{.deterministic = deterministic, .zero = GetParam()};
    SteppingRank rank(options, world());
    rank.step(0);
    const State before = rank.state();
    const bool empty = rank.accumulate(1);
    if (world().rank() == world().size() - 1) {
      const auto& tensors = rank.programs().storage().tensors();
      if (deterministic) {
        tensors.at("step.poisoned").as<std::int64_t>()[0] = 1;
      } else {
        tensors.lower_bound("gradient/")->second.as<float>()[0] = std::numeric_limits<float>::quiet_NaN();
      }
    }
    const StepResult result = rank.programs().finish_step(1e-2, 1, empty);
    EXPECT_TRUE(result.skipped);
    EXPECT_TRUE(rank.state() == before);
    EXPECT_FALSE(rank.step(1).skipped) << "the next step starts from clean gradients";
    EXPECT_FALSE(rank.state() == before);
  }
}

TEST_P(Stages, StateGoesFromAnyStageToAnyOther) {
  StepOptions options{.dtype = DType::bfloat16};
  const Outcome expected = alone(options, 4);
  options.zero = GetParam();
  SteppingRank first(options, world());
  first.step(0);
  first.step(1);
  const State saved = first.state();
  options.zero = 3 - GetParam();
  SteppingRank second(options, world());
  second.step(0);
  second.load(saved);
  second.step(2);
  EXPECT_EQ(second.step(3).loss, expected.losses[3]);
  EXPECT_TRUE(second.state() == expected.state);
}

TEST_P(Stages, RanksSaveEveryElementOnce) {
  SteppingRank rank({.zero = GetParam()}, world());
  const SteppingRank whole({}, world());
  std::map<std::string, std::size_t> places;  // in `count`
  std::vector<std::int64_t> count;
  for (const StateSlice& slice : whole.programs().kept_state()) {
    places[slice.name] = count.size();
    count.resize(count.size() + static_cast<std::size_t>(slice.whole.shape.elements()));
  }
  for (const StateSlice& slice : rank.programs().saved_state()) {
    EXPECT_EQ(slice.values.elements(), slice.end - slice.begin);
    for (std::int64_t i = slice.begin; i < slice.end; ++i) {
      ++count.at(places.at(slice.name) + static_cast<std::size_t>(i));
    }
  }
  world().all_reduce_sum({count.data(), {DType::int64, {static_cast<std::int64_t>(count.size())}}});
  EXPECT_EQ(std::count(count.begin(), count.end(), 1), static_cast<std::int64_t>(count.size()));
}

// ---------------------------------------------------------------------------------------------- memory

std::size_t allocated(ModelPrograms& programs, std::initializer_list<std::string_view> prefixes) {
  std::size_t bytes = 0;
  for (const auto& [name, tensor] : programs.storage().tensors()) {
    if (std::any_of(prefixes.begin(), prefixes.end(), [&](std::string_view prefix) { return name.starts_with(prefix); })) {
      bytes += align_up(tensor.bytes());
    }
  }
  return bytes;
}

TEST_P(Stages, MemoryIsWhatTheLayoutPromises) {
  const int stage = world().size() == 1 ? 0 : GetParam();
  for (const DType dtype : {DType::float32, DType::bfloat16}) {
    for (const bool deterministic : {false, true}) {
      SteppingRank rank({.dtype = dtype, .deterministic = deterministic, .zero = GetParam()}, world());
      ModelPrograms& programs = rank.programs();
      EXPECT_EQ(programs.zero(), stage);
      const MemoryReport& memory = programs.memory();
      EXPECT_EQ(memory.gradients, allocated(programs, {"gradient/", "fixed_point/"}));
      EXPECT_EQ(memory.state, allocated(programs, {"moment", "master/", "step."}));
      if (stage == 0) {
        continue;
      }
      EXPECT_EQ(memory.parameters, allocated(programs, {"weights/"}));
      std::vector<DType> dtypes;
      std::int64_t total = 0, matrices = 0;
      for (const ParameterInfo& p : programs.parameters()) {
        const bool matrix = p.shape.rank() == 2 && !p.name.ends_with("conv.weight");
        dtypes.push_back(matrix ? dtype : DType::float32);
        total += p.shape.elements();
        matrices += matrix ? p.shape.elements() : 0;
      }
      const ShardLayout layout(programs.parameters(), dtypes,
                               {.ranks = world().size(),
                                .bucket_bytes = 60'000,
                                .width = deterministic ? std::size_t{8} : 4,
                                .by_block = stage == 3});
      std::size_t weights = 0, sums = 0, gradients = 0;
      for (const ShardLayout::Bucket& bucket : layout.buckets()) {
        const auto whole = static_cast<std::size_t>(bucket.total), part = static_cast<std::size_t>(bucket.part);
        weights += (stage == 3 ? part : whole) * size_of(bucket.dtype);
        gradients += stage == 1 ? whole * 4 : deterministic ? 0 : part * 4;
        sums += deterministic ? (stage == 1 ? whole : part) * 8 : 0;
      }
      EXPECT_EQ(memory.parameters, weights);
      EXPECT_EQ(memory.gradients, gradients + sums);
      std::size_t state = allocated(programs, {"step."});
      for (const ShardLayout::Slice& slice : layout.slices(world().rank())) {
        const bool copy = layout.buckets()[slice.bucket].dtype != DType::float32;
        state += align_up(static_cast<std::size_t>(slice.elements()) * 4) * (copy ? 3 : 2);
      }
      EXPECT_EQ(memory.state, state);
      // A rank's share, and what alignment adds.
      const std::size_t slack = layout.buckets().size() * 2 * ShardLayout::kAlignment;
      const std::size_t share = static_cast<std::size_t>(total / world().size()) + slack;
      const std::size_t copies = dtype == DType::bfloat16 ? static_cast<std::size_t>(matrices / world().size()) + slack : 0;
      EXPECT_LE(memory.state, share * 8 + copies * 4 + 64 * 3 * programs.parameters().size() + 1024);
      if (stage >= 2) {
        EXPECT_LE(memory.gradients, share * (deterministic ? 8 : 4) + slack * 8);
      }
      if (stage == 3) {
        EXPECT_LE(memory.parameters, share * 4 + slack * 4);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------- traffic

/// Passes everything on, and adds up what a rank has to send at least: all but its own part, twice where all want the sum.
class Counting final : public PassingOn {
 public:
  Counting() : PassingOn(world()) {}
  std::unique_ptr<Request> start_all_reduce_sum(const Tensor& data) override {
    sent += 2 * others(data);
    return PassingOn::start_all_reduce_sum(data);
  }
  std::unique_ptr<Request> start_reduce_scatter_sum(const Tensor& whole, const Tensor& part) override {
    sent += others(whole);
    return PassingOn::start_reduce_scatter_sum(whole, part);
  }
  std::unique_ptr<Request> start_all_gather(const Tensor& whole, const Tensor& part) override {
    sent += others(whole);
    return PassingOn::start_all_gather(whole, part);
  }

  double sent = 0;

 private:
  static double others(const Tensor& whole) {
    return static_cast<double>(whole.bytes()) * (world().size() - 1) / world().size();
  }
};

/// Bytes per parameter that a rank sends in a step of one micro-batch per rank.
double bytes_per_parameter(DType dtype, int zero, std::int64_t rounds) {
  Counting counting;
  SteppingRank rank({.dtype = dtype, .deterministic = false, .zero = zero, .micro_batches = rounds * world().size()}, counting);
  std::int64_t parameters = 0;
  for (const ParameterInfo& parameter : rank.programs().parameters()) {
    parameters += parameter.shape.elements();
  }
  counting.sent = 0;
  rank.step(0);
  return counting.sent / static_cast<double>(parameters) * world().size() / std::max(1, world().size() - 1);
}

TEST(Traffic, OfAStepIsWhatTheStageAsksFor) {
  if (world().size() == 1) {
    return;
  }
  struct Case {
    DType dtype;
    int zero;
    std::int64_t rounds;
    double least, most;  // bytes per parameter, of a large number of ranks
  };
  // Stage 3 gathers weights twice, but once the blocks next to the loss; a twentieth for padding and for what is not matrices.
  for (const Case& c : {Case{DType::float32, 0, 1, 8, 8}, Case{DType::float32, 1, 1, 8, 8}, Case{DType::float32, 2, 1, 8, 8},
                        Case{DType::float32, 3, 1, 8, 12}, Case{DType::bfloat16, 0, 2, 8, 8}, Case{DType::bfloat16, 1, 2, 6, 6},
                        Case{DType::bfloat16, 2, 2, 10, 10}, Case{DType::bfloat16, 3, 2, 12, 16}}) {
    const double bytes = bytes_per_parameter(c.dtype, c.zero, c.rounds);
    EXPECT_GE(bytes, c.least) << name_of(c.dtype) << ", stage " << c.zero;
    EXPECT_LE(bytes, c.most * 1.05 + 0.5) << name_of(c.dtype) << ", stage " << c.zero;
    RecordProperty(concat(name_of(c.dtype), "_", c.zero), concat(bytes));
    if (world().rank() == 0) {
      std::printf("%s, stage %d, %d micro-batches per rank: %.2f bytes per parameter\n", std::string(name_of(c.dtype)).c_str(),
                  c.zero, static_cast<int>(c.rounds), bytes);
    }
  }
}

// ---------------------------------------------------------------------------------------------- nodes

/// The ranks of this job as if each two were on a node of their own.
class NodesOfTwo final : public PassingOn {
 public:
  NodesOfTwo() : PassingOn(world()) {}
  int local_rank() const override { return rank() % 2; }
  int local_size() const override { return std::min(2, size() - rank() / 2 * 2); }
};

TEST_P(Stages, NodesMayDivideEachForItself) {
  NodesOfTwo nodes;
  StepOptions options{.dtype = DType::bfloat16};
  const Outcome expected = alone(options);
  options.zero = GetParam();
  options.zero_on_node = true;
  const bool groups = options.zero > 0 && world().size() > 1;
  if (groups && (world().size() == 3 || world().description().starts_with("TCP"))) {
    EXPECT_THROW(SteppingRank(options, nodes), UsageError) << "three ranks make two unequal nodes, and TCP has no groups";
    return;
  }
  EXPECT_EQ(SteppingRank(options, nodes).programs().zero(), groups ? options.zero : 0);
  const Outcome found = train(options, nodes);
  EXPECT_EQ(found.losses, expected.losses);
  EXPECT_EQ(found.norms, expected.norms);
  EXPECT_TRUE(found.state == expected.state);
  options.deterministic = false;
  options.dtype = DType::float64;
  const Outcome plain = alone(options), divided = train(options, nodes);
  EXPECT_NEAR(divided.losses[2], plain.losses[2], 1e-9);
  for (const auto& [name, values] : plain.state) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      ASSERT_NEAR(divided.state.at(name)[i], values[i], 1e-9) << name << ' ' << i;
    }
  }
}

}  // namespace
}  // namespace attamba
