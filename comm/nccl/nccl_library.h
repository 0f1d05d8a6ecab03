// NCCL, loaded when it is first needed: a fifth of a gigabyte that single ranks and ranks without GPUs do without.
#pragma once

#include <nccl.h>

namespace attamba {

/// The functions of NCCL that ranks use.
struct NcclLibrary {
  decltype(&ncclGetVersion) get_version;
  decltype(&ncclGetUniqueId) get_unique_id;
  decltype(&ncclCommInitRankConfig) init_rank;
  decltype(&ncclCommDestroy) destroy;
  decltype(&ncclCommGetAsyncError) async_error;
  decltype(&ncclAllReduce) all_reduce;
  decltype(&ncclReduceScatter) reduce_scatter;
  decltype(&ncclAllGather) all_gather;
  decltype(&ncclGetErrorString) error_string;
  decltype(&ncclGetLastError) last_error;
};

/// Throws UsageError that says where it looked when the library is not there.
const NcclLibrary& nccl_library();

}  // namespace attamba
