// Chunk tables against the mask of docs/model.md, written down pair by pair.
#include "src/chunking/table.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "src/core/error.h"
#include "src/core/random.h"

namespace attamba {
namespace {

/// A table with memory of its own, filled with a value that no entry may keep by accident.
struct OwnedTable {
  explicit OwnedTable(std::int64_t rows) : memory(static_cast<std::size_t>(6 * rows), -12345) {
    const auto part = [&](std::size_t i) {
      return std::span(memory).subspan(i * static_cast<std::size_t>(rows), static_cast<std::size_t>(rows));
    };
    table = {.ends = part(0),
             .key_begin = part(1),
             .key_end = part(2),
             .local_begin = part(3),
             .starts = part(4),
             .labels = part(5)};
  }
  std::vector<std::int32_t> memory;
  ChunkTable table;
};

/// The keys that row t sees by the table, with repetitions.
std::vector<std::int64_t> seen(const ChunkTable& table, std::int64_t t) {
  const auto at = static_cast<std::size_t>(t);
  std::vector<std::int64_t> keys;
  for (std::int32_t j = table.key_begin[at]; j < table.key_end[at]; ++j) {
    keys.push_back(table.ends[static_cast<std::size_t>(j)]);
  }
  for (std::int64_t k = table.local_begin[at]; k <= t; ++k) {
    keys.push_back(k);
  }
  return keys;
}

/// Row at which the document of row t starts.
std::int64_t document_start(const BatchLayout& layout, std::int64_t t) {
  const std::int64_t first = t / layout.length * layout.length;
  return first + (layout.document_starts.empty() ? 0 : layout.document_starts[static_cast<std::size_t>(t)]);
}

struct Geometry {
  std::vector<bool> is_end;          ///< by row
  std::vector<std::int64_t> starts;  ///< by row: where its chunk begins
};

/// Chunk ends by asking the strategy for each document, chunk starts by walking back from each row.
Geometry walk(const ChunkingStrategy& strategy, std::int64_t layer, const BatchLayout& layout) {
  const std::int64_t rows = layout.sequences * layout.length;
  Geometry g{.is_end = std::vector<bool>(static_cast<std::size_t>(rows)), .starts = {}};
  for (std::int64_t s = 0; s < layout.sequences; ++s) {
    std::int64_t document = 0;
    for (std::int64_t begin = s * layout.length; begin < (s + 1) * layout.length; ++document) {
      std::int64_t end = begin;
      while (end < (s + 1) * layout.length && document_start(layout, end) == begin) {
        ++end;
      }
      std::vector<std::int32_t> ends;
      strategy.ends({.length = end - begin,
                     .layer = layer,
                     .seed = layout.seed,
                     .step = layout.step,
                     .sample = layout.samples.empty() ? s : layout.samples[static_cast<std::size_t>(s)],
                     .document = document},
                    ends);
      for (const std::int32_t e : ends) {
        g.is_end[static_cast<std::size_t>(begin + e)] = true;
      }
      begin = end;
    }
  }
  for (std::int64_t t = 0; t < rows; ++t) {
    std::int64_t start = t;
    while (start > document_start(layout, t) && !g.is_end[static_cast<std::size_t>(start - 1)]) {
      --start;
    }
    g.starts.push_back(start);
  }
  return g;
}

void expect_mask_of_the_specification(const ChunkTable& table, const ChunkingStrategy& strategy, std::int64_t layer,
                                      std::int64_t leading, const BatchLayout& layout) {
  const Geometry g = walk(strategy, layer, layout);
  double total = 0;
  for (std::int64_t t = 0; t < layout.sequences * layout.length; ++t) {
    const auto at = static_cast<std::size_t>(t);
    std::vector<std::int64_t> expected;
    for (std::int64_t j = document_start(layout, t); j <= t; ++j) {
      const bool in_window = leading >= 1 ? j > t - leading : g.starts[static_cast<std::size_t>(j)] == g.starts[at];
      if (g.is_end[static_cast<std::size_t>(j)] || in_window || strategy.full_attention()) {
        expected.push_back(j);
      }
    }
    std::vector<std::int64_t> keys = seen(table, t);
    std::sort(keys.begin(), keys.end());
    ASSERT_EQ(keys, expected) << "row " << t << " (a key that is both an end and recent counts once)";
    EXPECT_EQ(table.starts[at], g.starts[at]) << "row " << t;
    EXPECT_EQ(table.labels[at], t - g.starts[at]) << "row " << t;
    total += static_cast<double>(keys.size());
    // What kernels rely on: nothing decreases inside a sequence.
    if (t % layout.length != 0) {
      EXPECT_GE(table.key_begin[at], table.key_begin[at - 1]);
      EXPECT_GE(table.key_end[at], table.key_end[at - 1]);
      EXPECT_GE(table.local_begin[at], table.local_begin[at - 1]);
    }
  }
  EXPECT_DOUBLE_EQ(average_keys(table), total / static_cast<double>(layout.sequences * layout.length));
}

/// Random documents for every sequence; the first may have begun before the window.
std::vector<std::int32_t> random_documents(RandomStream& random, std::int64_t sequences, std::int64_t n) {
  std::vector<std::int32_t> starts;
  for (std::int64_t s = 0; s < sequences; ++s) {
    std::int32_t start = 0;
    for (std::int64_t t = 0; t < n; ++t) {
      if (t > 0 && random.below(5) == 0) {
        start = static_cast<std::int32_t>(t);
      }
      starts.push_back(start);
    }
  }
  return starts;
}

class ChunkTables : public testing::TestWithParam<const char*> {};

TEST_P(ChunkTables, AreTheMaskOfTheSpecification) {
  RandomStream random(5);
  for (int trial = 0; trial < 60; ++trial) {
    const std::int64_t n = 1 + static_cast<std::int64_t>(random.below(40)), sequences = 1 + trial % 3;
    const std::int64_t size = 1 + static_cast<std::int64_t>(random.below(9));
    const auto strategy = make_chunking(GetParam(), size);
    const std::vector<std::int32_t> documents = random_documents(random, sequences, n);
    const std::vector<std::int64_t> samples{900, 3, 77};
    for (const bool packed : {false, true}) {
      for (const std::int64_t leading : {std::int64_t{0}, std::int64_t{1}, std::int64_t{3}, n + 5}) {
        const BatchLayout layout{.sequences = sequences,
                                 .length = n,
                                 .document_starts = packed ? std::span(documents) : std::span<const std::int32_t>{},
                                 .samples = trial % 2 == 0 ? std::span<const std::int64_t>{} : std::span(samples),
                                 .seed = 8,
                                 .step = trial};
        OwnedTable owned(sequences * n);
        fill_chunk_table(owned.table, *strategy, trial % 4, leading, layout);
        SCOPED_TRACE(testing::Message() << "n " << n << ", P " << size << ", L " << leading << (packed ? ", packed" : ""));
        expect_mask_of_the_specification(owned.table, *strategy, trial % 4, leading, layout);
        if (HasFatalFailure()) {
          return;
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Strategies, ChunkTables, testing::Values("uniform", "cyclic", "random", "none"),
                         [](const auto& test) { return std::string(test.param); });

TEST(ChunkTable, OfExplicitEnds) {
  const auto strategy = make_explicit_chunking({{0, 1, 5, 6, 11}, {11}}, 12);
  for (std::int64_t layer = 0; layer < 2; ++layer) {
    for (const std::int64_t leading : {0, 1, 3, 20}) {
      OwnedTable owned(24);
      const BatchLayout layout{.sequences = 2, .length = 12};
      fill_chunk_table(owned.table, *strategy, layer, leading, layout);
      expect_mask_of_the_specification(owned.table, *strategy, layer, leading, layout);
    }
  }
}

TEST(ChunkTable, OfReleasedEnds) {
  for (const char* name : {"uniform", "cyclic", "none"}) {
    const auto strategy = make_released_chunking(name, 6, 3);
    for (std::int64_t layer = 0; layer < 3; ++layer) {
      for (const std::int64_t leading : {1, 4, 20}) {
        OwnedTable owned(48);
        const BatchLayout layout{.sequences = 2, .length = 24};
        fill_chunk_table(owned.table, *strategy, layer, leading, layout);
        expect_mask_of_the_specification(owned.table, *strategy, layer, leading, layout);
      }
    }
  }
}

TEST(ChunkTable, ChunksOfOneTokenAreDenseAttention) {
  const auto strategy = make_chunking("uniform", 1);
  OwnedTable owned(9);
  fill_chunk_table(owned.table, *strategy, 0, 1, {.sequences = 1, .length = 9});
  for (std::int64_t t = 0; t < 9; ++t) {
    EXPECT_EQ(seen(owned.table, t).size(), static_cast<std::size_t>(t + 1));
  }
}

TEST(ChunkTable, OfASampleDoNotDependOnItsPlaceInTheBatch) {
  const auto strategy = make_chunking("random", 4);
  constexpr std::int64_t kLength = 32;
  const auto masks = [&](const std::vector<std::int64_t>& samples) {
    OwnedTable owned(kLength * static_cast<std::int64_t>(samples.size()));
    fill_chunk_table(
        owned.table, *strategy, 2, 3,
        {.sequences = static_cast<std::int64_t>(samples.size()), .length = kLength, .samples = samples, .seed = 1, .step = 9});
    std::vector<std::vector<std::int64_t>> by_row;  // keys as positions in their sequence
    for (std::int64_t t = 0; t < kLength * static_cast<std::int64_t>(samples.size()); ++t) {
      std::vector<std::int64_t> keys = seen(owned.table, t);
      for (std::int64_t& key : keys) {
        key -= t / kLength * kLength;
      }
      by_row.push_back(keys);
    }
    return by_row;
  };
  const auto together = masks({100, 7, 55});
  const auto alone = masks({55}), swapped = masks({55, 100});
  EXPECT_TRUE(std::equal(alone.begin(), alone.end(), together.begin() + 2 * kLength));
  EXPECT_TRUE(std::equal(alone.begin(), alone.end(), swapped.begin()));
  EXPECT_TRUE(std::equal(together.begin(), together.begin() + kLength, swapped.begin() + kLength));
  EXPECT_FALSE(std::equal(alone.begin(), alone.end(), together.begin()));
}

TEST(CausalTables, SeeEveryEarlierTokenOfTheDocumentOrAWindow) {
  RandomStream random(6);
  for (int trial = 0; trial < 40; ++trial) {
    const std::int64_t n = 1 + static_cast<std::int64_t>(random.below(30)), sequences = 1 + trial % 3;
    const std::vector<std::int32_t> documents = random_documents(random, sequences, n);
    for (const bool packed : {false, true}) {
      for (const std::int64_t window : {std::int64_t{0}, std::int64_t{1}, std::int64_t{4}, n + 3}) {
        const BatchLayout layout{.sequences = sequences,
                                 .length = n,
                                 .document_starts = packed ? std::span(documents) : std::span<const std::int32_t>{}};
        OwnedTable owned(sequences * n);
        fill_causal_table(owned.table, window, layout);
        for (std::int64_t t = 0; t < sequences * n; ++t) {
          std::vector<std::int64_t> expected;
          for (std::int64_t j = document_start(layout, t); j <= t; ++j) {
            if (window == 0 || j > t - window) {
              expected.push_back(j);
            }
          }
          ASSERT_EQ(seen(owned.table, t), expected) << "row " << t << ", window " << window;
          ASSERT_EQ(owned.table.starts[static_cast<std::size_t>(t)], document_start(layout, t)) << "row " << t;
        }
      }
    }
  }
}

TEST(ChunkTable, NegativeLeadingTokensAreTheUsersMistake) {
  const auto strategy = make_chunking("uniform", 4);
  OwnedTable owned(8);
  EXPECT_THROW(fill_chunk_table(owned.table, *strategy, 0, -1, {.sequences = 1, .length = 8}), UsageError);
}

}  // namespace
}  // namespace attamba
