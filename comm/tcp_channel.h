// One thread's connections to all other ranks, and moving bytes over them until they are there or somebody has failed.
#pragma once

#include <chrono>
#include <cstddef>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "comm/tcp_socket.h"

namespace attamba {

/// Bytes that come from a rank: `left` of them, into what `space` gives next (not empty while some are left). `got` hears how
/// many have come.
struct Incoming {
  std::size_t peer = 0;
  std::size_t left = 0;
  std::function<std::span<std::byte>()> space;
  std::function<void(std::size_t)> got;
};

/// Bytes that go to a rank: `left` of them, from what `ready` gives next, which may be empty until something has come in.
struct Outgoing {
  std::size_t peer = 0;
  std::size_t left = 0;
  std::function<std::span<const std::byte>()> ready;
  std::function<void(std::size_t)> sent;
};

/// Waiting looks at all connections, so that a rank that has gone is named by everybody, also by those that wait for another
/// one. Throws Error that names the rank, its host and what this rank was doing.
class TcpChannel {
 public:
  /// `connections`: one per rank, none for `rank` itself. `limit`: seconds without any progress before waiting ends, 0 = none.
  TcpChannel(int rank, std::vector<std::string> hosts, std::vector<Socket> connections, double limit);

  const std::vector<std::string>& hosts() const { return hosts_; }
  /// This host's address on the way to `peer`.
  std::string own_address(std::size_t peer) const { return local_endpoint(connections_[peer]).address; }

  /// What messages say this rank is doing.
  void begin(std::function<std::string()> describe) { describe_ = std::move(describe); }
  void send(std::size_t peer, std::span<const std::byte> bytes);
  void receive(std::size_t peer, std::span<std::byte> bytes);
  /// All of these at once.
  void move(std::span<Incoming> incoming, std::span<Outgoing> outgoing);

 private:
  bool take(Incoming& stream);
  bool give(Outgoing& stream);
  void wait(std::span<const Incoming> incoming, std::span<const Outgoing> outgoing);
  [[noreturn]] void fail(std::size_t peer, const std::string& how) const;

  std::size_t rank_;
  std::vector<std::string> hosts_;
  std::vector<Socket> connections_;
  double limit_;
  std::function<std::string()> describe_;
  std::optional<std::size_t> gone_;  ///< the first rank seen to have hung up
  std::chrono::steady_clock::time_point gone_since_;
};

}  // namespace attamba
