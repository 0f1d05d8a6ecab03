// The kernels that nvcc compiled into a program, and what each needs of a GPU: read from the program's file, where there may be
// neither a GPU nor cuobjdump.
#pragma once

#include <cstddef>
#include <filesystem>
#include <string>
#include <vector>

namespace attamba {

/// One instance of a kernel, for one architecture.
struct CompiledKernel {
  std::string name;              ///< mangled
  int architecture = 0;          ///< 90 for sm_90a
  int threads = 0;               ///< of a block, at most: from the launch bounds, 0 without them
  int registers = 0;             ///< of a thread
  int most_registers = 0;        ///< what the compiler may use: what leaves room for the blocks that the launch bounds promise
  std::size_t local_bytes = 0;   ///< of a thread, in local memory: its stack frame
  std::size_t shared_bytes = 0;  ///< static
};

/// All kernels of a program or an object file. Throws Error where it finds none.
std::vector<CompiledKernel> compiled_kernels(const std::filesystem::path& program);

}  // namespace attamba
