// Runs every kernel of the GPU on a list of shapes and compares with the CPU's kernels in float64 on the same numbers. Needs no
// test framework, so that it can be taken to a machine with nothing but a GPU.
//
//   kernels_check [--small] [--only TEXT] [--json FILE]     --small: without the shapes that take an emulator long
//
// Exit code 0: all agree; 1: some do not; 2: there is no GPU to check.
#include <cmath>
#include <cstdio>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>

#include "src/core/version.h"
#include "tests/gpu/side.h"

namespace attamba::gpu_check {

namespace {

struct Arguments {
  bool small = false;
  std::string only, json;
};

std::vector<double> values_of(const Tensor& on_device) {
  const HostCopy copy(on_device);
  const Tensor& tensor = copy.tensor();
  std::vector<double> values;
  const auto read = [&]<class T>(const T*) {
    for (const T value : tensor.span<T>()) {
      if constexpr (std::is_same_v<T, bfloat16>) {
        values.push_back(static_cast<double>(static_cast<float>(value)));
      } else {
        values.push_back(static_cast<double>(value));
      }
    }
  };
  switch (tensor.dtype()) {
    case DType::float32:
      read(static_cast<const float*>(nullptr));
      break;
    case DType::bfloat16:
      read(static_cast<const bfloat16*>(nullptr));
      break;
    case DType::float64:
      read(static_cast<const double*>(nullptr));
      break;
    case DType::int32:
      read(static_cast<const std::int32_t*>(nullptr));
      break;
    case DType::int64:
      read(static_cast<const std::int64_t*>(nullptr));
      break;
  }
  return values;
}

struct Difference {
  double relative = 0;  ///< ||a - b|| / ||b||
  double largest = 0;   ///< max |a - b| / max |b|
};

Difference difference(const std::vector<double>& found, const std::vector<double>& expected, double before) {
  double squares = 0, norm = 0, worst = 0, most = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const double d = std::abs(found[i] - expected[i]), size = std::abs(expected[i] - before);
    squares += d * d;
    norm += size * size;
    worst = d <= worst ? worst : d;  // keeps NaN
    most = std::max(most, size);
  }
  const double nothing = std::numeric_limits<double>::min();
  return {std::sqrt(squares) / std::max(std::sqrt(norm), nothing), worst / std::max(most, nothing)};
}

/// One line per result. Returns whether all of them agree.
bool check(const Case& c, DType type, nlohmann::json& report) {
  Side found(Device::cuda, type), expected(Device::cpu, c.in_float64 ? DType::float64 : type);
  bool passed = true;
  nlohmann::json results = nlohmann::json::object();
  std::string message;
  try {
    const std::vector<Output> outputs = c.run(found), references = c.run(expected);
    for (std::size_t i = 0; i < outputs.size(); ++i) {
      const Output& output = outputs[i];
      const double tolerance = type == DType::bfloat16 ? output.bfloat16 : output.float32;
      const Difference d = difference(values_of(output.tensor), values_of(references[i].tensor), output.before);
      const bool agrees = d.relative <= tolerance && d.largest <= 4 * tolerance;
      std::printf("%-44s %-9s %-12s %10.2e %10.2e %10.2e  %s\n", c.name.c_str(), std::string(name_of(type)).c_str(),
                  output.name.c_str(), d.relative, d.largest, tolerance, agrees ? "PASS" : "FAIL");
      results[output.name] = {{"relative", d.relative}, {"largest", d.largest}, {"tolerance", tolerance}, {"pass", agrees}};
      passed = passed && agrees;
    }
  } catch (const std::exception& error) {
    std::printf("%-44s %-9s %s  FAIL\n", c.name.c_str(), std::string(name_of(type)).c_str(), error.what());
    message = error.what();
    passed = false;
  }
  std::fflush(stdout);
  report.push_back({{"case", c.name}, {"dtype", name_of(type)}, {"pass", passed}, {"results", results}, {"error", message}});
  return passed;
}

int run(const Arguments& arguments) {
  connect();
  std::printf("%s on %s\n%-44s %-9s %-12s %10s %10s %10s\n", version_line().c_str(),
              runtime(Device::cuda).description().c_str(), "case", "type", "result", "relative", "largest", "tolerance");
  nlohmann::json report = nlohmann::json::array();
  int failed = 0, done = 0;
  std::vector<Case> cases = kernel_cases();
  for (Case& c : mixer_cases()) {
    cases.push_back(std::move(c));
  }
  for (const Case& c : cases) {
    if ((arguments.small && c.large) || c.name.find(arguments.only) == std::string::npos) {
      continue;
    }
    for (const DType type : c.types.empty() ? std::vector{DType::float32, DType::bfloat16} : c.types) {
      ++done;
      failed += check(c, type, report) ? 0 : 1;
    }
  }
  std::printf("%d of %d passed\n", done - failed, done);
  if (!arguments.json.empty()) {
    std::ofstream(arguments.json) << nlohmann::json{{"version", version_line()},
                                                    {"device", runtime(Device::cuda).description()},
                                                    {"passed", done - failed},
                                                    {"failed", failed},
                                                    {"cases", report}}
                                         .dump(1)
                                  << '\n';
  }
  return failed == 0 && done > 0 ? 0 : 1;
}

}  // namespace

}  // namespace attamba::gpu_check

int main(int argc, char** argv) {
  attamba::gpu_check::Arguments arguments;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--small") {
      arguments.small = true;
    } else if ((argument == "--only" || argument == "--json") && i + 1 < argc) {
      (argument == "--only" ? arguments.only : arguments.json) = argv[++i];
    } else {
      std::fprintf(stderr, "usage: kernels_check [--small] [--only TEXT] [--json FILE]\n");
      return 2;
    }
  }
  try {
    return attamba::gpu_check::run(arguments);
  } catch (const attamba::UsageError& error) {
    std::fprintf(stderr, "kernels_check: %s\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "kernels_check: %s\n", error.what());
    return 1;
  }
}
