// Writes a record of each test's launches where the environment asks for it. Tests that a process runs one after another have
// each other's launches in their records, too.
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <set>

#include "tests/simt/coverage/records.h"
#include "tests/simt/coverage/symbols.h"
#include "tests/simt/emulator.h"

namespace attamba::simt {
namespace {

class Recorder final : public testing::EmptyTestEventListener {
 public:
  explicit Recorder(std::filesystem::path folder) : folder_(std::move(folder)) {}

  void OnTestEnd(const testing::TestInfo& test) override {
    std::set<const void*> kernels;
    for (const auto& [shape, count] : launches()) {
      kernels.insert(shape.kernel);
    }
    const auto names = kernels.empty() ? std::map<const void*, std::string>() : symbol_names(kernels);
    std::filesystem::create_directories(folder_);
    const auto path = record_file(folder_, test.test_suite_name(), test.name());
    std::ofstream file(path);
    for (const auto& [shape, count] : launches()) {
      file << LaunchRecord{names.at(shape.kernel), shape.x, shape.y, shape.z, shape.threads, shape.shared_bytes, count} << '\n';
    }
    if (!file.flush()) {
      ADD_FAILURE() << "could not write " << path;
    }
  }

 private:
  std::filesystem::path folder_;
};

[[maybe_unused]] const bool kListens = [] {
  const char* const folder = std::getenv(kRecordsVariable);
  if (folder != nullptr) {
    testing::UnitTest::GetInstance()->listeners().Append(new Recorder(folder));
  }
  return folder != nullptr;
}();

}  // namespace
}  // namespace attamba::simt
