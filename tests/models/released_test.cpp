// Released semantics (docs/model.md): what a batch's tables say, and that such a model learns.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "tests/models/tiny_config.h"
#include "tests/models/tiny_model.h"

namespace attamba::testing_support {
namespace {

using Numbers = std::vector<std::int32_t>;

ModelConfig released(std::int64_t layers, std::int64_t size, std::int64_t leading) {
  ModelConfig c = tiny_config("attamba");
  c.semantics = "released";
  c.n_layers = layers;
  c.chunking.size = size;
  c.chunking.leading_tokens = leading;
  return c;
}

/// The leaves of one batch shape, filled.
struct Tables {
  Tables(const ModelConfig& config, std::int64_t sequences, std::int64_t n)
      : chunking(make_model_chunking(config, n)),
        writer(storage, config, chunking.get(), sequences, n, DType::float32),
        length(n) {}
  Numbers leaf(std::int64_t layer, const std::string& part) const {
    const auto values = storage.find(table_name(chunking.get(), layer) + part).span<std::int32_t>();
    return Numbers(values.begin(), values.end());
  }
  /// The keys that row t of a layer sees, sorted.
  Numbers keys(std::int64_t layer, std::int32_t t) const {
    const auto at = static_cast<std::size_t>(t);
    const Numbers ends = leaf(layer, ".ends");
    Numbers seen;
    for (std::int32_t j = leaf(layer, ".key_begin")[at]; j < leaf(layer, ".key_end")[at]; ++j) {
      seen.push_back(ends[static_cast<std::size_t>(j)]);
    }
    for (std::int32_t k = leaf(layer, ".local_begin")[at]; k <= t; ++k) {
      seen.push_back(k);
    }
    return seen;
  }

  std::unique_ptr<ChunkingStrategy> chunking;
  Storage storage;
  BatchWriter writer;
  std::int64_t length;
};

TEST(ReleasedTables, LabelsArePositionsInChunks) {
  const Tables tables(released(2, 4, 3), 2, 12);  // boundaries move by 2 from layer to layer
  EXPECT_EQ(tables.leaf(0, ".labels"), (Numbers{0, 0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 0, 0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3}));
  EXPECT_EQ(tables.leaf(1, ".labels"), (Numbers{0, 0, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 0, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5}));
}

TEST(ReleasedTables, TheWindowHasOneTokenMoreAndPositionZeroIsSeen) {
  for (const std::int64_t leading : {1, 3}) {
    const Tables tables(released(2, 4, leading), 2, 24);
    for (std::int64_t layer = 0; layer < 2; ++layer) {
      for (std::int32_t row = 0; row < 48; ++row) {
        const std::int32_t first = row / 24 * 24, t = row - first;
        Numbers expected;
        for (std::int32_t k = 0; k <= t; ++k) {
          const bool end = k == 0 || (k + 1 + 2 * layer) % 4 == 0;
          const bool listed_last = k > 23 - 4 && end;  // it was moved to position 23
          if (k >= t - leading || (end && !listed_last)) {
            expected.push_back(first + k);
          }
        }
        EXPECT_EQ(tables.keys(layer, row), expected) << "L " << leading << ", layer " << layer << ", row " << row;
      }
    }
  }
}

TEST(ReleasedTables, WithoutLeadingTokensTheWindowIsTheOwnChunk) {
  const Tables tables(released(2, 4, 0), 1, 12);
  EXPECT_EQ(tables.keys(1, 0), (Numbers{0}));
  EXPECT_EQ(tables.keys(1, 4), (Numbers{0, 1, 2, 3, 4}));
  EXPECT_EQ(tables.keys(1, 8), (Numbers{0, 1, 5, 6, 7, 8}));
  EXPECT_EQ(tables.keys(1, 11), (Numbers{0, 1, 5, 6, 7, 8, 9, 10, 11}));
}

TEST(ReleasedTables, PaperSemanticsHaveNoLabels) {
  ModelConfig config = released(2, 4, 3);
  config.semantics = "paper";
  const Tables tables(config, 1, 12);
  EXPECT_FALSE(tables.storage.contains("chunks.0.labels"));
}

/// Plain gradient descent on one batch.
TEST(ReleasedModel, Learns) {
  for (const char* strategy : {"cyclic", "uniform", "none"}) {
    ModelConfig config = released(2, 4, 3);
    config.chunking.strategy = strategy;
    TinyModel model(config, {.dtype = DType::float32, .batch = {.sequences = 4, .length = 40}});
    model.run();
    const double before = model.mean_loss();
    for (int step = 0; step < 60; ++step) {
      for (const ParameterInfo& parameter : model.parameters()) {
        const std::vector<double> gradient = model.gradient(parameter.name);
        const auto weights = model.weight(parameter.name).span<float>();
        for (std::size_t i = 0; i < gradient.size(); ++i) {
          weights[i] -= static_cast<float>(0.5 * gradient[i]);
        }
      }
      model.run();
    }
    EXPECT_LT(model.mean_loss(), before - 1) << strategy;
  }
}

TEST(ReleasedModel, ComputesSomethingElseThanThePaper) {
  ModelConfig config = released(2, 4, 3), paper = config;
  paper.semantics = "paper";
  TinyModel a(config, {}), b(paper, {});
  a.run();
  b.run();
  EXPECT_NE(a.mean_loss(), b.mean_loss());
}

/// States pass between rows, so what else is in a micro-batch matters.
TEST(ReleasedModel, ResultsDependOnTheMicroBatch) {
  TinyModel model(released(2, 4, 3), {.dtype = DType::float32});
  const std::vector<std::int32_t> windows = model.random_windows(4);
  model.write(windows);
  model.run();
  const std::vector<double> before = model.losses();
  std::vector<std::int32_t> other = windows;
  other[5] = (other[5] + 1) % 29;  // of the first sequence
  model.write(other);
  model.run();
  const std::vector<double> after = model.losses();
  EXPECT_FALSE(std::equal(before.begin() + 11, before.end(), after.begin() + 11));
}

}  // namespace
}  // namespace attamba::testing_support
