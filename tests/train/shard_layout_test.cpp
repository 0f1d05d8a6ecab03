// Ownership: every element of every parameter has one owner, whatever the number of ranks.
#include "src/train/shard_layout.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>

namespace attamba {
namespace {

std::vector<ParameterInfo> parameters() {
  std::vector<ParameterInfo> all{{"tok_embeddings.weight", {50, 24}}};
  for (int layer = 0; layer < 3; ++layer) {
    const std::string prefix = concat("layers.", layer, ".");
    all.push_back({prefix + "attention_norm.weight", {24}});
    all.push_back({prefix + "attention.wq.weight", {24, 24}});
    all.push_back({prefix + "attention.k_ssm.A_log", {3}});
    all.push_back({prefix + "feed_forward.w1.weight", {37, 24}});
  }
  all.push_back({"norm.weight", {24}});
  all.push_back({"output.weight", {50, 24}});
  return all;
}

std::vector<DType> types(const std::vector<ParameterInfo>& parameters, DType matrices) {
  std::vector<DType> dtypes;
  for (const ParameterInfo& p : parameters) {
    dtypes.push_back(p.shape.rank() < 2 ? DType::float32 : matrices);
  }
  return dtypes;
}

class Layouts : public testing::TestWithParam<std::tuple<int, DType, bool, std::size_t>> {
 protected:
  const std::vector<ParameterInfo> all_ = parameters();
  ShardLayout layout() const {
    const auto [ranks, dtype, by_block, bucket_bytes] = GetParam();
    return {all_, types(all_, dtype), {.ranks = ranks, .bucket_bytes = bucket_bytes, .width = 4, .by_block = by_block}};
  }
};
INSTANTIATE_TEST_SUITE_P(All, Layouts,
                         testing::Combine(testing::Values(1, 2, 3, 4, 7, 64), testing::Values(DType::float32, DType::bfloat16),
                                          testing::Bool(), testing::Values<std::size_t>(1, 4000, 1 << 20)));

TEST_P(Layouts, EveryElementHasOneOwner) {
  const ShardLayout shards = layout();
  std::map<std::size_t, std::vector<int>> owners;
  for (std::size_t p = 0; p < all_.size(); ++p) {
    owners[p].resize(static_cast<std::size_t>(all_[p].shape.elements()));
  }
  for (int rank = 0; rank < shards.ranks(); ++rank) {
    for (const ShardLayout::Slice& slice : shards.slices(rank)) {
      EXPECT_LE(slice.at + slice.elements(), shards.buckets()[slice.bucket].part);
      for (std::int64_t i = slice.begin; i < slice.end; ++i) {
        ++owners[slice.parameter][static_cast<std::size_t>(i)];
      }
    }
  }
  for (const auto& [parameter, counts] : owners) {
    EXPECT_THAT(counts, testing::Each(1)) << all_[parameter].name;
  }
}

TEST_P(Layouts, PartsAreEqualAlignedAndOfOneType) {
  const ShardLayout shards = layout();
  const std::vector<DType> dtypes = types(all_, std::get<1>(GetParam()));
  for (std::size_t b = 0; b < shards.buckets().size(); ++b) {
    const ShardLayout::Bucket& bucket = shards.buckets()[b];
    EXPECT_EQ(bucket.part % ShardLayout::kAlignment, 0);
    EXPECT_EQ(bucket.total, bucket.part * shards.ranks());
    std::int64_t used = 0;
    for (const ShardLayout::Member& member : bucket.members) {
      EXPECT_EQ(member.first % ShardLayout::kAlignment, 0);
      EXPECT_GE(member.first, used) << "parameters do not overlap";
      used = member.first + member.elements;
      EXPECT_EQ(dtypes[member.parameter], bucket.dtype);
    }
    EXPECT_LE(used, bucket.total);
    EXPECT_LT(bucket.total - used, (shards.ranks() + 1) * ShardLayout::kAlignment) << "no more padding than alignment asks for";
    for (int rank = 0; rank < shards.ranks(); ++rank) {
      for (const ShardLayout::Slice& slice : shards.slices(b, rank)) {
        EXPECT_EQ(slice.at % ShardLayout::kAlignment, 0);
        EXPECT_EQ(slice.begin % ShardLayout::kAlignment, 0) << "a kernel sees the same neighbours on any number of ranks";
      }
    }
  }
}

TEST(ShardLayout, BucketsFollowTheBackwardPass) {
  const auto all = parameters();
  const ShardLayout one(all, types(all, DType::float32), {.ranks = 2, .bucket_bytes = 1});
  ASSERT_EQ(one.buckets().size(), all.size());
  EXPECT_EQ(all[one.buckets().front().members[0].parameter].name, "output.weight");
  EXPECT_EQ(all[one.buckets().back().members[0].parameter].name, "tok_embeddings.weight");

  const ShardLayout blocks(all, types(all, DType::float32), {.ranks = 2, .bucket_bytes = 1, .by_block = true});
  ASSERT_EQ(blocks.buckets().size(), 5u) << "head, three blocks, embedding";
  EXPECT_EQ(blocks.buckets()[1].members.size(), 4u);
  EXPECT_EQ(all[blocks.buckets()[1].members[0].parameter].name, "layers.2.feed_forward.w1.weight");

  const ShardLayout mixed(all, types(all, DType::bfloat16), {.ranks = 2, .bucket_bytes = 1 << 20, .by_block = true});
  std::int64_t spread = 0;
  for (const ShardLayout::Bucket& bucket : mixed.buckets()) {
    EXPECT_EQ(bucket.spread, bucket.dtype == DType::float32);
    spread += bucket.spread ? 1 : 0;
  }
  EXPECT_EQ(spread, 1) << "vectors of all blocks together";
  EXPECT_EQ(mixed.buckets().size(), 6u);
}

}  // namespace
}  // namespace attamba
