#include "comm/communicator.h"
#include "comm/launch_environment.h"
#include "comm/single_process.h"
#include "comm/tcp_communicator.h"
#include "src/core/error.h"

#ifdef ATTAMBA_HAS_MPI
#include "comm/mpi_communicator.h"
#endif

namespace attamba {

std::unique_ptr<Communicator> make_communicator() {
  const LaunchEnvironment launch = read_launch_environment();
  if (launch.mpi) {
#ifdef ATTAMBA_HAS_MPI
    return std::make_unique<MpiCommunicator>(launch);
#else
    throw UsageError(concat("this program was built without MPI (-DATTAMBA_MPI=OFF), but ", launch.launcher,
                            " says that an MPI launcher started it; ATTAMBA_TRANSPORT=tcp uses TCP instead"));
#endif
  }
  if (launch.tcp) {
    return std::make_unique<TcpCommunicator>(*launch.tcp);
  }
  return std::make_unique<SingleProcess>();
}

}  // namespace attamba
