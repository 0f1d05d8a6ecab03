// Checks of the GPU's kernels as they are in the built program, and tables of what they need and which of them tests launch.
//
//   kernel_report resources PROGRAM
//   kernel_report instances PROGRAM RECORDS TEST_PROGRAM
//
// `resources` prints registers, their budget and threads of each kernel, and fails where a budget is broken. `instances` fails
// where an instance of a kernel was launched by no test: RECORDS is the folder in which the tests of TEST_PROGRAM noted their
// launches. As long as tests that could have launched it have not run, it has nothing to say, which is exit code 77.
#include <algorithm>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iomanip>
#include <iostream>
#include <memory>
#include <set>
#include <span>

#include "src/core/error.h"
#include "tests/cuda/kernel_checks.h"

namespace attamba {
namespace {

namespace fs = std::filesystem;

constexpr int kPassed = 0, kFailed = 1, kSkipped = 77;

int report(const std::vector<std::string>& complaints) {
  for (const std::string& complaint : complaints) {
    std::cout << complaint << '\n';
  }
  return complaints.empty() ? kPassed : kFailed;
}

int resources(const fs::path& program) {
  const std::vector<CompiledKernel> kernels = compiled_kernels(program);
  std::map<std::string, std::map<int, const CompiledKernel*>> by_name;
  std::set<int> architectures;
  for (const CompiledKernel& kernel : kernels) {
    by_name[kernel_name(kernel.name)][kernel.architecture] = &kernel;
    architectures.insert(kernel.architecture);
  }
  std::cout << "registers, and how many the launch bounds allow, by architecture:";
  for (const int architecture : architectures) {
    std::cout << " sm_" << architecture;
  }
  std::cout << '\n';
  for (const auto& [name, compiled] : by_name) {
    std::cout << "  " << name << ", " << compiled.begin()->second->threads << " threads:";
    for (const auto& [architecture, kernel] : compiled) {
      std::cout << ' ' << kernel->registers << '/' << kernel->most_registers;
    }
    std::cout << '\n';
  }
  const std::vector<std::string> complaints = resource_complaints(kernels);
  std::cout << by_name.size() << " instances of kernels on " << architectures.size() << " architectures, " << complaints.size()
            << " beyond their budget\n";
  return report(complaints);
}

/// The files that a test program's tests leave, of all tests that are not disabled.
std::vector<fs::path> expected_records(const fs::path& folder, const std::string& test_program) {
  const std::string command = "'" + test_program + "' --gtest_list_tests";
  const std::unique_ptr<FILE, int (*)(FILE*)> pipe(popen(command.c_str(), "r"), pclose);
  require(pipe != nullptr, "could not run ", command);
  std::vector<fs::path> files;
  std::string suite;
  char buffer[4096];
  while (std::fgets(buffer, sizeof(buffer), pipe.get()) != nullptr) {
    std::string line = buffer;
    const bool is_test = line.starts_with("  ");
    line = line.substr(is_test ? 2 : 0, line.find_first_of(" \n", 2) - (is_test ? 2 : 0));
    if (!is_test) {
      suite = line.substr(0, line.rfind('.'));
    } else if (!line.starts_with("DISABLED_") && suite.find("DISABLED_") == std::string::npos) {
      files.push_back(simt::record_file(folder, suite, line));
    }
  }
  require(!files.empty(), command, " lists no tests");
  return files;
}

/// Of kernels, the instances of one template being one kernel.
void print_coverage(const std::vector<CompiledKernel>& kernels, const std::map<std::string, Coverage>& coverage) {
  struct Sum {
    std::int64_t instances = 0, launched = 0, launches = 0, shapes = 0;
    void add(const Sum& other) {
      instances += other.instances, launched += other.launched;
      launches += other.launches, shapes += other.shapes;
    }
  };
  std::set<std::string> names;
  for (const CompiledKernel& kernel : kernels) {
    names.insert(kernel_name(kernel.name));
  }
  std::map<std::string, Sum> sums;
  for (const std::string& name : names) {
    const auto found = coverage.find(name);
    const Coverage own = found == coverage.end() ? Coverage() : found->second;
    sums[name.substr(0, name.find('<'))].add({1, found != coverage.end(), own.launches, own.shapes});
  }
  std::cout << "kernel, instances, of them launched, launches, launches that differ in grid or shared memory:\n";
  Sum all;
  for (const auto& [kernel, sum] : sums) {
    std::cout << "  " << kernel << ' ' << sum.instances << ' ' << sum.launched << ' ' << sum.launches << ' ' << sum.shapes
              << '\n';
    all.add(sum);
  }
  std::cout << "kernels " << sums.size() << ", instances " << all.instances << ", of them launched " << all.launched
            << ", launches " << all.launches << ", that differ " << all.shapes << '\n';
}

int instances(const fs::path& program, const fs::path& records, const std::string& test_program) {
  const std::vector<CompiledKernel> kernels = compiled_kernels(program);
  std::vector<simt::LaunchRecord> launches;
  const std::vector<fs::path> files = expected_records(records, test_program);
  std::size_t tests_run = 0;
  for (const fs::path& path : files) {
    std::ifstream file(path);
    tests_run += file.is_open() ? 1 : 0;
    for (simt::LaunchRecord launch; file >> launch;) {
      launches.push_back(launch);
    }
  }
  const auto coverage = coverage_of(launches);
  print_coverage(kernels, coverage);
  const LaunchChecks checks = check_launches(kernels, coverage);
  report(checks.notes);
  const std::vector<std::string> missing = never_launched(kernels, coverage);
  const bool complete = tests_run == files.size();
  for (const std::string& name : missing) {
    std::cout << name << ": launched by none of the tests that have run\n";
  }
  if (report(checks.complaints) == kFailed || (!missing.empty() && complete)) {
    return kFailed;
  }
  if (!complete) {
    std::cout << "only " << tests_run << " of " << files.size() << " tests of " << fs::path(test_program).filename().string()
              << " have run since it was built; ctest -R '^simt\\.' runs them all\n";
  }
  return missing.empty() ? kPassed : kSkipped;
}

int run(std::span<const char* const> arguments) {
  if (arguments.size() == 2 && arguments[0] == std::string("resources")) {
    return resources(arguments[1]);
  }
  if (arguments.size() == 4 && arguments[0] == std::string("instances")) {
    return instances(arguments[1], arguments[2], arguments[3]);
  }
  std::cerr << "usage: kernel_report resources PROGRAM\n       kernel_report instances PROGRAM RECORDS TEST_PROGRAM\n";
  return 2;
}

}  // namespace
}  // namespace attamba

int main(int count, char** arguments) {
  try {
    return attamba::run(std::span(arguments + 1, static_cast<std::size_t>(count - 1)));
  } catch (const std::exception& error) {
    std::cerr << "kernel_report: " << error.what() << '\n';
    return 1;
  }
}
