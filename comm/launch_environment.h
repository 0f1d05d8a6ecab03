// Who started this process, read from the environment alone.
#pragma once

#include <functional>
#include <optional>
#include <string>

namespace attamba {

/// Ranks that find each other over TCP.
struct TcpLaunch {
  int rank = 0, size = 1;
  std::string rendezvous;      ///< "host:port" of rank 0, or "file:PATH", where rank 0 leaves its address
  std::string secret;          ///< known to the ranks of this job and nobody else; made up by rank 0 when there is a file
  std::string interface;       ///< network interface on which rank 0 waits; empty = the rendezvous decides
  bool several_hosts = false;  ///< known to be
  double timeout = 120;        ///< seconds for all ranks to come
};

struct LaunchEnvironment {
  bool mpi = false;
  int size = 0;                  ///< number of ranks that the launcher claims, 0 when it does not say
  std::string launcher;          ///< the variable that decided, for messages
  std::optional<TcpLaunch> tcp;  ///< without MPI; neither means that this process is alone
};

using EnvironmentLookup = std::function<std::optional<std::string>(const std::string& name)>;

/// The process's own environment.
std::optional<std::string> environment_variable(const std::string& name);

/// This machine's, up to 63 characters: the form in which ranks tell each other.
std::string host_name();

/// Seconds that ranks wait for each other before they give up, unless ATTAMBA_TIMEOUT says otherwise; 0 is for ever.
constexpr double kDefaultTimeout = 600;

/// A number of seconds, 0 or more; throws UsageError when the variable holds something else.
double seconds_from_environment(const std::string& name, double otherwise,
                                const EnvironmentLookup& lookup = environment_variable);

/// The first host of a SLURM node list: "gpu03" of "gpu[03-07,12],cpu1".
std::string first_host(const std::string& node_list);

/// A launcher that speaks PMI or PMIx sets OMPI_COMM_WORLD_SIZE, PMIX_RANK or PMI_RANK, and then MPI connects the ranks. They
/// connect themselves, over TCP, when ATTAMBA_RANK and ATTAMBA_RANKS say who they are (with ATTAMBA_RENDEZVOUS), and in a SLURM
/// step of several tasks without PMI. ATTAMBA_TRANSPORT = mpi or tcp overrides. SLURM's own variables also exist in a batch
/// shell and decide nothing there. Throws UsageError when something is missing.
LaunchEnvironment read_launch_environment(const EnvironmentLookup& lookup = environment_variable);

}  // namespace attamba
