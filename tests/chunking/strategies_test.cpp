// Chunk ends of every strategy against the definitions of docs/model.md.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>

#include "src/chunking/chunking.h"
#include "src/core/error.h"
#include "tests/core/temporary_folder.h"

namespace attamba {
namespace {

using Ends = std::vector<std::int32_t>;

Ends ends_of(const ChunkingStrategy& strategy, const ChunkRequest& request) {
  Ends ends;
  strategy.ends(request, ends);
  return ends;
}

/// Positions j of [0, n) for which `is_end(j)` holds, and n - 1.
template <class Predicate>
Ends brute_force(std::int64_t n, const Predicate& is_end) {
  Ends ends;
  for (std::int64_t j = 0; j < n; ++j) {
    if (is_end(j) || j == n - 1) {
      ends.push_back(static_cast<std::int32_t>(j));
    }
  }
  return ends;
}

class RegularStrategies : public testing::TestWithParam<std::int64_t> {};  // P

TEST_P(RegularStrategies, EndWhereTheDefinitionSays) {
  const std::int64_t p = GetParam();
  const auto uniform = make_chunking("uniform", p), cyclic = make_chunking("cyclic", p), pseudo = make_chunking("none", p);
  for (std::int64_t n = 1; n <= 40; ++n) {
    for (std::int64_t layer = 0; layer < 20; ++layer) {
      const ChunkRequest request{.length = n, .layer = layer};
      const Ends every = brute_force(n, [&](std::int64_t j) { return (j + 1) % p == 0; });
      EXPECT_EQ(ends_of(*uniform, request), every) << "n " << n;
      EXPECT_EQ(ends_of(*pseudo, request), every) << "n " << n;
      EXPECT_EQ(ends_of(*cyclic, request), brute_force(n, [&](std::int64_t j) { return (j + 1 + layer) % p == 0; }))
          << "n " << n << ", layer " << layer;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Sizes, RegularStrategies, testing::Values(1, 2, 3, 4, 8, 16, 64), testing::PrintToStringParamName());

TEST(Strategies, LayersOfOneClassEndAlike) {
  for (const char* name : {"uniform", "cyclic", "none", "random"}) {
    const auto strategy = make_chunking(name, 4);
    for (std::int64_t a = 0; a < 10; ++a) {
      for (std::int64_t b = 0; b < a; ++b) {
        const bool alike = ends_of(*strategy, {.length = 64, .layer = a}) == ends_of(*strategy, {.length = 64, .layer = b});
        EXPECT_EQ(strategy->layer_class(a) == strategy->layer_class(b), alike) << name << ", layers " << a << " and " << b;
      }
    }
  }
}

TEST(Strategies, SayWhatTheyDependOn) {
  for (const char* name : {"uniform", "cyclic", "none", "random"}) {
    const auto strategy = make_chunking(name, 4);
    const bool varies = ends_of(*strategy, {.length = 64, .step = 1}) != ends_of(*strategy, {.length = 64, .step = 2});
    EXPECT_EQ(strategy->varies(), varies) << name;
    EXPECT_EQ(strategy->full_attention(), std::string(name) == "none") << name;
  }
}

TEST(Strategies, KnowHowLongAChunkMayBe) {
  for (const char* name : {"uniform", "cyclic", "none", "random"}) {
    const auto strategy = make_chunking(name, 4);
    for (std::int64_t n = 1; n < 40; ++n) {
      for (std::int64_t layer = 0; layer < 6; ++layer) {
        std::vector<std::int32_t> ends;
        strategy->ends({.length = n, .layer = layer}, ends);
        std::int32_t before = -1;
        for (const std::int32_t end : ends) {
          EXPECT_LE(end - before, strategy->longest_chunk(n)) << name << ", n = " << n;
          before = end;
        }
      }
    }
  }
}

TEST(Strategies, AppendToWhatIsThere) {
  for (const char* name : {"uniform", "cyclic", "none", "random"}) {
    const auto strategy = make_chunking(name, 4);
    Ends ends{42};
    strategy->ends({.length = 12, .layer = 1}, ends);
    Ends expected = ends_of(*strategy, {.length = 12, .layer = 1});
    expected.insert(expected.begin(), 42);
    EXPECT_EQ(ends, expected) << name;
  }
}

TEST(Strategies, UnknownNamesAndSizesAreTheUsersMistake) {
  try {
    make_chunking("unform", 4);
    FAIL() << "accepted";
  } catch (const UsageError& error) {
    EXPECT_THAT(error.what(), testing::HasSubstr("unform"));
  }
  EXPECT_THROW(make_chunking("uniform", 0), UsageError);
}

// ---------------------------------------------------------------------------------------------- released

TEST(ReleasedChunking, EndsWhereTheReleasedCodeEndsChunks) {
  constexpr std::int64_t kLayers = 8;
  for (const std::int64_t p : {1, 2, 4, 8, 16, 64}) {
    for (const std::int64_t n : {p, 2 * p, 16 * p}) {
      const auto cyclic = make_released_chunking("cyclic", p, kLayers), uniform = make_released_chunking("uniform", p, kLayers);
      const auto pseudo = make_released_chunking("none", p, kLayers);
      for (std::int64_t layer = 0; layer < kLayers; ++layer) {
        const std::int64_t offset = layer * (p / kLayers);
        const auto expected = [&](std::int64_t shift) {
          Ends ends{0};
          for (std::int64_t j = 1; j < n; ++j) {
            if ((j + 1 + shift) % p == 0) {
              ends.push_back(static_cast<std::int32_t>(j));
            }
          }
          ends.back() = static_cast<std::int32_t>(n - 1);
          return ends;
        };
        const ChunkRequest request{.length = n, .layer = layer};
        EXPECT_EQ(ends_of(*cyclic, request), expected(offset)) << "P " << p << ", n " << n << ", layer " << layer;
        EXPECT_EQ(ends_of(*uniform, request), expected(0)) << "P " << p << ", n " << n;
        EXPECT_EQ(ends_of(*pseudo, request), expected(offset)) << "P " << p << ", n " << n << ", layer " << layer;
        EXPECT_EQ(cyclic->layer_class(layer), offset);
      }
    }
  }
}

TEST(ReleasedChunking, HasAShortFirstChunkAndALongLastOne) {
  const auto cyclic = make_released_chunking("cyclic", 8, 8);
  EXPECT_EQ(ends_of(*cyclic, {.length = 32, .layer = 0}), (Ends{0, 7, 15, 23, 31}));
  EXPECT_EQ(ends_of(*cyclic, {.length = 32, .layer = 3}), (Ends{0, 4, 12, 20, 31}));  // the last chunk has P + 3 tokens
  EXPECT_EQ(ends_of(*cyclic, {.length = 32, .layer = 7}), (Ends{0, 8, 16, 31}));
  EXPECT_EQ(ends_of(*cyclic, {.length = 1, .layer = 7}), (Ends{0}));
  EXPECT_EQ(ends_of(*make_released_chunking("cyclic", 4, 8), {.length = 12, .layer = 7}), (Ends{0, 3, 7, 11}));  // no shift
}

TEST(ReleasedChunking, KnowsHowLongAChunkMayBe) {
  const auto cyclic = make_released_chunking("cyclic", 4, 2);
  for (std::int64_t n = 1; n < 40; ++n) {
    for (std::int64_t layer = 0; layer < 2; ++layer) {
      std::int32_t before = -1;
      for (const std::int32_t end : ends_of(*cyclic, {.length = n, .layer = layer})) {
        EXPECT_LE(end - before, cyclic->longest_chunk(n)) << "n = " << n;
        before = end;
      }
      EXPECT_EQ(before, n - 1);
    }
  }
}

TEST(ReleasedChunking, OfOtherStrategiesIsTheUsersMistake) {
  EXPECT_THROW(make_released_chunking("random", 4, 2), UsageError);
  EXPECT_THROW(make_released_chunking("uniform", 0, 2), UsageError);
}

// ---------------------------------------------------------------------------------------------- random

TEST(RandomChunking, DrawsThePaperCountOfDistinctPositions) {
  for (const std::int64_t p : {1, 2, 3, 8, 50}) {
    const auto random = make_chunking("random", p);
    for (const std::int64_t n : {1, 2, 3, 7, 8, 9, 31, 64}) {
      for (std::int64_t step = 0; step < 20; ++step) {
        const Ends ends = ends_of(*random, {.length = n, .step = step});
        EXPECT_EQ(static_cast<std::int64_t>(ends.size()), std::max<std::int64_t>(n / p, 1)) << "n " << n << ", P " << p;
        EXPECT_EQ(ends.back(), n - 1);
        EXPECT_TRUE(std::adjacent_find(ends.begin(), ends.end(), std::greater_equal<>()) == ends.end()) << "n " << n;
        EXPECT_GE(ends.front(), 0);
      }
    }
  }
}

TEST(RandomChunking, DrawsUniformly) {
  // n - 1 = 33 positions, floor(34/4) - 1 = 7 of them per draw. Each position is chosen with probability 7/33; the counts of
  // distinct positions have covariance such that sum (count - mean)^2 / (mean (1 - 7/33) 33/32) is chi-square with 32 degrees
  // of freedom, which exceeds 62.5 once in a thousand.
  constexpr std::int64_t kLength = 34, kPositions = 33, kDraws = 20000;
  const auto random = make_chunking("random", 4);
  std::vector<double> counts(kPositions);
  std::map<std::pair<int, int>, double> pairs;
  for (std::int64_t draw = 0; draw < kDraws; ++draw) {
    const Ends ends =
        ends_of(*random, {.length = kLength, .layer = draw % 5, .seed = 17, .step = draw / 5 % 100, .sample = draw});
    for (std::size_t i = 0; i + 1 < ends.size(); ++i) {
      counts[static_cast<std::size_t>(ends[i])] += 1;
      for (std::size_t j = 0; j < i; ++j) {
        pairs[{ends[j], ends[i]}] += 1;
      }
    }
  }
  const double share = 7.0 / 33, mean = kDraws * share;
  double statistic = 0;
  for (const double count : counts) {
    statistic += (count - mean) * (count - mean);
  }
  statistic /= mean * (1 - share) * kPositions / (kPositions - 1);
  EXPECT_LT(statistic, 62.5);
  EXPECT_GT(statistic, 12.0) << "more even than chance (once in a thousand)";

  // Any two positions occur together with probability (7/33)(6/32): no preference for neighbours.
  const double together = kDraws * share * 6 / 32;
  EXPECT_EQ(pairs.size(), 33u * 32 / 2);
  for (const auto& [pair, count] : pairs) {
    EXPECT_NEAR(count, together, 5 * std::sqrt(together)) << pair.first << " and " << pair.second;
  }
}

TEST(RandomChunking, IsFreshPerStepLayerSampleDocumentAndSeed) {
  const auto random = make_chunking("random", 4);
  std::set<Ends> drawn;
  std::size_t requests = 0;
  const auto draw = [&](const ChunkRequest& request) {
    const Ends ends = ends_of(*random, request);
    EXPECT_EQ(ends, ends_of(*random, request)) << "a pure function of the request";
    drawn.insert(ends);
    ++requests;
  };
  for (std::int64_t i = 0; i < 64; ++i) {
    draw({.length = 256, .layer = i});
    draw({.length = 256, .step = i + 1});
    draw({.length = 256, .sample = i + 1});
    draw({.length = 256, .document = i + 1});
    draw({.length = 256, .seed = static_cast<std::uint64_t>(i + 1)});
  }
  EXPECT_EQ(drawn.size(), requests);
}

TEST(RandomChunking, IsNotSharedBetweenStepsAndSamplesThatSumAlike) {
  const auto random = make_chunking("random", 4);
  for (std::int64_t a = 0; a < 8; ++a) {
    for (std::int64_t b = 0; b < a; ++b) {
      EXPECT_NE(ends_of(*random, {.length = 128, .step = a, .sample = b}),
                ends_of(*random, {.length = 128, .step = b, .sample = a}));
      EXPECT_NE(ends_of(*random, {.length = 128, .layer = a, .step = b}),
                ends_of(*random, {.length = 128, .layer = b, .step = a}));
    }
  }
}

// ---------------------------------------------------------------------------------------------- explicit

TEST(ExplicitChunking, GivesEachLayerItsList) {
  const std::vector<Ends> lists{{2, 5, 9}, {9}, {0, 1, 9}};
  const auto strategy = make_explicit_chunking(lists, 10);
  for (std::size_t l = 0; l < lists.size(); ++l) {
    EXPECT_EQ(ends_of(*strategy, {.length = 10, .layer = static_cast<std::int64_t>(l)}), lists[l]);
  }
}

struct BadList {
  const char* name;
  std::vector<Ends> lists;
  const char* message;
};

class BadExplicitLists : public testing::TestWithParam<BadList> {};

TEST_P(BadExplicitLists, AreRefusedWithTheLayerAndTheValue) {
  try {
    make_explicit_chunking(GetParam().lists, 10);
    FAIL() << "accepted";
  } catch (const UsageError& error) {
    EXPECT_THAT(error.what(), testing::AllOf(testing::HasSubstr("layer 1"), testing::HasSubstr(GetParam().message)));
  }
}

INSTANTIATE_TEST_SUITE_P(Lists, BadExplicitLists,
                         testing::Values(BadList{"unsorted", {{9}, {5, 2, 9}}, "5 before 2"},
                                         BadList{"repeated", {{9}, {2, 2, 9}}, "stands there twice"},
                                         BadList{"beyond_n", {{9}, {2, 10}}, "10"}, BadList{"negative", {{9}, {-1, 9}}, "-1"},
                                         BadList{"without_the_last", {{9}, {2, 8}}, "n - 1 = 9"},
                                         BadList{"empty", {{9}, {}}, "no chunk ends"}),
                         [](const auto& test) { return std::string(test.param.name); });

TEST(ExplicitChunking, RefusesLayersAndLengthsItHasNoListFor) {
  const auto strategy = make_explicit_chunking({{2, 9}}, 10);
  Ends ends;
  EXPECT_THROW(strategy->ends({.length = 10, .layer = 1}, ends), UsageError);
  EXPECT_THROW(strategy->ends({.length = 7, .layer = 0}, ends), UsageError);
}

// ---------------------------------------------------------------------------------------------- explicit ends from a file

class EndsFile : public testing::Test {
 protected:
  std::unique_ptr<ChunkingStrategy> read(const std::string& text) const {
    std::ofstream(file_) << text;
    return read_explicit_chunking(file_, 3, 10);
  }
  std::string refusal(const std::string& text) const {
    try {
      read(text);
      return "accepted";
    } catch (const UsageError& error) {
      EXPECT_THAT(error.what(), testing::StartsWith(file_.string() + ": "));
      EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
      return error.what();
    }
  }
  Ends layer(const ChunkingStrategy& strategy, std::int64_t l) const { return ends_of(strategy, {.length = 10, .layer = l}); }

  TemporaryFolder folder_;
  const std::filesystem::path file_ = folder_ / "ends.txt";
};

TEST_F(EndsFile, HoldsOneListForAllLayersOrOnePerLayer) {
  const auto shared = read("# of every layer\n\n 1, 5,9  # the last position\n");
  for (const std::int64_t l : {0, 1, 2}) {
    EXPECT_EQ(layer(*shared, l), (Ends{1, 5, 9})) << l;
    EXPECT_EQ(shared->layer_class(l), 0);
  }
  const auto own = read("1 5 9\r\n0\t2 9\r\n1 5 9");
  EXPECT_EQ(layer(*own, 0), (Ends{1, 5, 9}));
  EXPECT_EQ(layer(*own, 1), (Ends{0, 2, 9}));
  EXPECT_EQ(layer(*own, 2), (Ends{1, 5, 9}));
  EXPECT_EQ(own->layer_class(1), 1);
  EXPECT_EQ(own->layer_class(2), 0) << "layers of equal ends share a table";
}

TEST_F(EndsFile, MistakesAreNamedWithFileLayerAndValue) {
  using testing::AllOf, testing::HasSubstr;
  const std::string good = "4 9\n";
  EXPECT_THAT(refusal(good + "5 4 9\n4 9"), AllOf(HasSubstr("layer 1"), HasSubstr("5 before 4"), HasSubstr("increasing")));
  EXPECT_THAT(refusal(good + good + "4 4 9"), AllOf(HasSubstr("layer 2"), HasSubstr("chunk end 4"), HasSubstr("once")));
  EXPECT_THAT(refusal("-1 9"), AllOf(HasSubstr("layer 0"), HasSubstr("chunk end -1"), HasSubstr("from 0 to 9")));
  EXPECT_THAT(refusal("4 10"), AllOf(HasSubstr("layer 0"), HasSubstr("chunk end 10"), HasSubstr("from 0 to 9")));
  EXPECT_THAT(refusal("4 99999999999"), AllOf(HasSubstr("chunk end 99999999999"), HasSubstr("from 0 to 9")));
  EXPECT_THAT(refusal("4 8"), AllOf(HasSubstr("layer 0"), HasSubstr("is 8"), HasSubstr("n - 1 = 9")));
  EXPECT_THAT(refusal(good + "4 x9\n"), AllOf(HasSubstr("layer 1"), HasSubstr("\"x9\""), HasSubstr("whole numbers")));
  EXPECT_THAT(refusal("4.5 9"), AllOf(HasSubstr("\"4.5\""), HasSubstr("whole numbers")));
  EXPECT_THAT(refusal(good + good), AllOf(HasSubstr("2 lists"), HasSubstr("model.n_layers = 3")));
  EXPECT_THAT(refusal(good + good + good + good), HasSubstr("4 lists"));
  EXPECT_THAT(refusal("# nothing\n"), HasSubstr("holds no chunk ends"));
  std::filesystem::remove(file_);
  for (const std::filesystem::path& wrong : {file_, folder_.path()}) {
    try {
      read_explicit_chunking(wrong, 3, 10);
      ADD_FAILURE() << wrong << " was accepted";
    } catch (const UsageError& error) {
      EXPECT_THAT(error.what(), AllOf(HasSubstr(wrong.string()), HasSubstr("cannot read"), HasSubstr("ends_file")));
    }
  }
}

}  // namespace
}  // namespace attamba
