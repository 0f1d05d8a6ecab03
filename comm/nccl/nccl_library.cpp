#include "comm/nccl/nccl_library.h"

#include <dlfcn.h>

#include <array>
#include <string>

#include "comm/gpu_ranks.h"
#include "src/core/error.h"

namespace attamba {

namespace {

template <class Function>
void find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  require<UsageError>(function != nullptr, "NCCL has no function ", name, ": it is older than ", NCCL_MAJOR, '.', NCCL_MINOR,
                      ", which this program was built with; install that one or newer");
}

NcclLibrary load() {
  // The loader's own path first (LD_LIBRARY_PATH, ld.so.conf), then where the toolkit and packages put it.
  const std::array<std::string, 4> places{"libnccl.so.2", "/usr/local/cuda/lib64/libnccl.so.2",
                                          "/usr/local/cuda/lib/libnccl.so.2", "/usr/lib/x86_64-linux-gnu/libnccl.so.2"};
  void* library = open_library(
      places, "install NCCL 2 (package libnccl2) and name its folder in LD_LIBRARY_PATH, or use train.transport = \"staged\"");
  NcclLibrary nccl{};
  find(library, "ncclGetVersion", nccl.get_version);
  find(library, "ncclGetUniqueId", nccl.get_unique_id);
  find(library, "ncclCommInitRankConfig", nccl.init_rank);
  find(library, "ncclCommDestroy", nccl.destroy);
  find(library, "ncclCommGetAsyncError", nccl.async_error);
  find(library, "ncclAllReduce", nccl.all_reduce);
  find(library, "ncclReduceScatter", nccl.reduce_scatter);
  find(library, "ncclAllGather", nccl.all_gather);
  find(library, "ncclGetErrorString", nccl.error_string);
  find(library, "ncclGetLastError", nccl.last_error);
  return nccl;
}

}  // namespace

const NcclLibrary& nccl_library() {
  static const NcclLibrary nccl = load();
  return nccl;
}

}  // namespace attamba
