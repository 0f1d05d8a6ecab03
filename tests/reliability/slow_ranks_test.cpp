// A rank that computes slower than the others is named, and the run goes on.
#include "tests/reliability/job.h"

namespace attamba {
namespace {

class SlowRanksOfARun : public Reliability {};

TEST_F(SlowRanksOfARun, ARankThatTakesTwiceAsLongIsNamedWithinTwentySteps) {
  for (int trial = 0; trial < trials(1); ++trial) {
    const std::string name = concat("slow", trial);
    const int slow = (trial + 1) % 3;
    const Outcome outcome =
        shell(faulty(name, 3, concat("slow ", slow, " 5-"), {{"train.steps", "25"}, {"train.global_batch", "600"}}));
    ASSERT_EQ(outcome.exit_code, 0) << outcome.output;
    EXPECT_EQ(steps_logged(name), 25) << "the run goes on";
    EXPECT_THAT(outcome.output,
                testing::ContainsRegex(concat("rank ", slow, " on .* is slow: it computes .* times as long as the others, ")));
    std::vector<int> named;
    for (const auto& event : events(name, "slow rank")) {
      EXPECT_LE(event.at("step").get<int>(), 24) << "it has been slow since step 5";
      named.push_back(event.at("rank"));
      std::cout << "rank " << event.at("rank") << ": named after step " << event.at("step") << ", " << event.at("ratio")
                << " times as slow\n";
    }
    EXPECT_THAT(named, testing::ElementsAre(slow)) << outcome.output;
    fs::remove_all(folder_ / name);
  }
}

}  // namespace
}  // namespace attamba
