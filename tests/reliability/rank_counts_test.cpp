// Runs that were saved by some ranks and go on with more or fewer, at another stage of ZeRO.
#include <array>

#include "tests/reliability/job.h"

namespace attamba {
namespace {

using testing::HasSubstr;

class RankCounts : public Reliability {
 protected:
  static constexpr int kPairs = 36;
  struct Part {
    int ranks = 1, zero = 0;
  };
  struct Pair {
    Part saved, resumed;
  };
  /// Of numbers of ranks, the first ones larger, smaller and far apart; with two different stages, all 12 pairs of which come
  /// three times.
  static Pair pair(int trial) {
    constexpr std::array kRanks{1, 2, 3, 4, 6, 8};
    const int n = (15 + 5 * trial) % kPairs, zero = n % 4;
    return {.saved = {.ranks = kRanks[static_cast<std::size_t>(n / 6)], .zero = zero},
            .resumed = {.ranks = kRanks[static_cast<std::size_t>(n % 6)], .zero = (zero + 1 + n / 4 % 3) % 4}};
  }
  /// Six steps of 13 samples, which no number of ranks divides.
  static Outcome train(const std::string& name, const Part& part) {
    return shell(training(name, part.ranks,
                          {{"train.deterministic", "true"},
                           {"train.zero", concat(part.zero)},
                           {"train.steps", "6"},
                           {"train.global_batch", "13"},
                           {"eval.every", "3"},
                           {"checkpoint.every", "3"},
                           {"checkpoint.keep", "0"}}));
  }
  /// Every loss and norm, as written: equal texts are equal bits.
  static std::vector<std::string> curve(const std::string& name) {
    std::vector<std::string> values;
    for (const auto& line : lines(name, "metrics.jsonl")) {
      for (const char* key : {"loss", "grad_norm", "eval_loss"}) {
        if (line.contains(key)) {
          values.push_back(concat("step ", line.at("step").dump(), ' ', key, ' ', line.at(key).dump()));
        }
      }
    }
    return values;
  }
};

TEST_F(RankCounts, ARunSavedByAnyNumberGoesOnBitForBitWithAnyOther) {
  const Outcome whole = train("whole", {.ranks = 1, .zero = 0});
  ASSERT_EQ(whole.exit_code, 0) << whole.output;
  const std::vector<std::string> expected = curve("whole");
  ASSERT_EQ(expected.size(), 14u) << "six losses and norms, two evaluations";
  const int count = std::min(trials(3), kPairs);
  for (int trial = 0; trial < count; ++trial) {
    const auto [saved, resumed] = pair(trial);
    const std::string name = concat("pair", trial);
    SCOPED_TRACE(
        concat("saved by ", saved.ranks, " at stage ", saved.zero, ", resumed by ", resumed.ranks, " at stage ", resumed.zero));
    const Outcome before = train(name, saved);
    ASSERT_EQ(before.exit_code, 0) << before.output;
    EXPECT_EQ(manifest(name, 3).at("files").size(), static_cast<std::size_t>(saved.ranks));
    fs::remove_all(checkpoint(name, 6));  // as after a crash behind step 3
    const Outcome after = train(name, resumed);
    ASSERT_EQ(after.exit_code, 0) << after.output;
    EXPECT_THAT(after.output, HasSubstr("resuming after step 3"));
    EXPECT_EQ(manifest(name, 6).at("files").size(), static_cast<std::size_t>(resumed.ranks));
    EXPECT_EQ(curve(name), expected);
    EXPECT_EQ(state_of(name, 6), state_of("whole", 6)) << "weights and moments";
    fs::remove_all(folder_ / name);
  }
  std::cout << count << " of " << kPairs << " pairs of numbers of ranks\n";
}

}  // namespace
}  // namespace attamba
