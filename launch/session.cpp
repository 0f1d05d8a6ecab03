#include "launch/session.h"

#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <iostream>
#include <thread>

#include "src/core/error.h"

namespace attamba {

void set_threads(std::int64_t threads, const Communicator& communicator) {
  if (threads == 0 && std::getenv("OMP_NUM_THREADS") != nullptr) {
    return;
  }
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  const int cores = sched_getaffinity(0, sizeof allowed, &allowed) == 0 ? CPU_COUNT(&allowed) : omp_get_num_procs();
  // mpirun binds each rank to cores of its own on most machines: then the cores it may use are its share already.
  const bool bound = cores < omp_get_num_procs() || communicator.local_size() == 1;
  omp_set_num_threads(static_cast<int>(threads > 0 ? threads : bound ? cores : std::max(1, cores / communicator.local_size())));
}

void run_on_ranks(const std::function<void(Communicator&)>& body) {
  const std::unique_ptr<Communicator> communicator = make_communicator();
  try {
    body(*communicator);
  } catch (const std::exception& error) {
    if (communicator->size() == 1) {
      throw;
    }
    // Mistakes in the configuration are found by all ranks; let rank 0 speak for them.
    if (communicator->rank() != 0) {
      std::this_thread::sleep_for(std::chrono::milliseconds(500));
    }
    std::cerr << "attamba: error: rank " << communicator->rank() << ": " << error.what() << std::endl;
    communicator->abort(dynamic_cast<const UsageError*>(&error) != nullptr ? 2 : 1);
  }
}

}  // namespace attamba
