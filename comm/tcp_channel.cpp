#include "comm/tcp_channel.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "src/core/error.h"

namespace attamba {

namespace {

using Clock = std::chrono::steady_clock;

/// At a time, so that what comes in goes on to the next rank while more is coming.
constexpr std::size_t kChunk = std::size_t{256} << 10;
/// A rank that has hung up may have finished properly, before this one. It is to blame when nothing else moves for so long.
constexpr auto kGrace = std::chrono::seconds(2);

}  // namespace

TcpChannel::TcpChannel(int rank, std::vector<std::string> hosts, std::vector<Socket> connections, double limit)
    : rank_(static_cast<std::size_t>(rank)), hosts_(std::move(hosts)), connections_(std::move(connections)), limit_(limit) {}

void TcpChannel::send(std::size_t peer, std::span<const std::byte> bytes) {
  Outgoing stream{.peer = peer,
                  .left = bytes.size(),
                  .ready = [&] { return bytes; },
                  .sent = [&](std::size_t count) { bytes = bytes.subspan(count); }};
  move({}, {&stream, 1});
}

void TcpChannel::receive(std::size_t peer, std::span<std::byte> bytes) {
  Incoming stream{.peer = peer,
                  .left = bytes.size(),
                  .space = [&] { return bytes; },
                  .got = [&](std::size_t count) { bytes = bytes.subspan(count); }};
  move({&stream, 1}, {});
}

void TcpChannel::move(std::span<Incoming> incoming, std::span<Outgoing> outgoing) {
  for (;;) {
    bool moved = false, left = false;
    for (Incoming& stream : incoming) {
      moved = take(stream) || moved;
      left = left || stream.left > 0;
    }
    for (Outgoing& stream : outgoing) {
      moved = give(stream) || moved;
      left = left || stream.left > 0;
    }
    if (!left) {
      return;
    }
    if (!moved) {
      wait(incoming, outgoing);
    }
  }
}

bool TcpChannel::take(Incoming& stream) {
  if (stream.left == 0) {
    return false;
  }
  const std::span<std::byte> space = stream.space();
  const std::size_t most = std::min({space.size(), stream.left, kChunk});
  const ssize_t count = recv(connections_[stream.peer].descriptor(), space.data(), most, 0);
  if (count > 0) {
    stream.left -= static_cast<std::size_t>(count);
    stream.got(static_cast<std::size_t>(count));
    return true;
  }
  if (count == 0) {
    fail(stream.peer, "it hung up");
  }
  if (errno != EAGAIN && errno != EINTR) {
    fail(stream.peer, std::strerror(errno));
  }
  return false;
}

bool TcpChannel::give(Outgoing& stream) {
  const std::span<const std::byte> ready = stream.left == 0 ? std::span<const std::byte>() : stream.ready();
  if (ready.empty()) {
    return false;
  }
  const std::size_t most = std::min({ready.size(), stream.left, kChunk});
  const ssize_t count = ::send(connections_[stream.peer].descriptor(), ready.data(), most, MSG_NOSIGNAL);
  if (count > 0) {
    stream.left -= static_cast<std::size_t>(count);
    stream.sent(static_cast<std::size_t>(count));
    return true;
  }
  if (count < 0 && errno != EAGAIN && errno != EINTR) {
    fail(stream.peer, std::strerror(errno));
  }
  return false;
}

void TcpChannel::wait(std::span<const Incoming> incoming, std::span<const Outgoing> outgoing) {
  const auto begin = Clock::now();
  std::vector<pollfd> entries;
  for (std::size_t peer = 0; peer < connections_.size(); ++peer) {
    entries.push_back({connections_[peer].descriptor(), POLLRDHUP, 0});
  }
  std::vector<bool> wanted(entries.size());
  std::size_t awaited = rank_;
  for (const Outgoing& stream : outgoing) {
    if (stream.left > 0 && !stream.ready().empty()) {
      entries[stream.peer].events = static_cast<short>(entries[stream.peer].events | POLLOUT);
      wanted[stream.peer] = true;
      awaited = stream.peer;
    }
  }
  for (const Incoming& stream : incoming) {
    if (stream.left > 0) {
      entries[stream.peer].events = static_cast<short>(entries[stream.peer].events | POLLIN);
      wanted[stream.peer] = true;
      awaited = stream.peer;
    }
  }
  for (;;) {
    const int ready = poll(entries.data(), entries.size(), 200);
    require(ready >= 0 || errno == EINTR, "poll: ", std::strerror(errno));
    const auto now = Clock::now();
    bool go_on = false;
    for (std::size_t peer = 0; ready > 0 && peer < entries.size(); ++peer) {
      if (entries[peer].revents == 0) {
        continue;
      }
      if ((entries[peer].revents & (POLLRDHUP | POLLHUP | POLLERR)) != 0 && !gone_) {
        gone_ = peer;
        gone_since_ = now;
      }
      go_on = go_on || wanted[peer];
      if (!wanted[peer]) {
        entries[peer].fd = -1;  // heard; it would wake this up for ever
      }
    }
    if (go_on) {
      return;
    }
    if (gone_ && now - std::max(begin, gone_since_) > kGrace) {
      fail(*gone_, "it hung up");
    }
    if (limit_ > 0 && now - begin > std::chrono::duration<double>(limit_)) {
      throw Error(concat(describe_(), " on rank ", rank_, " of ", hosts_.size(), " (", hosts_[rank_],
                         "): nothing came from rank ", awaited, " on ", hosts_[awaited], " for ", limit_,
                         " s; it may wait for another rank itself. ATTAMBA_TIMEOUT sets how long is waited, 0 for ever"));
    }
  }
}

/// When several have gone, the first one took the others with it.
void TcpChannel::fail(std::size_t peer, const std::string& how) const {
  const std::size_t first = gone_.value_or(peer);
  throw Error(concat(describe_(), " failed on rank ", rank_, " of ", hosts_.size(), " (", hosts_[rank_], "): rank ", first,
                     " on ", hosts_[first], " has gone: ", how));
}

}  // namespace attamba
