#include "src/core/names.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace attamba {
namespace {

using testing::HasSubstr;

TEST(EditDistance, CountsInsertionsDeletionsSubstitutionsAndSwaps) {
  EXPECT_EQ(edit_distance("", ""), 0u);
  EXPECT_EQ(edit_distance("", "abc"), 3u);
  EXPECT_EQ(edit_distance("abc", ""), 3u);
  EXPECT_EQ(edit_distance("kitten", "sitting"), 3u);
  EXPECT_EQ(edit_distance("dmi", "dim"), 1u);
  EXPECT_EQ(edit_distance("wramup", "warmup"), 1u);
  EXPECT_EQ(edit_distance("abcd", "badc"), 2u);
}

TEST(NearestName, FindsWhatWasMeant) {
  const std::vector<std::string_view> known = {"micro_batch", "global_batch", "steps", "seed", "optim.lr"};
  EXPECT_EQ(nearest_name("step", known), "steps");
  EXPECT_EQ(nearest_name("sede", known), "seed");
  EXPECT_EQ(nearest_name("micro", known), "micro_batch");
  EXPECT_EQ(nearest_name("globalbatch", known), "global_batch");
  EXPECT_EQ(nearest_name("lr", known), "optim.lr");
}

TEST(NearestName, SaysNothingWhenNothingIsNear) {
  const std::vector<std::string_view> known = {"lr", "eps", "warmup"};
  EXPECT_EQ(nearest_name("chunking_strategy", known), "");
  EXPECT_EQ(nearest_name("q", known), "");
  EXPECT_EQ(nearest_name("", known), "");
  EXPECT_EQ(nearest_name("lr", {}), "");
}

TEST(RequireKnown, NamesKeyValueNearestAndAll) {
  EXPECT_NO_THROW(require_known("model.kind", "hawk", {"attamba", "hawk"}));
  try {
    require_known("model.kind", "atamba", {"attamba", "hawk"});
    FAIL() << "an unknown name passed";
  } catch (const UsageError& error) {
    EXPECT_THAT(error.what(), HasSubstr("model.kind = \"atamba\""));
    EXPECT_THAT(error.what(), HasSubstr("did you mean \"attamba\"?"));
    EXPECT_THAT(error.what(), HasSubstr("attamba, hawk"));
  }
}

}  // namespace
}  // namespace attamba
