#include "comm/communicator.h"
#include "comm/launch_environment.h"
#include "comm/mpi_communicator.h"
#include "comm/single_process.h"

namespace attamba {

std::unique_ptr<Communicator> make_communicator() {
  const LaunchEnvironment launch = read_launch_environment();
  if (launch.mpi) {
    return std::make_unique<MpiCommunicator>(launch);
  }
  return std::make_unique<SingleProcess>();
}

}  // namespace attamba
