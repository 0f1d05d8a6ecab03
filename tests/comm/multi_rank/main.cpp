// GoogleTest's main for programs of several ranks: all ranks run the same tests, rank 0 reports everything, the others only
// their failures.
#include <gtest/gtest.h>

#include <cstdlib>
#include <iostream>

#include "tests/comm/multi_rank/world.h"

namespace attamba {
namespace {

std::unique_ptr<Communicator>& communicator() {
  static std::unique_ptr<Communicator> instance;
  return instance;
}

class FailuresOnly : public testing::EmptyTestEventListener {
  void OnTestPartResult(const testing::TestPartResult& result) override {
    if (result.failed()) {
      std::cerr << "rank " << world().rank() << ": " << (result.file_name() ? result.file_name() : "?") << ':'
                << result.line_number() << ": " << result.summary() << '\n';
    }
  }
};

/// ATTAMBA_TEST_RANKS holds the number of ranks that the test was registered with.
bool has_expected_size() {
  const char* expected = std::getenv("ATTAMBA_TEST_RANKS");
  if (expected == nullptr || std::atoi(expected) == world().size()) {
    return true;
  }
  std::cerr << "expected " << expected << " ranks, got " << world().size()
            << ": was this program started by the right mpirun?\n";
  return false;
}

}  // namespace

Communicator& world() {
  return *communicator();
}

}  // namespace attamba

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  attamba::communicator() = attamba::make_communicator();
  if (!attamba::has_expected_size()) {
    attamba::world().abort(1);
  }
  if (attamba::world().rank() != 0) {
    auto& listeners = testing::UnitTest::GetInstance()->listeners();
    delete listeners.Release(listeners.default_result_printer());
    listeners.Append(new attamba::FailuresOnly);
  }
  const int result = RUN_ALL_TESTS();
  attamba::communicator().reset();
  return result;
}
