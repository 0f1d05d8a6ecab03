// A plan says what training then does: the same parameters, the same bytes.
#include "src/train/run_plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "comm/planned_ranks.h"
#include "comm/single_process.h"
#include "src/core/error.h"
#include "src/train/checkpoint.h"
#include "tests/core/fake_device.h"
#include "tests/core/temporary_folder.h"

namespace attamba {
namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::HasSubstr;

Config paper() {
  return load_config(fs::path(ATTAMBA_SOURCE_DIR) / "configs/attamba_62m.toml");
}

Config tiny() {
  Config config;
  config.model.kind = "attamba";
  config.model.vocab_size = 300;
  config.model.dim = 64;
  config.model.n_layers = 3;
  config.model.n_heads = 2;
  config.model.ffn_dim = 96;
  config.model.ssm = {.hidden = 32, .state = 16, .heads = 2};
  config.data.sequence_length = 128;
  config.train.micro_batch = 4;
  config.train.global_batch = 24;
  return config;
}

RunPlanRequest request_for(const Config& config, int ranks = 1) {
  return {.config = config, .ranks = ranks, .machine = known_machine("H200")};
}

template <class Body>
std::string error_of(const Body& body) {
  try {
    body();
  } catch (const UsageError& error) {
    return error.what();
  }
  return "no error";
}

TEST(RunPlan, CountsTheParametersThatTheSpecificationStates) {
  EXPECT_EQ(plan_run(request_for(paper())).demands.parameters, 62'751'488);
  EXPECT_EQ(
      plan_run(request_for(load_config(fs::path(ATTAMBA_SOURCE_DIR) / "configs/transformer_60m.toml"))).demands.parameters,
      60'039'680);
}

/// A device that counts what it is asked for, with the CPU's kernels.
FakeDevice& counting_device() {
  static FakeDevice* const kDevice = [] {
    auto made = std::make_unique<FakeDevice>(FakeDevice::Queue::immediate);
    FakeDevice* device = made.get();
    set_runtime(Device::cuda, std::move(made));
    kernels::set_backend(Device::cuda, kernels::on(Device::cpu));
    return device;
  }();
  return *kDevice;
}

TEST(RunPlan, PlansEveryByteThatTrainingAllocates) {
  for (const auto& [ranks, zero] : {std::pair{1, 0}, {3, 0}, {3, 1}, {3, 2}, {3, 3}}) {
    for (const char* dtype : {"float32", "bfloat16"}) {
      for (const bool recompute : {false, true}) {
        for (const bool deterministic : {false, true}) {
          Config config = tiny();
          config.train.dtype = dtype;
          config.train.recompute = recompute;
          config.train.deterministic = deterministic;
          config.train.zero = zero;
          RunPlanRequest request = request_for(config, ranks);
          request.kernels = Device::cuda;
          FakeDevice& device = counting_device();
          const Demands demands = demands_of(request);
          const std::size_t before = device.device_bytes;
          PlannedRanks communicator(zero == 0 ? ranks - 1 : 0, ranks);  // alignment may give another rank a few bytes more
          const auto chunking = make_model_chunking(config.model, config.data.sequence_length);
          const ModelPrograms programs(program_options(config, chunking.get(), Device::cuda), communicator);
          EXPECT_EQ(demands.allocated(), device.device_bytes - before) << dtype << ", " << ranks << " ranks, stage " << zero;
          EXPECT_EQ(demands.allocated(), programs.memory().total());
        }
      }
    }
  }
}

TEST(RunPlan, KnowsTheSizeOfACheckpoint) {
  const Config config = tiny();
  SingleProcess communicator;
  const auto chunking = make_model_chunking(config.model, config.data.sequence_length);
  ModelPrograms programs(program_options(config, chunking.get(), Device::cpu), communicator);
  const TemporaryFolder folder;
  TrainingState state;
  state.step = 1;
  state.configuration = to_toml(config);
  save_checkpoint(folder.path(), state, programs.saved_state(), communicator);
  std::uintmax_t bytes = 0;
  for (const fs::directory_entry& entry : fs::recursive_directory_iterator(folder.path())) {
    bytes += entry.is_regular_file() ? entry.file_size() : 0;
  }
  const double planned = checkpoint_bytes(request_for(config));
  EXPECT_NEAR(planned, static_cast<double>(bytes), 0.01 * static_cast<double>(bytes));
}

TEST(RunPlan, WhatItProposesFitsWhenPlannedAgain) {
  RunPlanRequest request = request_for(paper());
  request.machine.reserved = 0;
  request.machine.memory = 2.6e9;
  const RunPlan plan = plan_run(request);
  ASSERT_FALSE(plan.fits());
  ASSERT_EQ(plan.proposals.size(), 2u) << "smaller micro-batches, and recomputation";
  EXPECT_LE(plan.proposals[0].step_seconds, plan.proposals[1].step_seconds) << "the quickest first";
  for (const Proposal& proposal : plan.proposals) {
    RunPlanRequest changed = request;
    changed.config = proposal.config;
    const RunPlan again = plan_run(changed);
    EXPECT_TRUE(again.fits()) << proposal.change;
    EXPECT_EQ(again.used_bytes(), proposal.bytes);
    EXPECT_EQ(again.demands.time.total(), proposal.step_seconds);
    std::ostringstream out;
    print_run_plan(out, plan);
    EXPECT_THAT(out.str(), AllOf(HasSubstr("does not fit"), HasSubstr(proposal.change)));
  }
  request.machine.memory = 1e8;
  EXPECT_TRUE(plan_run(request).proposals.empty());
}

TEST(RunPlan, ADeviceThatIsTooSmallGetsAdviceThatHolds) {
  Config config = tiny();
  config.train.micro_batch = 12;
  FakeDevice& device = counting_device();
  RunPlanRequest request = request_for(config);
  request.kernels = Device::cuda;
  const Demands needed = demands_of(request);
  const std::size_t room = needed.allocated() - needed.arena / 2;
  const auto chunking = make_model_chunking(config.model, config.data.sequence_length);
  PlannedRanks communicator(0, 1);
  device.limit = device.device_bytes + room;
  std::string message;
  try {
    make_run_programs(config, chunking.get(), Device::cuda, communicator);
  } catch (const OutOfMemory& error) {
    message = error.what();
  }
  device.limit = std::numeric_limits<std::size_t>::max();
  EXPECT_THAT(message,
              AllOf(HasSubstr(concat(in_binary_units(needed.arena), " for activations")), HasSubstr("are free"),
                    HasSubstr(needed.largest.front().purpose), HasSubstr("moment1"), HasSubstr("--train.recompute true")));
  // What it names first fits.
  request.machine.memory = static_cast<double>(room);
  request.machine.reserved = 0;
  const RunPlan plan = plan_run(request);
  ASSERT_FALSE(plan.proposals.empty());
  EXPECT_THAT(message, HasSubstr("the quickest first: " + plan.proposals.front().change));
}

TEST(RunPlan, SaysWhenThereAreMoreRanksThanMicroBatches) {
  RunPlanRequest request = request_for(paper(), 8);
  EXPECT_THAT(plan_run(request).warnings, testing::ElementsAre(AllOf(HasSubstr("7 of 8"), HasSubstr("--train.micro_batch 2"))));
  request.config.train.micro_batch = 2;
  EXPECT_THAT(plan_run(request).warnings, testing::IsEmpty());
  request.ranks = 3;
  EXPECT_THAT(plan_run(request).warnings, testing::ElementsAre(HasSubstr("1 of them wait")));
  request.ranks = 64;
  EXPECT_THAT(plan_run(request).warnings, testing::ElementsAre(HasSubstr("global_batch of at least 128")));
}

// ---------------------------------------------------------------------------------------------- time

TEST(StepTime, CountsOperationsOnceForEachMicroBatchOfTheBusiestRank) {
  Config config = paper();
  config.train.micro_batch = 1;
  RunPlanRequest request = request_for(config);
  request.machine.op_seconds = 0;
  const auto compute = [&](int ranks) {
    request.ranks = ranks;
    return demands_of(request).time.compute;
  };
  // A step's end is the update; beyond it, 16, 8 and 6 micro-batches.
  const double one = compute(16), sixteen = compute(1), eight = compute(2), six = compute(3);
  EXPECT_NEAR((eight - one) / 7, (sixteen - one) / 15, 1e-9 * sixteen);
  EXPECT_NEAR((six - one) / 5, (sixteen - one) / 15, 1e-9 * sixteen);
}

TEST(StepTime, HidesTheNetworkBehindTheBackwardPassWhereItCan) {
  Config config = paper();
  config.train.micro_batch = 4;
  RunPlanRequest request = request_for(config);
  const StepTime alone = demands_of(request).time;
  EXPECT_EQ(alone.communication, 0);
  EXPECT_EQ(alone.exposed, 0);
  request.ranks = 4;
  const StepTime together = demands_of(request).time;
  EXPECT_GT(together.communication, 0);
  EXPECT_GT(together.exposed, 0) << "the last bucket has nothing to hide behind";
  EXPECT_LT(together.exposed, together.communication) << "others have";
  // Gradients are float32, totals and padding little more; a ring sends them twice but for its own share.
  EXPECT_NEAR(together.sent_bytes, 2 * 0.75 * 4 * 62'751'488, 1e-3 * together.sent_bytes);
  request.machine.link = 1e8;
  const StepTime slow = demands_of(request).time;
  EXPECT_EQ(slow.compute, together.compute);
  EXPECT_GT(slow.total(), slow.communication) << "the first bucket waits for its gradients";
  EXPECT_NEAR(slow.communication, slow.sent_bytes / 1e8, 1e-2 * slow.communication);
}

TEST(StepTime, ZeroStagesMoveAndKeepWhatTheirProgramsDo) {
  Config config = paper();
  config.train.micro_batch = 2;  // two on each rank
  const RunPlanRequest request = request_for(config, 4);
  const RunPlan plan = plan_run(request);
  const double parameters = 62'751'488, sent = 0.75 * parameters;  // a quarter of everything is a rank's own
  ASSERT_EQ(plan.stages.size(), 4u);
  const auto expect = [&](std::size_t stage, double bytes_per_parameter) {
    EXPECT_NEAR(plan.stages[stage].sent_bytes, bytes_per_parameter * sent, 1e-2 * plan.stages[stage].sent_bytes) << stage;
  };
  expect(0, 2 * 4);      // sums of float32
  expect(1, 4 + 2);      // a half of that, then bfloat16 weights
  expect(2, 2 * 4 + 2);  // sums of both micro-batches
  // For each, all weights, and for the backward pass those of the blocks again, but for the last one's, which are still there.
  const double blocks = 1 - 2 * 32'000.0 * 512 / parameters;
  expect(3, 2 * 4 + 2 * 2 * (1 + 7.0 / 8 * blocks));
  EXPECT_NEAR(plan.stages[0].bytes - plan.stages[1].bytes, (4 + 8) * sent, 2e-2 * plan.stages[0].bytes);
  EXPECT_LT(plan.stages[3].bytes, plan.stages[2].bytes);
  EXPECT_EQ(plan.stages[0].step_seconds, plan.demands.time.total());
}

TEST(StepTime, DividingWithinNodesSparesTheNetworkBetweenThem) {
  Config config = paper();
  config.train.global_batch = 128;
  config.train.micro_batch = 4;  // two on each rank: nodes exchange sums once
  config.train.zero = 3;
  RunPlanRequest request = request_for(config, 16);
  request.machine.network = 1e9;
  const StepTime all = demands_of(request).time;
  request.config.train.zero_group = "node";
  const StepTime node = demands_of(request).time;
  EXPECT_LT(node.communication, all.communication / 2);
  request.ranks = 12;
  EXPECT_THAT(error_of([&] { plan_run(request); }), HasSubstr("whole nodes"));
  request.config.train.zero = 0;  // nothing is divided, so nothing is wrong; other stages are not on offer
  EXPECT_EQ(plan_run(request).stages.size(), 1u);
}

TEST(RunPlan, TokensDecideTheStepsWhenTheyAreGiven) {
  RunPlanRequest request = request_for(paper());
  EXPECT_EQ(plan_run(request).steps, 60'000);
  request.tokens = 8e9;
  const RunPlan plan = plan_run(request);
  EXPECT_EQ(plan.steps, 488'282) << "the last step is a whole one";
  const nlohmann::json json = to_json(plan);
  EXPECT_NEAR(json["gpu_hours"], static_cast<double>(plan.steps) * plan.demands.time.total() / 3600,
              1e-9 * json["gpu_hours"].get<double>());
  EXPECT_EQ(json["parameters"], 62'751'488);
  EXPECT_GT(json["efficiency"], 0.1);
  EXPECT_LT(json["efficiency"], 1.0);
  EXPECT_EQ(json["fits"], true);
}

// ---------------------------------------------------------------------------------------------- machines

TEST(Machines, AreKnownByNameAndTyposGetTheNearestOne) {
  for (const std::string_view name : machine_names()) {
    EXPECT_GT(known_machine(name).bfloat16, 0) << name;
  }
  EXPECT_EQ(known_machine("h200").name, "H200");
  EXPECT_THAT(error_of([] { known_machine("H1000"); }), AllOf(HasSubstr("did you mean \"H100\"?"), HasSubstr("--machine")));
}

TEST(Machines, AFileReplacesNumbersAndNamesItsMistakes) {
  const fs::path file = fs::temp_directory_path() / concat("attamba-machine-", getpid(), ".toml");
  std::ofstream(file) << "bfloat16 = 5e14\nnetwork = 1_000_000_000\n";
  const Machine machine = load_machine(file, known_machine("A100"));
  EXPECT_EQ(machine.bfloat16, 5e14);
  EXPECT_EQ(machine.network, 1e9);
  EXPECT_EQ(machine.bandwidth, known_machine("A100").bandwidth);
  std::ofstream(file) << "bandwith = 1e12\n";
  EXPECT_THAT(error_of([&] { load_machine(file, known_machine("A100")); }),
              AllOf(HasSubstr(file.string() + ":1:1"), HasSubstr("did you mean \"bandwidth\"?")));
  std::ofstream(file) << "link = 0\n";
  EXPECT_THAT(error_of([&] { load_machine(file, known_machine("A100")); }),
              AllOf(HasSubstr(file.string()), HasSubstr("link = 0")));
  fs::remove(file);
  EXPECT_THAT(error_of([&] { load_machine(file, known_machine("A100")); }), HasSubstr(file.string()));
}

TEST(Machines, RingsAreBoundByTheirSlowestLinkAndTreesCutTheLatency) {
  Machine machine = known_machine("H100");
  machine.link = 4e11;
  machine.network = 1e11;
  const auto among = [](Collective::Kind kind, std::size_t bytes, int ranks) {
    return Collective{.kind = kind, .bytes = bytes, .ranks = ranks, .ranks_per_node = std::min(ranks, 8)};
  };
  constexpr std::size_t kLarge = std::size_t{4} << 30;
  const auto speed = [&](int ranks) {
    const Collective sum = among(Collective::Kind::all_reduce, kLarge, ranks);
    return ring_bytes(sum) / machine.collective_seconds(sum);
  };
  EXPECT_EQ(machine.collective_seconds(among(Collective::Kind::all_reduce, kLarge, 1)), 0);
  EXPECT_NEAR(speed(8), 4e11, 0.02 * 4e11);
  EXPECT_NEAR(speed(16), 1e11, 0.02 * 1e11);
  const double small = machine.collective_seconds(among(Collective::Kind::all_reduce, 64, 1024));
  EXPECT_LT(small, 1e-3) << "128 nodes are 7 steps of a tree";
  EXPECT_GT(small, 14 * 2.6e-6) << "each at least what NCCL counts for its protocol of the least latency";
  EXPECT_NEAR(machine.collective_seconds(among(Collective::Kind::all_gather, kLarge, 8)),
              machine.collective_seconds(among(Collective::Kind::all_reduce, kLarge, 8)) / 2, 1e-4);
  // One GPU of each of two nodes has an eighth of the adapters: the others exchange their own parts.
  const Collective pair{.kind = Collective::Kind::all_reduce, .bytes = kLarge, .ranks = 2, .ranks_per_node = 1};
  EXPECT_NEAR(ring_bytes(pair) / machine.collective_seconds(pair), 1e11 / 8, 0.02 * 1e11);
}

}  // namespace
}  // namespace attamba
