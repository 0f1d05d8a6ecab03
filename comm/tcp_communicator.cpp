#include "comm/tcp_communicator.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <iostream>
#include <set>
#include <span>

#include "comm/checks.h"
#include "src/core/error.h"

namespace attamba {

namespace {

using Kind = CollectiveCall::Kind;
using Bytes = std::span<std::byte>;

Bytes bytes_of(const Tensor& tensor) {
  return {static_cast<std::byte*>(tensor.data), tensor.bytes()};
}

/// Parts of `bytes` bytes each, one after the other in a stream: first, first + step, ...
struct Parts {
  std::byte* whole;
  std::size_t bytes;
  int first, step;

  /// What lies at `offset` of the stream, up to `end` at most, in one piece.
  Bytes at(std::size_t offset, std::size_t end) const {
    const int part = first + step * static_cast<int>(offset / bytes);
    return {whole + static_cast<std::size_t>(part) * bytes + offset % bytes, std::min(bytes - offset % bytes, end - offset)};
  }
};

/// What a rank sends to rank 0 with its announcement when data is small, and what it gets back.
std::size_t bytes_to_lead(const CollectiveCall& call, int rank) {
  return call.kind == Kind::broadcast && rank != call.root ? 0 : call.bytes;
}
bool gathers(const CollectiveCall& call) {
  return call.kind == Kind::all_gather || call.kind == Kind::start_all_gather;
}
/// What a rank gets back, of all that rank 0 has.
Bytes part_from_lead(const CollectiveCall& call, int rank, int size, Bytes result) {
  if (call.kind == Kind::start_reduce_scatter_sum) {
    const std::size_t part = call.bytes / static_cast<std::size_t>(size);
    return result.subspan(part * static_cast<std::size_t>(rank), part);
  }
  return call.kind == Kind::broadcast && rank == call.root ? Bytes() : result;
}

template <class T>
Bytes memory_of(T& value) {
  return std::as_writable_bytes(std::span(&value, 1));
}

void append(std::vector<std::byte>& to, std::span<const std::byte> bytes) {
  to.insert(to.end(), bytes.begin(), bytes.end());
}

}  // namespace

TcpCommunicator::TcpCommunicator(const TcpLaunch& launch) : TcpCommunicator(launch, {}) {}

TcpCommunicator::TcpCommunicator(const TcpLaunch& launch, Socket listener)
    : rank_(launch.rank),
      size_(launch.size),
      seconds_to_meet_(launch.timeout),
      exceptions_at_start_(std::uncaught_exceptions()) {
  const double limit = seconds_from_environment("ATTAMBA_TIMEOUT", kDefaultTimeout);
  TcpMesh mesh = meet_over_tcp(launch, std::move(listener));
  const auto own = mesh.machines[static_cast<std::size_t>(rank_)];
  hosts_ = static_cast<int>(std::set<std::string>(mesh.machines.begin(), mesh.machines.end()).size());
  local_size_ = static_cast<int>(std::count(mesh.machines.begin(), mesh.machines.end(), own));
  local_rank_ = static_cast<int>(std::count(mesh.machines.begin(), mesh.machines.begin() + rank_, own));
  first_local_rank_ = static_cast<int>(std::find(mesh.machines.begin(), mesh.machines.end(), own) - mesh.machines.begin());
  foreground_ =
      std::make_unique<Side>(Side{{rank_, mesh.hosts, std::move(mesh.connections[0]), limit}, CollectiveProgress::foreground});
  background_ =
      std::make_unique<Side>(Side{{rank_, mesh.hosts, std::move(mesh.connections[1]), limit}, CollectiveProgress::background});
  worker_ = std::make_unique<OrderedWorker>(&progress());
}

/// The first rank of each group waits for the others of it, at an address that all ranks hear of.
std::unique_ptr<Communicator> TcpCommunicator::split(int color) {
  struct Card {
    std::int32_t color = 0, port = 0;
    std::array<char, 64> address{};
    std::array<char, 96> secret{};
  };
  static_assert(sizeof(Card) % sizeof(std::int32_t) == 0);
  constexpr std::int64_t kWords = sizeof(Card) / sizeof(std::int32_t);
  Card own{.color = color};
  Socket listener;
  if (size_ > 1) {
    std::string address;
    for (int peer = 0; peer < size_ && (address.empty() || is_loopback(address)); ++peer) {
      address = peer == rank_ ? address : foreground_->channel.own_address(static_cast<std::size_t>(peer));
    }
    listener = listen_on({address, 0});
    own.port = local_endpoint(listener).port;
    address.copy(own.address.data(), own.address.size() - 1);
    random_secret().copy(own.secret.data(), own.secret.size() - 1);
  }
  std::vector<Card> cards(static_cast<std::size_t>(size_));
  all_gather({cards.data(), {DType::int32, {kWords * size_}}}, {&own, {DType::int32, {kWords}}});
  TcpLaunch group;
  group.timeout = seconds_to_meet_;
  group.size = 0;
  for (int rank = 0; rank < size_; ++rank) {
    const Card& card = cards[static_cast<std::size_t>(rank)];
    if (card.color != color) {
      continue;
    }
    if (group.size == 0) {
      group.rendezvous = concat('[', card.address.data(), "]:", card.port);
      group.secret = card.secret.data();
    }
    group.rank += rank < rank_ ? 1 : 0;
    ++group.size;
  }
  auto ranks = std::make_unique<TcpCommunicator>(group, group.rank == 0 ? std::move(listener) : Socket());
  ranks->progress().join(progress(), color);
  return ranks;
}

TcpCommunicator::~TcpCommunicator() {
  if (std::uncaught_exceptions() > exceptions_at_start_) {
    std::cerr << "tcp: rank " << rank_ << " of " << size_ << " leaves because of an exception; ending the job\n";
    abort(1);
  }
}

std::string TcpCommunicator::description() const {
  return concat("TCP, ", size_, size_ == 1 ? " rank" : " ranks", " on ", hosts_, hosts_ == 1 ? " host" : " hosts", " (",
                local_size_, " on this one)");
}

bool TcpCommunicator::small(const Call& call) const {
  return call.bytes * (gathers(call) ? static_cast<std::size_t>(size_) : 1) <= kSmallBytes;
}

void TcpCommunicator::meet(Side& side, const Call& call, Bytes own, Bytes result) {
  ++side.begun;
  side.channel.begin([call, number = side.begun] { return concat(call.describe(), " (number ", number, ')'); });
  if (rank_ == 0) {
    lead(side, call, result);
  } else {
    follow(side, call, own, result);
  }
}

void TcpCommunicator::follow(Side& side, const Call& call, std::span<const std::byte> own, Bytes result) {
  TcpChannel& channel = side.channel;
  std::int64_t signature = call.signature();
  std::vector<std::byte> message;
  append(message, memory_of(signature));
  if (small(call)) {
    append(message, own.first(bytes_to_lead(call, rank_)));
  }
  channel.send(0, message);
  std::int64_t agreed = 0;
  channel.receive(0, memory_of(agreed));
  if (agreed == 0) {
    std::vector<std::int64_t> signatures(static_cast<std::size_t>(size_));
    channel.receive(0, std::as_writable_bytes(std::span(signatures)));
    throw RanksDisagree(Call::describe_disagreement(signatures, channel.hosts(), rank_, side.begun));
  }
  if (small(call)) {
    channel.receive(0, part_from_lead(call, rank_, size_, result));
  }
}

void TcpCommunicator::lead(Side& side, const Call& call, Bytes result) {
  TcpChannel& channel = side.channel;
  std::vector<std::int64_t> signatures(static_cast<std::size_t>(size_), call.signature());
  std::vector<std::vector<std::byte>> given(static_cast<std::size_t>(size_));
  for (int peer = 1; peer < size_; ++peer) {
    const auto index = static_cast<std::size_t>(peer);
    channel.receive(index, memory_of(signatures[index]));
    const Call theirs = Call::from_signature(signatures[index]);
    given[index].resize(small(theirs) ? bytes_to_lead(theirs, peer) : 0);
    channel.receive(index, given[index]);
  }
  std::int64_t agreed = std::count(signatures.begin(), signatures.end(), call.signature()) == size_ ? 1 : 0;
  if (agreed != 0 && small(call)) {
    const std::byte* sum = result.data();
    for (std::size_t peer = 1; peer < given.size(); ++peer) {
      if (given[peer].empty()) {
        continue;
      }
      if (call.kind == Kind::broadcast) {
        std::memcpy(result.data(), given[peer].data(), call.bytes);
      } else if (gathers(call)) {
        std::memcpy(result.data() + peer * call.bytes, given[peer].data(), call.bytes);
      } else {
        attamba::reduce(call.kind == Kind::all_reduce_max ? Reduction::max : Reduction::sum, call.dtype, sum,
                        given[peer].data(), call.bytes / size_of(call.dtype));
        sum = given[peer].data();
      }
    }
    if (sum != result.data()) {
      std::memcpy(result.data(), sum, call.bytes);
    }
  }
  for (int peer = 1; peer < size_; ++peer) {
    std::vector<std::byte> message;
    append(message, memory_of(agreed));
    if (agreed == 0) {
      append(message, std::as_bytes(std::span(signatures)));
    } else if (small(call)) {
      append(message, part_from_lead(call, peer, size_, result));
    }
    channel.send(static_cast<std::size_t>(peer), message);
  }
  if (agreed == 0) {
    throw RanksDisagree(Call::describe_disagreement(signatures, channel.hosts(), rank_, side.begun));
  }
}

void TcpCommunicator::reduce_along_the_chain(TcpChannel& channel, Reduction operation, const Tensor& data) {
  const std::size_t total = data.bytes(), width = size_of(data.dtype()), own = static_cast<std::size_t>(rank_);
  auto* const begin = static_cast<std::byte*>(data.data);
  const bool first = rank_ == 0, last = rank_ == size_ - 1;
  std::vector<std::byte> scratch(std::size_t{256} << 10);
  // How far this rank has come: scratch filled; own values added and passed on; results come back and passed on.
  std::size_t filled = 0, added = first ? total : 0, passed = 0, final = 0, returned = 0;
  std::vector<Incoming> incoming;
  std::vector<Outgoing> outgoing;
  if (!first) {
    incoming.push_back({.peer = own - 1,
                        .left = total,
                        .space = [&] { return Bytes(scratch).subspan(filled); },
                        .got =
                            [&](std::size_t count) {
                              filled += count;
                              const std::size_t whole = filled / width * width;
                              attamba::reduce(operation, data.dtype(), scratch.data(), begin + added, whole / width);
                              added += whole;
                              filled -= whole;
                              std::memmove(scratch.data(), scratch.data() + whole, filled);
                              final = last ? added : final;
                            }});
    outgoing.push_back({.peer = own - 1,
                        .left = total,
                        .ready = [&] { return Bytes(begin + returned, final - returned); },
                        .sent = [&](std::size_t count) { returned += count; }});
  }
  if (!last) {
    incoming.push_back({.peer = own + 1,
                        .left = total,
                        .space = [&] { return Bytes(begin + final, total - final); },
                        .got = [&](std::size_t count) { final += count; }});
    outgoing.push_back({.peer = own + 1,
                        .left = total,
                        .ready = [&] { return Bytes(begin + passed, added - passed); },
                        .sent = [&](std::size_t count) { passed += count; }});
  }
  channel.move(incoming, outgoing);
}

void TcpCommunicator::reduce(Side& side, const Call& call, Reduction operation, const Tensor& data) {
  const CollectiveProgress::Inside inside(progress(), side.lane, call);
  meet(side, call, bytes_of(data), bytes_of(data));
  if (!small(call)) {
    reduce_along_the_chain(side.channel, operation, data);
  }
}

void TcpCommunicator::all_reduce_sum(const Tensor& data) {
  comm_checks::in_host_memory("all_reduce_sum", data);
  comm_checks::reducible("all_reduce_sum", data);
  reduce(*foreground_, {Kind::all_reduce_sum, data.dtype(), 0, data.bytes()}, Reduction::sum, data);
}

std::unique_ptr<Request> TcpCommunicator::start_all_reduce_sum(const Tensor& data) {
  comm_checks::in_host_memory("start_all_reduce_sum", data);
  comm_checks::reducible("start_all_reduce_sum", data);
  return worker_->post([this, data] {
    reduce(*background_, {Kind::start_all_reduce_sum, data.dtype(), 0, data.bytes()}, Reduction::sum, data);
  });
}

void TcpCommunicator::all_reduce_max(const Tensor& data) {
  comm_checks::in_host_memory("all_reduce_max", data);
  comm_checks::reducible("all_reduce_max", data);
  reduce(*foreground_, {Kind::all_reduce_max, data.dtype(), 0, data.bytes()}, Reduction::max, data);
}

void TcpCommunicator::broadcast(const Tensor& data, int root) {
  comm_checks::in_host_memory("broadcast", data);
  comm_checks::broadcastable(data, root, size_);
  const Call call{Kind::broadcast, data.dtype(), root, data.bytes()};
  const CollectiveProgress::Inside inside(progress(), foreground_->lane, call);
  meet(*foreground_, call, bytes_of(data), bytes_of(data));
  if (small(call)) {
    return;
  }
  // From the root to both ends of the chain.
  const std::size_t total = data.bytes();
  auto* const begin = static_cast<std::byte*>(data.data);
  std::size_t here = rank_ == root ? total : 0, right = 0, left = 0;
  std::vector<Incoming> incoming;
  std::vector<Outgoing> outgoing;
  if (rank_ != root) {
    incoming.push_back({.peer = static_cast<std::size_t>(rank_ > root ? rank_ - 1 : rank_ + 1),
                        .left = total,
                        .space = [&] { return Bytes(begin + here, total - here); },
                        .got = [&](std::size_t count) { here += count; }});
  }
  if (rank_ >= root && rank_ + 1 < size_) {
    outgoing.push_back({.peer = static_cast<std::size_t>(rank_ + 1),
                        .left = total,
                        .ready = [&] { return Bytes(begin + right, here - right); },
                        .sent = [&](std::size_t count) { right += count; }});
  }
  if (rank_ <= root && rank_ > 0) {
    outgoing.push_back({.peer = static_cast<std::size_t>(rank_ - 1),
                        .left = total,
                        .ready = [&] { return Bytes(begin + left, here - left); },
                        .sent = [&](std::size_t count) { left += count; }});
  }
  foreground_->channel.move(incoming, outgoing);
}

/// Piece by piece: each rank sends every other one its share of that one's part, and adds what comes to its own.
void TcpCommunicator::scatter(Side& side, const Call& call, const Tensor& whole, const Tensor& part) {
  const CollectiveProgress::Inside inside(progress(), side.lane, call);
  meet(side, call, bytes_of(whole), bytes_of(whole));
  const std::size_t ranks = static_cast<std::size_t>(size_), own = static_cast<std::size_t>(rank_), total = part.bytes();
  std::byte* const begin = bytes_of(whole).data();
  std::byte* const place = begin + own * total;
  if (!small(call)) {
    const std::size_t longest =
        std::min(total, std::max(kLeastPieceBytes, kPieceBytes / ranks) / sizeof(double) * sizeof(double));
    std::vector<std::byte> scratch(longest * ranks);
    for (std::size_t offset = 0; offset < total; offset += longest) {
      const std::size_t bytes = std::min(longest, total - offset);
      std::vector<std::size_t> arrived(ranks), sent(ranks);
      std::vector<Incoming> incoming;
      std::vector<Outgoing> outgoing;
      for (std::size_t peer = 0; peer < ranks; ++peer) {
        if (peer == own) {
          continue;
        }
        incoming.push_back(
            {.peer = peer,
             .left = bytes,
             .space = [&, peer] { return Bytes(scratch).subspan(peer * longest + arrived[peer], bytes - arrived[peer]); },
             .got = [&, peer](std::size_t count) { arrived[peer] += count; }});
        outgoing.push_back(
            {.peer = peer,
             .left = bytes,
             .ready = [&, peer] { return Bytes(begin + peer * total + offset + sent[peer], bytes - sent[peer]); },
             .sent = [&, peer](std::size_t count) { sent[peer] += count; }});
      }
      side.channel.move(incoming, outgoing);
      std::memcpy(scratch.data() + own * longest, place + offset, bytes);
      for (std::size_t rank = 1; rank < ranks; ++rank) {
        attamba::reduce(Reduction::sum, part.dtype(), scratch.data() + (rank - 1) * longest, scratch.data() + rank * longest,
                        bytes / size_of(part.dtype()));
      }
      std::memcpy(place + offset, scratch.data() + (ranks - 1) * longest, bytes);
    }
  }
  if (total != 0 && part.data != place) {
    std::memcpy(part.data, place, total);
  }
}

std::unique_ptr<Request> TcpCommunicator::start_reduce_scatter_sum(const Tensor& whole, const Tensor& part) {
  comm_checks::in_host_memory("start_reduce_scatter_sum", whole);
  comm_checks::scatterable("start_reduce_scatter_sum", whole, part, rank_, size_);
  return worker_->post([this, whole, part] {
    scatter(*background_, {Kind::start_reduce_scatter_sum, whole.dtype(), 0, whole.bytes()}, whole, part);
  });
}

void TcpCommunicator::all_gather(const Tensor& whole, const Tensor& part) {
  comm_checks::in_host_memory("all_gather", whole);
  comm_checks::is_part("all_gather", whole, part, rank_, size_);
  gather(*foreground_, {Kind::all_gather, part.dtype(), 0, part.bytes()}, whole, part);
}

std::unique_ptr<Request> TcpCommunicator::start_all_gather(const Tensor& whole, const Tensor& part) {
  comm_checks::in_host_memory("start_all_gather", whole);
  comm_checks::is_part("start_all_gather", whole, part, rank_, size_);
  return worker_->post([this, whole, part] {
    gather(*background_, {Kind::start_all_gather, part.dtype(), 0, part.bytes()}, whole, part);
  });
}

void TcpCommunicator::gather(Side& side, const Call& call, const Tensor& whole, const Tensor& part) {
  const std::size_t bytes = part.bytes();
  auto* const begin = static_cast<std::byte*>(whole.data);
  std::byte* const place = begin + bytes * static_cast<std::size_t>(rank_);
  if (bytes != 0 && place != part.data) {
    std::memcpy(place, part.data, bytes);
  }
  const CollectiveProgress::Inside inside(progress(), side.lane, call);
  meet(side, call, bytes_of(part), bytes_of(whole));
  if (small(call)) {
    return;
  }
  // Each part travels both ways: first one's own, then those of the ranks behind it, the nearest first.
  struct Way {
    Parts in, out;
    std::size_t arrived = 0, sent = 0;
  };
  const auto before = static_cast<std::size_t>(rank_), behind = static_cast<std::size_t>(size_ - 1 - rank_);
  Way right{.in = {begin, bytes, rank_ - 1, -1}, .out = {begin, bytes, rank_, -1}};
  Way left{.in = {begin, bytes, rank_ + 1, 1}, .out = {begin, bytes, rank_, 1}};
  std::vector<Incoming> incoming;
  std::vector<Outgoing> outgoing;
  const auto add_way = [&](Way& way, std::size_t sources, std::size_t from, bool goes_on, std::size_t to) {
    const std::size_t total = sources * bytes;
    if (sources > 0) {
      incoming.push_back({.peer = from,
                          .left = total,
                          .space = [&way, total] { return way.in.at(way.arrived, total); },
                          .got = [&way](std::size_t count) { way.arrived += count; }});
    }
    if (goes_on) {
      outgoing.push_back({.peer = to,
                          .left = total + bytes,
                          .ready =
                              [&way, bytes] {
                                const std::size_t there = bytes + way.arrived;
                                return way.sent == there ? Bytes() : way.out.at(way.sent, there);
                              },
                          .sent = [&way](std::size_t count) { way.sent += count; }});
    }
  };
  add_way(right, before, before - 1, behind > 0, before + 1);
  add_way(left, behind, before + 1, before > 0, before - 1);
  side.channel.move(incoming, outgoing);
}

void TcpCommunicator::barrier() {
  const CollectiveProgress::Inside inside(progress(), foreground_->lane, {});
  meet(*foreground_, {}, {}, {});
}

/// The other ranks find the connections closed.
void TcpCommunicator::abort(int exit_code) {
  std::cout.flush();
  std::fflush(nullptr);
  std::_Exit(exit_code);
}

}  // namespace attamba
