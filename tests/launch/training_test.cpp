// Whole training runs through the built program: the same numbers on any number of ranks and threads, after any interruption.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "src/core/error.h"
#include "tests/launch/training_fixture.h"

namespace attamba {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

TEST_F(Training, DeterministicRunsDoNotDependOnTheNumberOfRanks) {
  for (const int ranks : {1, 2, 3, 4}) {
    train_well(concat("deterministic", ranks), ranks, "--train.deterministic true");
    expect_same_run("deterministic1", concat("deterministic", ranks));
  }
}

TEST_F(Training, RanksOverTcpComputeWhatRanksOverMpiCompute) {
  const std::string tcp = concat("env OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive sh ", ATTAMBA_SOURCE_DIR,
                                 "/tests/comm/multi_rank/start_ranks.sh 2 ", ATTAMBA_PROGRAM);
  const Outcome outcome = shell(tcp + arguments("tcp", "--train.deterministic true"));
  ASSERT_EQ(outcome.exit_code, 0) << outcome.output;
  EXPECT_THAT(outcome.output, HasSubstr("TCP, 2 ranks on 1 host"));
  train_well("mpi", 2, "--train.deterministic true");
  expect_same_run("tcp", "mpi");
}

TEST_F(Training, MoreRanksThanMicroBatchesIsTheSameRunToo) {
  train_well("wide1", 1, "--train.deterministic true --train.global_batch 2");
  train_well("wide3", 3, "--train.deterministic true --train.global_batch 2");
  expect_same_run("wide1", "wide3");
}

TEST_F(Training, WhatRanksDivideAmongThemChangesNoBit) {
  const std::string more = "--train.deterministic true --train.dtype bfloat16";
  train_well("whole", 1, more + " --train.zero 3");  // nobody to divide with
  const auto evaluated = [&](const std::string& name) {
    const Outcome outcome = shell(concat("OMP_NUM_THREADS=1 ", ATTAMBA_PROGRAM, " eval ", run_folder(name).string(), " --data ",
                                         (folder_ / "data/valid").string()));
    EXPECT_EQ(outcome.exit_code, 0) << outcome.output;
    return outcome.output.substr(outcome.output.find('\n'));  // the first line names the run
  };
  const std::string expected = evaluated("whole");
  for (const int zero : {1, 2, 3}) {
    const std::string name = concat("zero", zero), as_stage = concat(more, " --train.zero ", zero);
    const Outcome outcome = train(name, 2, as_stage);
    ASSERT_EQ(outcome.exit_code, 0) << outcome.output;
    EXPECT_THAT(outcome.output, HasSubstr(concat("ZeRO stage ", zero)));
    // The last steps are lost and computed again by three ranks, at another stage.
    fs::remove_all(run_folder(name) / "checkpoints/step-000000006");
    train_well(name, 3, concat(more, " --train.zero ", 3 - zero));
    EXPECT_EQ(losses(name), losses("whole")) << name;
    EXPECT_EQ(evaluations(name), evaluations("whole")) << name;
    EXPECT_EQ(evaluated(name), expected) << name;
  }
}

TEST_F(Training, OrdinaryRunsAgreeOverRanks) {
  train_well("plain1", 1);
  for (const int ranks : {2, 3}) {
    const std::string name = concat("plain", ranks);
    train_well(name, ranks);
    const auto expected = losses("plain1"), found = losses(name);
    ASSERT_EQ(expected.size(), found.size());
    for (std::size_t i = 0; i < expected.size(); ++i) {
      EXPECT_NEAR(std::stod(found[i]) / std::stod(expected[i]), 1, 1e-6) << ranks << " ranks, step " << i + 1;
    }
  }
}

TEST_F(Training, ThreadsRecomputationAndPrefetchChangeNoBit) {
  train_well("reference", 1);
  train_well("threads", 1, "--train.threads 2");
  train_well("recompute", 1, "--train.recompute true --data.prefetch 1");
  expect_same_run("reference", "threads");
  expect_same_run("reference", "recompute");
}

TEST_F(Training, RandomChunkingAndPackedDocumentsDoNotDependOnRanksEither) {
  const std::string more = "--train.deterministic true --model.chunking.strategy random --model.document_mask true";
  train_well("random1", 1, more);
  train_well("random2", 2, more);
  expect_same_run("random1", "random2");
  // Going on after each third step, with no batch read ahead, gives the same.
  train_well("resumed", 1, more);
  fs::remove_all(run_folder("resumed") / "checkpoints/step-000000006");
  train_well("resumed", 1, more);
  expect_same_run("random1", "resumed");
  train_well("not_random", 1, "--train.deterministic true --model.document_mask true");
  EXPECT_NE(losses("random1"), losses("not_random"));
}

TEST_F(Training, ARunThatLostItsLastStepsRepeatsThemBitForBit) {
  for (const std::string dtype : {"float32", "bfloat16"}) {
    const std::string more = "--train.dtype " + dtype;
    train_well("whole_" + dtype, 1, more);
    train_well("resumed_" + dtype, 1, more);
    // As after a kill behind step 3: the newest checkpoint is gone, metrics go on further, a save was cut off.
    fs::remove_all(run_folder("resumed_" + dtype) / "checkpoints/step-000000006");
    fs::create_directories(run_folder("resumed_" + dtype) / "checkpoints/step-000000006.tmp-1-2");
    std::ofstream(run_folder("resumed_" + dtype) / "metrics.jsonl", std::ios::app) << "{\"step\": 7, \"lo";
    train_well("resumed_" + dtype, 1, more);
    expect_same_run("whole_" + dtype, "resumed_" + dtype);
    EXPECT_FALSE(fs::exists(run_folder("resumed_" + dtype) / "checkpoints/step-000000006.tmp-1-2"));
  }
}

TEST_F(Training, ADamagedCheckpointIsPassedOver) {
  train_well("damaged", 1);
  const std::string state = final_state("damaged");
  const fs::path file = run_folder("damaged") / "checkpoints/step-000000006/rank-00000.h5";
  std::fstream bytes(file, std::ios::in | std::ios::out | std::ios::binary);
  bytes.seekg(static_cast<std::streamoff>(fs::file_size(file) / 2));
  const int byte = bytes.get();
  bytes.seekp(static_cast<std::streamoff>(fs::file_size(file) / 2));
  bytes.put(static_cast<char>(byte ^ 1));
  bytes.close();
  const Outcome outcome = train("damaged", 1);
  EXPECT_EQ(outcome.exit_code, 0) << outcome.output;
  EXPECT_THAT(outcome.output, HasSubstr("damaged checkpoint"));
  EXPECT_THAT(outcome.output, HasSubstr("rank-00000.h5"));
  EXPECT_EQ(final_state("damaged"), state);
}

TEST_F(Training, OnlyDamagedCheckpointsAreNeverAFreshStart) {
  train_well("ruined", 1);
  for (const char* step : {"step-000000003", "step-000000006"}) {
    fs::resize_file(run_folder("ruined") / "checkpoints" / step / "rank-00000.h5", 100);
  }
  const Outcome outcome = train("ruined", 1);
  EXPECT_EQ(outcome.exit_code, 1) << outcome.output;
  EXPECT_THAT(outcome.output, HasSubstr("none is whole"));
}

TEST_F(Training, CheckpointsThatAreGoneAreNoReasonToBeginAgainUnasked) {
  train_well("lost", 1);
  const fs::path checkpoints = run_folder("lost") / "checkpoints", metrics = run_folder("lost") / "metrics.jsonl";
  fs::rename(checkpoints, folder_ / "elsewhere");  // as when a file system is not there
  const auto size = fs::file_size(metrics);
  const Outcome outcome = train("lost", 2);
  EXPECT_EQ(outcome.exit_code, 2) << outcome.output;
  EXPECT_THAT(outcome.output,
              HasSubstr(checkpoints.string() + ": holds no checkpoint, but the run has saved one after step 6"));
  EXPECT_EQ(fs::file_size(metrics), size);
  fs::remove_all(checkpoints);
  fs::rename(folder_ / "elsewhere", checkpoints);
  train_well("lost", 1, "--run.resume must");
  const Outcome fresh = train("fresh", 1, "--run.resume must");
  EXPECT_EQ(fresh.exit_code, 2) << fresh.output;
  EXPECT_THAT(fresh.output, HasSubstr("run.resume is must"));
}

TEST_F(Training, AnInterruptSavesAndEndsCleanlyAndTheRunGoesOn) {
  const std::string more = "--train.steps 400 --checkpoint.every 0 --eval.every 0 --train.log_every 100";
  train_well("uninterrupted", 1, more);
  // exec, so that the signal reaches the program and not a shell in front of it.
  const std::string program = concat("OMP_NUM_THREADS=1 exec ", ATTAMBA_PROGRAM, arguments("interrupted", more));
  const fs::path log = folder_ / "interrupted.log";
  const pid_t child = fork();
  if (child == 0) {
    execl("/bin/sh", "sh", "-c", (program + " >" + log.string() + " 2>&1").c_str(), nullptr);
    _exit(127);
  }
  for (int i = 0; i < 600 && read_file(run_folder("interrupted") / "metrics.jsonl").empty(); ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
  kill(child, SIGINT);
  int status = 0;
  waitpid(child, &status, 0);
  ASSERT_TRUE(WIFEXITED(status));
  const bool finished = fs::exists(run_folder("interrupted") / "checkpoints/step-000000400");
  EXPECT_EQ(WEXITSTATUS(status), finished ? 0 : 75) << read_file(log);
  if (!finished) {
    EXPECT_THAT(read_file(log), testing::AllOf(HasSubstr("got SIGINT"), HasSubstr("run the same command to go on")));
  }
  train_well("interrupted", 1, more);
  EXPECT_EQ(final_state("interrupted", "000000400"), final_state("uninterrupted", "000000400"));
}

TEST_F(Training, AFolderThatHoldsAnotherRunIsRefused) {
  train_well("taken", 1);
  const Outcome other = train("taken", 1, "--optim.lr 0.5");
  EXPECT_EQ(other.exit_code, 2);
  EXPECT_THAT(other.output, testing::AllOf(HasSubstr("holds another run"), HasSubstr("optim.lr"), HasSubstr("0.5")));
  const Outcome never = train("taken", 1, "--run.resume never");
  EXPECT_EQ(never.exit_code, 2);
  fs::create_directories(run_folder("foreign"));
  std::ofstream(run_folder("foreign") / "thesis.txt") << "precious";
  const Outcome foreign = train("foreign", 1);
  EXPECT_EQ(foreign.exit_code, 2);
  EXPECT_THAT(foreign.output, HasSubstr("not a run's folder"));
  EXPECT_EQ(read_file(run_folder("foreign") / "thesis.txt"), "precious");
}

TEST_F(Training, AStartThatWasCutOffWhileItClaimedItsFolderIsNoObstacle) {
  fs::create_directories(run_folder("cut_off"));
  std::ofstream(run_folder("cut_off") / "config.toml.tmp") << "[mod";
  train_well("cut_off", 1);
  fs::remove_all(run_folder("cut_off") / "checkpoints");
  for (const char* later : {"run.json", "tokenizer.model", "metrics.jsonl", "events.jsonl"}) {
    fs::remove(run_folder("cut_off") / later);
  }
  train_well("cut_off", 1);
  EXPECT_TRUE(fs::exists(run_folder("cut_off") / "tokenizer.model"));
}

TEST_F(Training, ExplicitChunkEndsTrainEvaluateAndStayWithTheRun) {
  train_well("uniform", 1, "--model.chunking.strategy uniform");
  const fs::path ends = folder_ / "ends.txt";
  std::ofstream(ends) << "3 7 11 15 19 23\n";
  const std::string listed = concat("--model.chunking.strategy explicit --model.chunking.ends_file ", ends.string());
  train_well("explicit", 1, listed);
  expect_same_run("uniform", "explicit");

  std::ofstream(ends) << "2 9 23\n";
  const Outcome changed = train("explicit", 1, listed);
  EXPECT_EQ(changed.exit_code, 2);
  EXPECT_THAT(changed.output, testing::AllOf(HasSubstr("chunk ends"), HasSubstr(ends.string())));
  const std::string run = run_folder("explicit").string();
  const Outcome evaluated = shell(concat(ATTAMBA_PROGRAM, " eval ", run));
  EXPECT_EQ(evaluated.exit_code, 0) << evaluated.output;
  char expected[32];
  std::snprintf(expected, sizeof expected, "%.4f nats", std::stod(evaluations("explicit").back()));
  EXPECT_THAT(evaluated.output, HasSubstr(expected)) << "the ends that it was trained with";
  const Outcome other = shell(concat(ATTAMBA_PROGRAM, " eval ", run, " --chunk-ends ", ends.string()));
  EXPECT_EQ(other.exit_code, 0) << other.output;
  EXPECT_THAT(other.output, testing::Not(HasSubstr(expected)));

  std::ofstream(ends) << "2 9 24\n";
  const Outcome bad = train("bad_ends", 1, listed);
  EXPECT_EQ(bad.exit_code, 2);
  EXPECT_THAT(bad.output, testing::AllOf(HasSubstr(ends.string()), HasSubstr("layer 0"), HasSubstr("24")));
  EXPECT_FALSE(fs::exists(run_folder("bad_ends")));
}

TEST_F(Training, BadDataIsRefusedBeforeAnythingStarts) {
  const Outcome missing = train("bad_data", 1, "--data.train /nonexistent/data");
  EXPECT_EQ(missing.exit_code, 1);
  EXPECT_THAT(missing.output, HasSubstr("/nonexistent/data"));
  const Outcome vocabulary = train("bad_vocabulary", 1, "--model.vocab_size 200");
  EXPECT_NE(vocabulary.exit_code, 0);
  EXPECT_THAT(vocabulary.output, testing::AllOf(HasSubstr("200"), HasSubstr("300")));
  EXPECT_FALSE(fs::exists(run_folder("bad_data")));
  EXPECT_FALSE(fs::exists(run_folder("bad_vocabulary")));
}

TEST_F(Training, ALossThatIsNotFiniteStopsTheRunWithAdvice) {
  const std::string more = "--optim.lr 1e30 --optim.warmup 0 --optim.clip 0 --train.steps 20 --checkpoint.every 0";
  const Outcome outcome = train("diverged", 1, more);
  EXPECT_EQ(outcome.exit_code, 1) << outcome.output;
  EXPECT_THAT(outcome.output, testing::AllOf(HasSubstr("not finite"), HasSubstr("--train.debug")));
  const Outcome debugged = train("diverged_debug", 1, more + " --train.debug");
  EXPECT_EQ(debugged.exit_code, 1) << debugged.output;
  EXPECT_THAT(debugged.output,
              testing::AllOf(HasSubstr("not a finite number"), testing::ContainsRegex("in (layers|the program|[a-z_])")));
}

TEST_F(Training, EvaluationAndSamplingReadTheRun) {
  train_well("read", 1);
  const std::string run = run_folder("read").string();
  const Outcome evaluated = shell(concat(ATTAMBA_PROGRAM, " eval ", run));
  ASSERT_EQ(evaluated.exit_code, 0) << evaluated.output;
  char expected[32];
  std::snprintf(expected, sizeof expected, "%.4f nats", std::stod(evaluations("read").back()));
  EXPECT_THAT(evaluated.output, HasSubstr(expected));
  const Outcome sharper = shell(concat(ATTAMBA_PROGRAM, " eval ", run, " --chunk-size 8 --leading-tokens 0"));
  EXPECT_EQ(sharper.exit_code, 0) << sharper.output;
  EXPECT_NE(sharper.output, evaluated.output);
  const std::string generate = concat(ATTAMBA_PROGRAM, " generate ", run, " --prompt 'the river' --tokens 40 --seed 5");
  const Outcome text = shell(generate);
  EXPECT_EQ(text.exit_code, 0) << text.output;
  EXPECT_THAT(text.output, testing::StartsWith("the river"));
  EXPECT_EQ(shell(generate).output, text.output);
}

}  // namespace
}  // namespace attamba
