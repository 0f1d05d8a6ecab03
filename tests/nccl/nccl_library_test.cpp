#include "comm/nccl/nccl_library.h"

#include <gtest/gtest.h>

#include "src/core/error.h"

namespace attamba {
namespace {

TEST(NcclLibrary, AnInstalledOneHasEverythingAndIsOfTheMajorVersionBuiltWith) {
  int version = 0;
  try {
    ASSERT_EQ(nccl_library().get_version(&version), ncclSuccess);
  } catch (const UsageError& error) {
    GTEST_SKIP() << error.what();
  }
  EXPECT_EQ(version / 10000, NCCL_MAJOR);
}

}  // namespace
}  // namespace attamba
