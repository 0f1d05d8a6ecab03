// Ranks with a GPU each, through NCCL.
#pragma once

#include <memory>

#include "comm/communicator.h"

namespace attamba {

/// Sums and parts of GPU memory go through NCCL, on a stream of their own beside the kernels: nothing waits on the host, and
/// they can be recorded. Everything else, rare and small, takes `host`'s way, GPU memory by way of host memory
/// (StagedCommunicator).
///
/// A thread watches over them. On an error of NCCL's, or when none has got on for ATTAMBA_TIMEOUT seconds (default 600,
/// 0 = for ever), it prints rank, host and collective and ends the job, whatever the other threads are doing.
///
/// All ranks call this; it throws UsageError with advice when NCCL is not there or cannot serve these ranks. `gpu` is this
/// process's, `compute_stream` (cudaStream_t) the one that kernels go to. `host` outlives the result; recordings of its sums
/// (RecordedWork) must not.
std::unique_ptr<Communicator> make_nccl_communicator(Communicator& host, int gpu, void* compute_stream);

}  // namespace attamba
