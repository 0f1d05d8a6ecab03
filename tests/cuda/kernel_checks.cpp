#include "tests/cuda/kernel_checks.h"

#include <cxxabi.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <set>
#include <tuple>

#include "src/core/error.h"

namespace attamba {

namespace {

constexpr int kWarp = 32;
constexpr std::size_t kMostStaticShared = 48 << 10;
constexpr std::size_t kReservedShared = 1 << 10;  ///< of each block, by the system

/// Shared memory of a multiprocessor.
std::size_t shared_of_multiprocessor(int architecture) {
  switch (architecture) {
    case 80:
      return 164 << 10;
    case 86:
      return 100 << 10;
    case 90:
    case 100:
      return 228 << 10;
    default:
      throw Error(concat("no budget of shared memory is known for sm_", architecture));
  }
}

std::string demangled(const std::string& name) {
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> text(abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status), std::free);
  return status == 0 ? text.get() : name;
}

/// Without the list of parameters at the end.
std::string without_parameters(std::string name) {
  if (name.ends_with(')')) {
    std::size_t at = name.size();
    int depth = 0;
    do {
      --at;
      depth += name[at] == ')' ? 1 : name[at] == '(' ? -1 : 0;
    } while (depth > 0 && at > 0);
    name.resize(at);
  }
  return name;
}

/// The blocks per multiprocessor that the launch bounds promise. Machine code has them as the registers that they leave, so
/// promises are told apart only where they limit those at all.
int promised_blocks(const CompiledKernel& kernel) {
  constexpr int kNoLimit = 255;
  return kernel.most_registers >= kNoLimit ? 1 : blocks_by_registers(kernel.threads, kernel.most_registers);
}

std::string place(const CompiledKernel& kernel) {
  return concat(kernel_name(kernel.name), " for sm_", kernel.architecture, ": ");
}

}  // namespace

std::string kernel_name(const std::string& mangled) {
  std::string name = without_parameters(demangled(mangled));
  for (const std::string_view common :
       {"void ", "(anonymous namespace)::", "attamba::kernels::cuda::", "attamba::kernels::", "attamba::device::"}) {
    for (std::size_t at = name.find(common); at != std::string::npos; at = name.find(common, at)) {
      name.erase(at, common.size());
    }
  }
  return name;
}

int blocks_by_registers(int threads, int registers) {
  constexpr int kQuarters = 4, kOfQuarter = 16384, kUnit = 256;  // a warp gets whole units of one quarter
  const int warps = (threads + kWarp - 1) / kWarp, of_warp = (registers * kWarp + kUnit - 1) / kUnit * kUnit;
  return of_warp == 0 || warps == 0 ? 0 : kOfQuarter / of_warp * kQuarters / warps;
}

std::vector<std::string> resource_complaints(const std::vector<CompiledKernel>& kernels) {
  std::vector<std::string> complaints;
  for (const CompiledKernel& kernel : kernels) {
    if (kernel.threads == 0) {
      complaints.push_back(place(kernel) + "no launch bounds, so registers have no budget");
    } else if (kernel.registers > kernel.most_registers ||
               blocks_by_registers(kernel.threads, kernel.registers) < std::max(1, promised_blocks(kernel))) {
      complaints.push_back(concat(place(kernel), kernel.registers, " registers x ", kernel.threads,
                                  " threads of the launch bounds, which promise ", std::max(1, promised_blocks(kernel)),
                                  " blocks per multiprocessor: at most ", kernel.most_registers, " registers"));
    }
    if (kernel.local_bytes > 0) {
      complaints.push_back(concat(place(kernel), kernel.local_bytes, " bytes of local memory per thread, of 0"));
    }
    if (kernel.shared_bytes > kMostStaticShared) {
      complaints.push_back(
          concat(place(kernel), kernel.shared_bytes, " bytes of static shared memory, of ", kMostStaticShared));
    }
  }
  return complaints;
}

std::map<std::string, Coverage> coverage_of(const std::vector<simt::LaunchRecord>& records) {
  std::map<std::string, std::string> names;
  std::map<std::string, Coverage> coverage;
  std::set<std::tuple<std::string, std::int64_t, std::int64_t, std::int64_t, int, std::size_t>> shapes;
  for (const simt::LaunchRecord& r : records) {
    auto& name = names[r.kernel];
    if (name.empty()) {
      name = kernel_name(r.kernel);
    }
    Coverage& own = coverage[name];
    own.launches += r.launches;
    own.shapes += shapes.emplace(name, r.x, r.y, r.z, r.threads, r.shared_bytes).second ? 1 : 0;
    own.most_threads = std::max(own.most_threads, r.threads);
    own.most_shared_bytes = std::max(own.most_shared_bytes, r.shared_bytes);
  }
  return coverage;
}

std::vector<std::string> never_launched(const std::vector<CompiledKernel>& kernels,
                                        const std::map<std::string, Coverage>& coverage) {
  std::set<std::string> missing;
  for (const CompiledKernel& kernel : kernels) {
    std::string name = kernel_name(kernel.name);
    if (!coverage.contains(name)) {
      missing.insert(std::move(name));
    }
  }
  return {missing.begin(), missing.end()};
}

LaunchChecks check_launches(const std::vector<CompiledKernel>& kernels, const std::map<std::string, Coverage>& coverage) {
  LaunchChecks checks;
  std::map<std::string, bool> kept;  // the promise of the launch bounds, on any architecture
  for (const CompiledKernel& kernel : kernels) {
    const std::string name = kernel_name(kernel.name);
    const auto launched = coverage.find(name);
    if (launched == coverage.end()) {
      continue;
    }
    if (launched->second.most_threads > kernel.threads) {
      checks.complaints.push_back(concat(place(kernel), "launched with ", launched->second.most_threads,
                                         " threads, of the launch bounds' ", kernel.threads));
    }
    const std::size_t shared = launched->second.most_shared_bytes + kernel.shared_bytes + kReservedShared;
    const auto room = static_cast<int>(shared_of_multiprocessor(kernel.architecture) / shared);
    const int promised = promised_blocks(kernel);
    kept[name] |= room >= promised;
    if (room < 1) {
      checks.complaints.push_back(
          concat(place(kernel), "needs ", shared,
                 " bytes of shared memory, the system's 1 KiB among them, which a multiprocessor does not have"));
    } else if (room < promised) {
      checks.notes.push_back(concat(place(kernel), "room for ", room, " blocks of ", shared, " bytes of shared memory, of the ",
                                    promised, " for which the launch bounds leave registers"));
    }
  }
  for (const auto& [name, is_kept] : kept) {
    if (!is_kept) {
      checks.complaints.push_back(name + ": no architecture has shared memory for the blocks that its launch bounds promise");
    }
  }
  return checks;
}

}  // namespace attamba
