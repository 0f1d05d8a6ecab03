// How ranks that no MPI started find each other over TCP.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "comm/launch_environment.h"
#include "comm/tcp_socket.h"

namespace attamba {

/// A rank's connections: two to each other rank, one for each thread that talks (none to itself).
struct TcpMesh {
  std::vector<std::string> hosts;     ///< of every rank, for messages
  std::vector<std::string> machines;  ///< identifiers: equal for ranks of one machine
  std::array<std::vector<Socket>, 2> connections;
};

/// Rank 0 waits at the rendezvous for the others and tells all who is where; then everybody connects to everybody. All ranks
/// call it. Whoever does not know the secret, or counts another number of ranks, is refused and told why. Throws UsageError or
/// Error that names the ranks that did not come, or what was wrong, within launch.timeout seconds. Rank 0 may already have a
/// socket that waits at the rendezvous.
TcpMesh meet_over_tcp(const TcpLaunch& launch, Socket listener = {});

/// Known to whoever is told.
std::string random_secret();

}  // namespace attamba
