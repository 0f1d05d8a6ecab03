// Small messages beside MPI, NCCL and TCP collectives, for a thread that watches over the ranks: they come through when a
// collective hangs.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "comm/communicator.h"
#include "comm/progress.h"
#include "comm/tcp_socket.h"

namespace attamba {

/// A datagram. A rank sends beats to rank 0 and to its deputy, who answer; a verdict ends the rank that gets it.
struct Heartbeat {
  enum Kind : std::int32_t { beat, answer, verdict };

  std::uint64_t job = 0;  ///< set by the channel; strangers' datagrams have another one
  std::int32_t kind = beat, rank = 0;
  std::int32_t phase = 0, waiting = 0;
  std::int64_t step = 0;
  std::int64_t ticks = 0;  ///< grows whenever the rank gets on
  double limit = 0;        ///< seconds that it may need without getting on
  std::array<CollectiveProgress::Position, CollectiveProgress::kAllLanes> lanes;
  std::int64_t stop = 0;  ///< that a rank was asked to stop, in whatever form the watchdog gives it; 0: none was
};

/// UDP between each rank and two that listen to all: rank 0, and a deputy that takes over when rank 0 is gone, the first rank
/// on another host where there is one. Addresses travel through the communicator, once. ATTAMBA_INTERFACE chooses the network.
class HeartbeatChannel {
 public:
  /// All ranks call it. Nothing is known yet about whether datagrams arrive.
  explicit HeartbeatChannel(Communicator& communicator);
  ~HeartbeatChannel();
  HeartbeatChannel(const HeartbeatChannel&) = delete;
  HeartbeatChannel& operator=(const HeartbeatChannel&) = delete;

  int rank() const { return rank_; }
  int size() const { return static_cast<int>(peers_.size()); }
  int deputy() const { return deputy_; }
  const std::string& host(int rank) const { return peers_[static_cast<std::size_t>(rank)].host; }
  /// "10.0.0.5 port 40001"
  std::string address(int rank) const;

  /// Neither blocks nor fails: a datagram may be lost anyway.
  void send(int to, Heartbeat message) const;
  /// The next message of this job's that has come, if one has.
  bool receive(Heartbeat& message) const;
  /// Returns when a message has come, after `seconds`, or when `wake` was called.
  void wait(double seconds) const;
  void wake() const;

 private:
  struct Peer {
    std::string host;
    std::array<std::byte, 32> address;  ///< a sockaddr_in or sockaddr_in6
    std::uint32_t length = 0;
  };

  int rank_ = 0, deputy_ = 0;
  std::uint64_t job_ = 0;
  std::vector<Peer> peers_;
  Socket socket_, wake_;
};

}  // namespace attamba
