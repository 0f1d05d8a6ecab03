#include "comm/heartbeat.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <type_traits>

#include "comm/launch_environment.h"
#include "src/core/error.h"

namespace attamba {

namespace {

/// What ranks tell each other about themselves.
struct Card {
  std::uint64_t job = 0;  ///< rank 0's counts
  std::uint32_t address_length = 0, padding = 0;
  std::array<std::byte, 32> address{};
  std::array<char, 64> host{};
};
static_assert(std::is_trivially_copyable_v<Card> && std::is_trivially_copyable_v<Heartbeat>);
static_assert(sizeof(sockaddr_in6) <= sizeof(Card::address));

Tensor bytes_of(void* data, std::size_t bytes) {
  return {data, {DType::int32, {static_cast<std::int64_t>(bytes / sizeof(std::int32_t))}}};
}
static_assert(sizeof(Card) % sizeof(std::int32_t) == 0);

/// A socket on a free port of an address given in numbers.
Socket datagrams_at(const std::string& address) {
  addrinfo hints{};
  hints.ai_flags = AI_NUMERICHOST | AI_PASSIVE;
  hints.ai_socktype = SOCK_DGRAM;
  addrinfo* found = nullptr;
  const int code = getaddrinfo(address.c_str(), "0", &hints, &found);
  require(code == 0, "heartbeats: address ", address, ": ", gai_strerror(code));
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> owner(found, &freeaddrinfo);
  Socket own(socket(found->ai_family, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  require(own && bind(own.descriptor(), found->ai_addr, found->ai_addrlen) == 0, "heartbeats: no UDP socket on ", address, ": ",
          std::strerror(errno));
  return own;
}

}  // namespace

HeartbeatChannel::HeartbeatChannel(Communicator& communicator)
    : rank_(communicator.rank()), peers_(static_cast<std::size_t>(communicator.size())) {
  const bool one_host = communicator.local_size() == communicator.size();
  socket_ = datagrams_at(one_host ? "127.0.0.1" : address_of_interface(environment_variable("ATTAMBA_INTERFACE").value_or("")));
  wake_ = Socket(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  require(static_cast<bool>(wake_), "heartbeats: eventfd: ", std::strerror(errno));

  Card own;
  std::random_device random;
  own.job = std::uint64_t{random()} << 32 | random();
  sockaddr_storage address{};
  socklen_t length = sizeof address;
  require(getsockname(socket_.descriptor(), reinterpret_cast<sockaddr*>(&address), &length) == 0 && length <= 32,
          "heartbeats: getsockname: ", std::strerror(errno));
  std::memcpy(own.address.data(), &address, length);
  own.address_length = length;
  host_name().copy(own.host.data(), own.host.size() - 1);
  std::vector<Card> cards(peers_.size());
  communicator.all_gather(bytes_of(cards.data(), cards.size() * sizeof(Card)), bytes_of(&own, sizeof own));
  job_ = cards.front().job;
  for (std::size_t rank = 0; rank < cards.size(); ++rank) {
    cards[rank].host.back() = '\0';
    peers_[rank] = {cards[rank].host.data(), cards[rank].address, cards[rank].address_length};
  }
  const auto elsewhere =
      std::find_if(peers_.begin(), peers_.end(), [&](const Peer& peer) { return peer.host != peers_.front().host; });
  deputy_ = elsewhere != peers_.end() ? static_cast<int>(elsewhere - peers_.begin()) : std::min(1, size() - 1);
}

HeartbeatChannel::~HeartbeatChannel() = default;

std::string HeartbeatChannel::address(int rank) const {
  const Peer& peer = peers_[static_cast<std::size_t>(rank)];
  std::array<char, NI_MAXHOST> host{};
  std::array<char, NI_MAXSERV> port{};
  const int code = getnameinfo(reinterpret_cast<const sockaddr*>(peer.address.data()), peer.length, host.data(), host.size(),
                               port.data(), port.size(), NI_NUMERICHOST | NI_NUMERICSERV | NI_DGRAM);
  return code == 0 ? concat(host.data(), " port ", port.data()) : "an unknown address";
}

void HeartbeatChannel::send(int to, Heartbeat message) const {
  message.job = job_;
  message.rank = rank_;
  const Peer& peer = peers_[static_cast<std::size_t>(to)];
  sendto(socket_.descriptor(), &message, sizeof message, MSG_NOSIGNAL | MSG_DONTWAIT,
         reinterpret_cast<const sockaddr*>(peer.address.data()), peer.length);
}

bool HeartbeatChannel::receive(Heartbeat& message) const {
  for (;;) {
    const ssize_t count = recv(socket_.descriptor(), &message, sizeof message, MSG_TRUNC);
    if (count < 0 && errno != EINTR && errno != ECONNREFUSED) {  // refused: what was sent to a rank that has gone
      return false;
    }
    if (count == static_cast<ssize_t>(sizeof message) && message.job == job_ && message.rank >= 0 && message.rank < size()) {
      return true;
    }
  }
}

void HeartbeatChannel::wait(double seconds) const {
  std::array<pollfd, 2> entries{{{socket_.descriptor(), POLLIN, 0}, {wake_.descriptor(), POLLIN, 0}}};
  poll(entries.data(), entries.size(), std::max(0, static_cast<int>(std::ceil(seconds * 1000))));
}

void HeartbeatChannel::wake() const {
  eventfd_write(wake_.descriptor(), 1);
}

}  // namespace attamba
