#include "comm/communicator.h"
#include "comm/launch_environment.h"
#include "comm/mpi_communicator.h"
#include "comm/single_process.h"
#include "comm/tcp_communicator.h"

namespace attamba {

std::unique_ptr<Communicator> make_communicator() {
  const LaunchEnvironment launch = read_launch_environment();
  if (launch.mpi) {
    return std::make_unique<MpiCommunicator>(launch);
  }
  if (launch.tcp) {
    return std::make_unique<TcpCommunicator>(*launch.tcp);
  }
  return std::make_unique<SingleProcess>();
}

}  // namespace attamba
