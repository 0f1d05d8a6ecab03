// TCP connections between ranks: made and used with deadlines, so that nothing waits for ever.
#pragma once

#include <chrono>
#include <cstddef>
#include <span>
#include <string>
#include <utility>

namespace attamba {

using Deadline = std::chrono::steady_clock::time_point;
Deadline seconds_from_now(double seconds);

/// Owns a file descriptor.
class Socket {
 public:
  Socket() = default;
  explicit Socket(int descriptor) : descriptor_(descriptor) {}
  Socket(Socket&& other) noexcept : descriptor_(std::exchange(other.descriptor_, -1)) {}
  Socket& operator=(Socket&& other) noexcept {
    std::swap(descriptor_, other.descriptor_);
    return *this;
  }
  ~Socket();

  int descriptor() const { return descriptor_; }
  explicit operator bool() const { return descriptor_ >= 0; }

 private:
  int descriptor_ = -1;
};

/// An address as numbers ("10.0.0.5", "fe80::1%eth0"), and a port.
struct Endpoint {
  std::string address;
  int port = 0;
};

/// What a host's name stands for, as numbers; throws UsageError.
std::string resolve(const std::string& host);
/// The address of a network interface, or with "" of the first one that is up and leads out of this machine, else the loopback
/// one. Throws UsageError when there is no such interface.
std::string address_of_interface(const std::string& interface);
bool is_loopback(const std::string& address);

/// Waits for connections on this address alone; port 0 takes a free one. Throws UsageError when it is not to be had.
Socket listen_on(const Endpoint& endpoint);
Endpoint local_endpoint(const Socket& socket);
/// Connected, or empty when nobody listens there (yet); throws Error when the address cannot be used.
Socket connect_to(const Endpoint& endpoint, Deadline deadline);
/// The next connection, or empty when none comes.
Socket accept_from(const Socket& listener, Deadline deadline);

/// All of the bytes; false when the other side hangs up or the deadline passes. Connections never block.
bool send_all(const Socket& socket, std::span<const std::byte> bytes, Deadline deadline);
bool receive_all(const Socket& socket, std::span<std::byte> bytes, Deadline deadline);

}  // namespace attamba
