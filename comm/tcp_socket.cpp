#include "comm/tcp_socket.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <memory>

#include "src/core/error.h"

namespace attamba {

namespace {

using AddressInfo = std::unique_ptr<addrinfo, decltype(&freeaddrinfo)>;

AddressInfo look_up(const std::string& host, int port, int flags) {
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = flags;
  addrinfo* found = nullptr;
  const int code = getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found);
  require<UsageError>(code == 0, "host \"", host, "\" cannot be found: ", gai_strerror(code));
  return {found, &freeaddrinfo};
}

std::string as_numbers(const sockaddr* address, socklen_t length) {
  std::array<char, NI_MAXHOST> text{};
  const int code = getnameinfo(address, length, text.data(), text.size(), nullptr, 0, NI_NUMERICHOST);
  require(code == 0, "address: ", gai_strerror(code));
  return text.data();
}

/// False when the deadline passes first.
bool wait_for(int descriptor, short events, Deadline deadline) {
  for (;;) {
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now()).count();
    pollfd entry{descriptor, events, 0};
    const int ready = poll(&entry, 1, static_cast<int>(std::clamp<long long>(left, 0, 1000)));
    if (ready > 0) {
      return true;
    }
    require(ready == 0 || errno == EINTR, "poll: ", std::strerror(errno));
    if (left <= 0) {
      return false;
    }
  }
}

void set(int descriptor, int level, int option, int value) {
  require(setsockopt(descriptor, level, option, &value, sizeof value) == 0, "socket option ", option, ": ",
          std::strerror(errno));
}

/// Small messages leave at once, and a host that has gone without a word is found out within half a minute.
void prepare(int descriptor) {
  set(descriptor, IPPROTO_TCP, TCP_NODELAY, 1);
  set(descriptor, SOL_SOCKET, SO_KEEPALIVE, 1);
  set(descriptor, IPPROTO_TCP, TCP_KEEPIDLE, 10);
  set(descriptor, IPPROTO_TCP, TCP_KEEPINTVL, 5);
  set(descriptor, IPPROTO_TCP, TCP_KEEPCNT, 3);
  set(descriptor, IPPROTO_TCP, TCP_USER_TIMEOUT, 25'000);
}

/// Calls `move(done)` until it has moved everything.
template <class Move>
bool move_all(const Socket& socket, std::size_t bytes, short events, Deadline deadline, const Move& move) {
  for (std::size_t done = 0; done < bytes;) {
    const ssize_t moved = move(done);
    if (moved > 0) {
      done += static_cast<std::size_t>(moved);
    } else if (moved < 0 && (errno == EAGAIN || errno == EINTR)) {
      if (!wait_for(socket.descriptor(), events, deadline)) {
        return false;
      }
    } else {
      return false;
    }
  }
  return true;
}

}  // namespace

Deadline seconds_from_now(double seconds) {
  return std::chrono::steady_clock::now() +
         std::chrono::duration_cast<std::chrono::steady_clock::duration>(std::chrono::duration<double>(seconds));
}

Socket::~Socket() {
  if (descriptor_ >= 0) {
    close(descriptor_);
  }
}

std::string resolve(const std::string& host) {
  const AddressInfo found = look_up(host, 0, 0);
  return as_numbers(found->ai_addr, found->ai_addrlen);
}

std::string address_of_interface(const std::string& interface) {
  ifaddrs* list = nullptr;
  require(getifaddrs(&list) == 0, "network interfaces: ", std::strerror(errno));
  const std::unique_ptr<ifaddrs, decltype(&freeifaddrs)> owner(list, &freeifaddrs);
  for (const int family : {AF_INET, AF_INET6}) {
    for (const ifaddrs* entry = list; entry != nullptr; entry = entry->ifa_next) {
      if (entry->ifa_addr == nullptr || entry->ifa_addr->sa_family != family || (entry->ifa_flags & IFF_UP) == 0) {
        continue;
      }
      if (interface.empty() ? (entry->ifa_flags & IFF_LOOPBACK) == 0 : interface == entry->ifa_name) {
        return as_numbers(entry->ifa_addr, family == AF_INET ? sizeof(sockaddr_in) : sizeof(sockaddr_in6));
      }
    }
  }
  require<UsageError>(interface.empty(), "ATTAMBA_INTERFACE: there is no network interface \"", interface,
                      "\" with an address here; `ip address` lists them");
  return "127.0.0.1";
}

bool is_loopback(const std::string& address) {
  return address.starts_with("127.") || address == "::1";
}

Socket listen_on(const Endpoint& endpoint) {
  const AddressInfo found = look_up(endpoint.address, endpoint.port, AI_PASSIVE);
  Socket listener(socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  require(static_cast<bool>(listener), "socket: ", std::strerror(errno));
  set(listener.descriptor(), SOL_SOCKET, SO_REUSEADDR, 1);
  const bool bound =
      bind(listener.descriptor(), found->ai_addr, found->ai_addrlen) == 0 && listen(listener.descriptor(), SOMAXCONN) == 0;
  require<UsageError>(bound || errno != EADDRINUSE, "port ", endpoint.port, " of ", endpoint.address,
                      " is taken, by another job or program; name another one in ATTAMBA_RENDEZVOUS");
  require<UsageError>(bound || errno != EADDRNOTAVAIL, endpoint.address,
                      " is no address of this machine, where rank 0 runs; ATTAMBA_RENDEZVOUS must name rank 0's host");
  require<UsageError>(bound, "cannot wait for ranks on ", endpoint.address, " port ", endpoint.port, ": ",
                      std::strerror(errno));
  return listener;
}

Endpoint local_endpoint(const Socket& socket) {
  sockaddr_storage address{};
  socklen_t length = sizeof address;
  require(getsockname(socket.descriptor(), reinterpret_cast<sockaddr*>(&address), &length) == 0,
          "getsockname: ", std::strerror(errno));
  const in_port_t port = address.ss_family == AF_INET ? reinterpret_cast<const sockaddr_in&>(address).sin_port
                                                      : reinterpret_cast<const sockaddr_in6&>(address).sin6_port;
  return {as_numbers(reinterpret_cast<const sockaddr*>(&address), length), ntohs(port)};
}

Socket connect_to(const Endpoint& endpoint, Deadline deadline) {
  const AddressInfo found = look_up(endpoint.address, endpoint.port, 0);
  Socket connection(socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  require(static_cast<bool>(connection), "socket: ", std::strerror(errno));
  if (connect(connection.descriptor(), found->ai_addr, found->ai_addrlen) != 0) {
    if (errno != EINPROGRESS || !wait_for(connection.descriptor(), POLLOUT, deadline)) {
      return {};
    }
    int error = 0;
    socklen_t length = sizeof error;
    getsockopt(connection.descriptor(), SOL_SOCKET, SO_ERROR, &error, &length);
    if (error != 0) {
      return {};
    }
  }
  prepare(connection.descriptor());
  return connection;
}

Socket accept_from(const Socket& listener, Deadline deadline) {
  while (wait_for(listener.descriptor(), POLLIN, deadline)) {
    Socket connection(accept4(listener.descriptor(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (connection) {
      prepare(connection.descriptor());
      return connection;
    }
    require(errno == EAGAIN || errno == EINTR || errno == ECONNABORTED, "accept: ", std::strerror(errno));
  }
  return {};
}

bool send_all(const Socket& socket, std::span<const std::byte> bytes, Deadline deadline) {
  return move_all(socket, bytes.size(), POLLOUT, deadline, [&](std::size_t done) {
    return send(socket.descriptor(), bytes.data() + done, bytes.size() - done, MSG_NOSIGNAL);
  });
}

bool receive_all(const Socket& socket, std::span<std::byte> bytes, Deadline deadline) {
  return move_all(socket, bytes.size(), POLLIN, deadline,
                  [&](std::size_t done) { return recv(socket.descriptor(), bytes.data() + done, bytes.size() - done, 0); });
}

}  // namespace attamba
