// attamba verify: this machine's results against golden files (docs/model.md, docs/numerics.md).
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <memory>

#include "comm/single_process.h"
#include "launch/commands.h"
#include "launch/devices.h"
#include "src/core/error.h"
#include "src/train/golden.h"

namespace attamba {

namespace {

struct VerifyOptions {
  std::vector<std::string> files;
  std::string device = "auto";
  std::string dtype = "float32";
  bool all = false;
};

DType parse_dtype(const std::string& name) {
  return name == "float64" ? DType::float64 : name == "float32" ? DType::float32 : DType::bfloat16;
}

void print_check(const GoldenCheck& check) {
  std::printf("  %-58s %10.2e  %10.2e  %s\n", check.quantity.c_str(), check.error, check.tolerance,
              check.passed() ? "PASS" : "FAIL");
}

/// Prints one file's verdict: the worst gradients unless all are asked for. Returns how many checks failed.
int verify_file(const std::string& file, DType dtype, Device device, bool all) {
  const std::vector<GoldenCheck> checks = verify_golden(read_golden(file), dtype, device);
  const auto failed = static_cast<int>(std::count_if(checks.begin(), checks.end(), [](const auto& c) { return !c.passed(); }));
  std::printf("%s  %s\n", std::filesystem::path(file).filename().c_str(), failed == 0 ? "PASS" : "FAIL");
  const auto is_gradient = [](const GoldenCheck& check) {
    return check.quantity.starts_with("gradient of ") || check.quantity.starts_with("gradients of ");
  };
  const auto worst = std::max_element(checks.begin(), checks.end(), [&](const auto& a, const auto& b) {
    return (is_gradient(a) ? a.error / a.tolerance : -1) < (is_gradient(b) ? b.error / b.tolerance : -1);
  });
  for (const GoldenCheck& check : checks) {
    if (all || !is_gradient(check) || !check.passed()) {
      print_check(check);
    } else if (&check == &*worst) {
      GoldenCheck named = check;
      named.quantity = "worst " + named.quantity;
      print_check(named);
    }
  }
  return failed;
}

void verify(const VerifyOptions& options) {
  const DType dtype = parse_dtype(options.dtype);
  const SingleProcess alone;
  const Device device = open_device(options.device, dtype, alone, true);
  std::printf("  %-58s %10s  %10s\n", "relative to each tensor's norm (losses: absolute)", "error", "tolerance");
  std::vector<std::string> failures;
  for (const std::string& file : options.files) {
    if (verify_file(file, dtype, device, options.all) > 0) {
      failures.push_back(std::filesystem::path(file).filename());
    }
  }
  std::printf("%zu of %zu files passed on the %s in %s\n", options.files.size() - failures.size(), options.files.size(),
              device == Device::cpu ? "cpu" : "gpu", options.dtype.c_str());
  require(failures.empty(), "verify: ", failures.size(), " of ", options.files.size(), " files failed, first ",
          failures.empty() ? std::string() : failures.front());
}

}  // namespace

void add_verify_command(CLI::App& program) {
  auto options = std::make_shared<VerifyOptions>();
  CLI::App* command =
      program.add_subcommand("verify", "check this machine's results against golden files of the float64 oracle");
  command->add_option("files", options->files, "golden files (HDF5)")->required();
  command->add_option("--device", options->device, "where to compute")->check(CLI::IsMember({"auto", "cpu", "cuda"}));
  command->add_option("--dtype", options->dtype, "compute type")
      ->check(CLI::IsMember({"float32", "bfloat16", "float64"}))
      ->capture_default_str();
  command->add_flag("--all", options->all, "print every gradient, not only the worst");
  command->callback([options] { verify(*options); });
}

}  // namespace attamba
