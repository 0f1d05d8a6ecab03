// Steps with a gradient that is not finite or far too large on one rank.
#include "tests/reliability/job.h"

namespace attamba {
namespace {

using testing::AllOf;
using testing::HasSubstr;

class BadStepsOfARun : public Reliability {};

TEST_F(BadStepsOfARun, AllRanksSkipWhatIsNotFiniteOnOneAndChangeNoBit) {
  for (const std::string kind : {"nan", "inf"}) {
    for (const int ranks : {2, 3}) {
      const std::string name = concat(kind, ranks);
      const Outcome outcome = shell(faulty(name, ranks, kind + " 1 4", {{"train.steps", "4"}, {"checkpoint.every", "3"}}));
      ASSERT_EQ(outcome.exit_code, 0) << outcome.output;
      EXPECT_THAT(outcome.output, AllOf(HasSubstr("step 4: "), HasSubstr(kind + ": not finite, so the update was skipped"),
                                        HasSubstr("; samples 18 to 23")));
      EXPECT_EQ(state_of(name, 4), state_of(name, 3)) << "weights and moments";
      const auto skipped = events(name, "skipped step");
      ASSERT_EQ(skipped.size(), 1u);
      EXPECT_EQ(skipped[0].at("windows").size(), 6u);
      const auto metrics = lines(name, "metrics.jsonl");
      EXPECT_TRUE(std::any_of(metrics.begin(), metrics.end(),
                              [](const auto& line) { return line.value("first_skipped_sample", -1.0) == 18; }));
    }
  }
}

TEST_F(BadStepsOfARun, ASpikeOnOneRankIsSkippedByAll) {
  const Outcome outcome = shell(faulty("spike", 2, "spike 1 25", {{"train.steps", "26"}}));
  ASSERT_EQ(outcome.exit_code, 0) << outcome.output;
  EXPECT_THAT(outcome.output, AllOf(HasSubstr("step 25: "), HasSubstr("a spike (the limit is ")));
  EXPECT_EQ(events("spike", "skipped step").size(), 1u);
}

TEST_F(BadStepsOfARun, BadStepsInARowLeadBackToACheckpointAndPastTheirSamples) {
  const Keys more{{"train.steps", "12"}, {"checkpoint.every", "4"}, {"checkpoint.keep", "0"}, {"train.deterministic", "false"}};
  const Outcome outcome = shell(faulty("rollback", 2, "nan 1 6-8", more));
  ASSERT_EQ(outcome.exit_code, 0) << outcome.output;
  EXPECT_THAT(outcome.output,
              AllOf(HasSubstr("steps 6 to 8 were skipped: going back to the checkpoint of step 4"), HasSubstr("from 48")));
  const auto rollbacks = events("rollback", "rollback");
  ASSERT_EQ(rollbacks.size(), 1u);
  EXPECT_EQ(rollbacks[0].at("next_sample"), 48) << "8 steps of 6 samples are done with";
  EXPECT_EQ(rollbacks[0].at("passed_over"), 4);
  std::vector<std::int64_t> steps;
  for (const auto& line : lines("rollback", "metrics.jsonl")) {
    if (line.contains("loss")) {
      steps.push_back(line.at("step"));
    }
  }
  EXPECT_THAT(steps, testing::ElementsAre(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)) << "curves have no doubled parts";
  // A run that lost its end goes on past the same samples.
  const std::string state = state_of("rollback", 12);
  fs::remove_all(checkpoint("rollback", 12));
  const Outcome again = shell(training("rollback", 2, more));
  ASSERT_EQ(again.exit_code, 0) << again.output;
  EXPECT_EQ(state_of("rollback", 12), state);
}

TEST_F(BadStepsOfARun, AStopBetweenBadStepsChangesNothing) {
  const Keys more{{"train.steps", "12"}, {"checkpoint.every", "4"}, {"checkpoint.keep", "1"}};
  const Outcome whole = shell(faulty("whole", 2, "nan 1 6-8", more));
  ASSERT_EQ(whole.exit_code, 0) << whole.output;
  Keys unheard = more;  // no heartbeat tells the other rank of the signal before the step does
  unheard.emplace_back("run.watchdog_seconds", "0");
  const Outcome stopped = shell(faulty("parts", 2, "stop 1 6-7", unheard));
  ASSERT_EQ(stopped.exit_code, 75) << stopped.output;
  ASSERT_EQ(saved_step("parts"), 7);
  const Outcome resumed = shell(faulty("parts", 2, "nan 1 1", more));
  ASSERT_EQ(resumed.exit_code, 0) << resumed.output;
  EXPECT_THAT(resumed.output, HasSubstr("steps 6 to 8 were skipped: going back to the checkpoint of step 4"));
  EXPECT_EQ(state_of("parts", 12), state_of("whole", 12));
}

TEST_F(BadStepsOfARun, AStopWithTheStepThatRollsBackKeepsWhatWasPassedOver) {
  const Keys more{{"train.steps", "12"}, {"checkpoint.every", "4"}};
  const Outcome whole = shell(faulty("whole_stop", 2, "nan 1 6-8", more));
  ASSERT_EQ(whole.exit_code, 0) << whole.output;
  Keys unheard = more;
  unheard.emplace_back("run.watchdog_seconds", "0");
  const Outcome stopped = shell(faulty("stopped_back", 2, "stop 1 6-8", unheard));
  ASSERT_EQ(stopped.exit_code, 75) << stopped.output;
  ASSERT_EQ(saved_step("stopped_back"), 4);
  const Outcome resumed = shell(training("stopped_back", 2, more));
  ASSERT_EQ(resumed.exit_code, 0) << resumed.output;
  EXPECT_EQ(state_of("stopped_back", 12), state_of("whole_stop", 12));
}

TEST_F(BadStepsOfARun, RollbacksThatDoNotHelpEndTheRunWithAdvice) {
  const Outcome outcome = shell(faulty("useless", 2, "nan 0 6-", {{"train.steps", "50"}, {"checkpoint.every", "4"}}));
  EXPECT_EQ(outcome.exit_code, 1) << outcome.output;
  EXPECT_THAT(outcome.output, AllOf(HasSubstr("after 2 rollbacks in a row"), HasSubstr("train.spike_factor")));
  EXPECT_EQ(events("useless", "rollback").size(), 2u);
  const Outcome none = shell(faulty("none", 2, "nan 0 2-", {{"train.steps", "50"}}));
  EXPECT_EQ(none.exit_code, 1) << none.output;
  EXPECT_THAT(none.output, HasSubstr("there is no checkpoint to go back to"));
}

}  // namespace
}  // namespace attamba
