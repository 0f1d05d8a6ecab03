// What the subcommands that run models share: ranks, threads, and leaving together.
#pragma once

#include <functional>

#include "comm/communicator.h"

namespace attamba {

/// Sets the threads of this rank: `threads`, or with 0 the cores that this process may use, shared with the other ranks of its
/// host (OMP_NUM_THREADS, where set, decides).
void set_threads(std::int64_t threads, const Communicator& communicator);

/// Makes the communicator and runs `body`. When one of several ranks throws, it prints its error and ends the whole job, so
/// that no rank waits for one that is gone; a mistake that all ranks find alike is printed once.
void run_on_ranks(const std::function<void(Communicator&)>& body);

}  // namespace attamba
