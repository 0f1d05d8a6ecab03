// What is wrong with kernels as they were compiled, and with what tests launched of them.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "tests/cuda/cubin.h"
#include "tests/simt/coverage/records.h"

namespace attamba {

/// A kernel's name with its template arguments, from the mangled one, without what all kernels' names have in common. Host
/// compilers and nvcc name unnamed namespaces differently; here they are equal.
std::string kernel_name(const std::string& mangled);

/// Blocks that a multiprocessor's registers are enough for.
int blocks_by_registers(int threads, int registers);

/// One line per kernel and architecture that breaks a budget: registers that leave room for the blocks of the launch bounds, no
/// local memory, at most 48 KiB of static shared memory.
std::vector<std::string> resource_complaints(const std::vector<CompiledKernel>& kernels);

/// What tests launched of one instance of a kernel.
struct Coverage {
  std::int64_t launches = 0, shapes = 0;  ///< shapes: grids, threads and shared memory that differ
  int most_threads = 0;
  std::size_t most_shared_bytes = 0;
};
/// By kernel_name.
std::map<std::string, Coverage> coverage_of(const std::vector<simt::LaunchRecord>& records);

/// Instances that are compiled and not launched, by name.
std::vector<std::string> never_launched(const std::vector<CompiledKernel>& kernels,
                                        const std::map<std::string, Coverage>& coverage);

struct LaunchChecks {
  /// Kernels that were launched with more threads than their launch bounds allow, or with so much shared memory that an
  /// architecture has no room for a single block, or none has it for the blocks that they promise.
  std::vector<std::string> complaints;
  std::vector<std::string> notes;  ///< architectures that have no room for these, where others have
};
LaunchChecks check_launches(const std::vector<CompiledKernel>& kernels, const std::map<std::string, Coverage>& coverage);

}  // namespace attamba
