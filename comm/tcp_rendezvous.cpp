#include "comm/tcp_rendezvous.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <random>
#include <set>
#include <span>
#include <thread>

#include "src/core/error.h"

namespace attamba {

namespace {

template <std::size_t N>
using Text = std::array<char, N>;

template <std::size_t N>
void assign(Text<N>& to, const std::string& text) {
  require<UsageError>(text.size() < N, "\"", text, "\" is longer than ", N - 1, " characters");
  to = {};
  std::copy(text.begin(), text.end(), to.begin());
}

/// Zero-ended whatever a stranger has sent.
template <std::size_t N>
std::string text_of(const Text<N>& text) {
  return {text.data(), strnlen(text.data(), N)};
}

/// The first thing that is said on every connection.
struct Hello {
  enum Purpose : std::int32_t { join = 0, foreground = 1, background = 2 };
  Text<8> magic{};
  Text<96> secret{};
  std::int32_t purpose = join, rank = 0, size = 0, port = 0;
  Text<64> host{}, machine{}, address{};
};
constexpr Text<8> kMagic{'A', 'T', 'T', 'A', 'M', 'B', 'A', '1'};

/// Rank 0's answer to those who want to join: refused, or followed by everybody's Hello.
struct Answer {
  std::int32_t refused = 0;
  Text<252> why{};
};

/// For one who has connected to say who it is: strangers may say nothing.
constexpr double kHelloSeconds = 5;

template <class T>
std::span<const std::byte> bytes_of(const T& value) {
  return std::as_bytes(std::span(&value, 1));
}
template <class T>
std::span<std::byte> writable_bytes_of(T& value) {
  return std::as_writable_bytes(std::span(&value, 1));
}

/// Containers may have hosts' names twice; the kernel's boot is one per machine.
std::string own_machine() {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string id;
  std::getline(file, id);
  return id.empty() ? host_name() : id;
}

Endpoint endpoint_of(const std::string& rendezvous) {
  const std::size_t colon = rendezvous.rfind(':');
  int port = 0;
  const char* end = rendezvous.data() + rendezvous.size();
  const bool good = colon != std::string::npos && colon > 0 &&
                    std::from_chars(rendezvous.data() + colon + 1, end, port).ptr == end && port > 0 && port < 65536;
  require<UsageError>(good, "ATTAMBA_RENDEZVOUS is \"", rendezvous,
                      "\"; it must be host:port of rank 0, or file:PATH on a file system that all ranks see");
  std::string host = rendezvous.substr(0, colon);
  if (host.starts_with("[") && host.ends_with("]")) {
    host = host.substr(1, host.size() - 2);
  }
  return {host, port};
}

/// Where rank 0 waits, when that is written to a file.
struct Notice {
  Endpoint endpoint;
  std::string secret;
};

/// Readable by this user alone, and there as a whole or not at all.
void post_notice(const std::string& path, const Notice& notice) {
  std::string temporary = path + ".XXXXXX";
  const int file = mkstemp(temporary.data());
  require<UsageError>(file >= 0, "ATTAMBA_RENDEZVOUS: cannot write ", path, ": ", std::strerror(errno));
  const std::string text = concat("attamba ", notice.endpoint.address, ' ', notice.endpoint.port, ' ', notice.secret, '\n');
  const bool written = write(file, text.data(), text.size()) == static_cast<ssize_t>(text.size());
  const bool closed = close(file) == 0;
  require<UsageError>(written && closed && std::rename(temporary.c_str(), path.c_str()) == 0,
                      "ATTAMBA_RENDEZVOUS: cannot write ", path, ": ", std::strerror(errno));
}

/// Empty while there is none.
Notice read_notice(const std::string& path) {
  std::ifstream file(path);
  std::string word;
  Notice notice;
  return file >> word >> notice.endpoint.address >> notice.endpoint.port >> notice.secret && word == "attamba" ? notice
                                                                                                               : Notice{};
}

class Rendezvous {
 public:
  Rendezvous(const TcpLaunch& launch, Socket listener)
      : launch_(launch), deadline_(seconds_from_now(launch.timeout)), listener_(std::move(listener)) {
    if (launch_.rendezvous.starts_with("file:")) {
      path_ = launch_.rendezvous.substr(5);
    }
    assign(own_.secret, launch_.secret);
    own_.magic = kMagic;
    own_.rank = launch_.rank;
    own_.size = launch_.size;
    assign(own_.host, host_name());
    assign(own_.machine, own_machine());
    everybody_.resize(static_cast<std::size_t>(launch_.size));
  }

  TcpMesh meet() {
    if (launch_.rank == 0) {
      gather();
    } else {
      join();
    }
    return connect_everybody();
  }

 private:
  // ------------------------------------------------------------------------------------------------ rank 0

  void open_listener() {
    if (listener_) {
      return;
    }
    if (!path_.empty()) {
      listener_ = listen_on({address_of_interface(launch_.interface), 0});
      assign(own_.secret, random_secret());
      post_notice(path_, {local_endpoint(listener_), text_of(own_.secret)});
      return;
    }
    Endpoint endpoint = endpoint_of(launch_.rendezvous);
    endpoint.address = launch_.interface.empty() ? resolve(endpoint.address) : address_of_interface(launch_.interface);
    if (is_loopback(endpoint.address) && launch_.several_hosts) {
      endpoint.address = "0.0.0.0";  // a host's own name often leads to its loopback address, where no other host comes
    }
    listener_ = listen_on(endpoint);
  }

  void gather() {
    open_listener();
    std::vector<Socket> joined(everybody_.size());
    everybody_[0] = own_;
    for (std::size_t missing = everybody_.size() - 1; missing > 0;) {
      Socket connection = accept_from(listener_, deadline_);
      if (!connection) {
        give_up(joined);
      }
      Hello hello;
      const std::string wrong = examine(connection, hello, Hello::join);
      const auto rank = static_cast<std::size_t>(hello.rank);
      if (!wrong.empty() || joined[rank]) {
        refuse(connection, wrong.empty() ? concat("rank ", rank, " is there already") : wrong);
        continue;
      }
      everybody_[rank] = hello;
      joined[rank] = std::move(connection);
      --missing;
    }
    for (std::size_t rank = 1; rank < joined.size(); ++rank) {
      const bool told = send_all(joined[rank], bytes_of(Answer{}), deadline_) &&
                        send_all(joined[rank], std::as_bytes(std::span(everybody_)), deadline_);
      require(told, "rank ", rank, " on ", text_of(everybody_[rank].host), " has gone while ranks were meeting");
    }
    if (!path_.empty()) {
      unlink(path_.c_str());
    }
  }

  /// What is wrong with a connection's Hello; empty when nothing is.
  std::string examine(const Socket& connection, Hello& hello, Hello::Purpose purpose) const {
    if (!receive_all(connection, writable_bytes_of(hello), std::min(deadline_, seconds_from_now(kHelloSeconds))) ||
        hello.magic != kMagic) {
      hello.rank = 0;
      return "not a rank of this program";
    }
    const bool in_range = hello.rank > 0 && hello.rank < launch_.size;
    const std::int32_t rank = hello.rank;
    hello.rank = in_range ? rank : 0;
    if (hello.secret != own_.secret) {
      return "wrong secret: a rank of another job, or of an older one (ATTAMBA_SECRET must be the same for all ranks)";
    }
    if (hello.size != launch_.size) {
      return concat("it counts ", hello.size, " ranks, rank ", launch_.rank, " counts ", launch_.size);
    }
    const bool wanted = purpose == Hello::join ? hello.purpose == Hello::join : hello.purpose != Hello::join;
    return in_range && wanted ? "" : concat("rank ", rank, " has no business here");
  }

  /// Whoever comes again and again is reported once.
  void refuse(const Socket& connection, const std::string& why) {
    if (reported_.insert(why).second) {
      std::cerr << "tcp: rank " << launch_.rank << " refused a connection: " << why << std::endl;
    }
    Answer answer{.refused = 1};
    assign(answer.why, why.substr(0, answer.why.size() - 1));
    send_all(connection, bytes_of(answer), std::min(deadline_, seconds_from_now(1)));
  }

  [[noreturn]] void give_up(const std::vector<Socket>& joined) const {
    std::string missing;
    for (std::size_t rank = 1; rank < joined.size(); ++rank) {
      missing += joined[rank] ? "" : concat(missing.empty() ? "" : ", ", rank);
    }
    const std::string why = concat("of ", launch_.size, " ranks these did not come to rank 0 on ", text_of(own_.host),
                                   " within ", launch_.timeout, " s: ", missing);
    Answer answer{.refused = 1};
    assign(answer.why, why.substr(0, answer.why.size() - 1));
    for (const Socket& connection : joined) {
      if (connection) {
        send_all(connection, bytes_of(answer), seconds_from_now(1));
      }
    }
    throw Error("tcp: " + why);
  }

  // ------------------------------------------------------------------------------------------------ the others

  void join() {
    std::string reason = "nobody waits there";
    while (std::chrono::steady_clock::now() < deadline_) {
      Endpoint endpoint;
      if (path_.empty()) {
        endpoint = endpoint_of(launch_.rendezvous);
      } else {
        const Notice notice = read_notice(path_);
        endpoint = notice.endpoint;
        assign(own_.secret, notice.secret);
        reason = endpoint.port == 0 ? "there is no such file, or nothing in it" : reason;
      }
      if (endpoint.port != 0 && try_to_join(endpoint, reason)) {
        return;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
    }
    throw Error(concat("tcp: rank ", launch_.rank, " on ", text_of(own_.host), " did not find rank 0 at ", launch_.rendezvous,
                       " within ", launch_.timeout, " s: ", reason));
  }

  /// False when it is worth trying again, for the reason given.
  bool try_to_join(Endpoint endpoint, std::string& reason) {
    const Socket connection = connect_to(endpoint, std::min(deadline_, seconds_from_now(10)));
    if (!connection) {
      reason = concat("nobody waits at ", endpoint.address, " port ", endpoint.port);
      return false;
    }
    // The interface that leads to rank 0 is the one where the others come.
    const Endpoint here = local_endpoint(connection);
    listener_ = listen_on({here.address, 0});
    assign(own_.address, here.address);
    own_.port = local_endpoint(listener_).port;
    Answer answer;
    // Rank 0 answers when all are there; it gives up first, and says so.
    if (!send_all(connection, bytes_of(own_), deadline_) ||
        !receive_all(connection, writable_bytes_of(answer), deadline_ + std::chrono::seconds(5))) {
      reason = concat(endpoint.address, " port ", endpoint.port, " hung up");
      return false;
    }
    if (answer.refused != 0) {
      reason = text_of(answer.why);
      // What a file says may be left over from another run.
      require(!path_.empty() && reason.starts_with("wrong secret"), "tcp: rank ", launch_.rank, " on ", text_of(own_.host),
              " was refused by rank 0 at ", launch_.rendezvous, ": ", reason);
      return false;
    }
    require(receive_all(connection, std::as_writable_bytes(std::span(everybody_)), deadline_), "tcp: rank 0 at ",
            launch_.rendezvous, " has gone while ranks were meeting");
    assign(everybody_[0].address, endpoint.address);
    everybody_[0].port = endpoint.port;
    return true;
  }

  // ------------------------------------------------------------------------------------------------ everybody

  /// Each rank connects to those before it, and waits for those behind it.
  TcpMesh connect_everybody() {
    TcpMesh mesh;
    for (auto& connections : mesh.connections) {
      connections.resize(everybody_.size());
    }
    for (std::size_t rank = 0; rank < static_cast<std::size_t>(launch_.rank); ++rank) {
      for (const Hello::Purpose purpose : {Hello::foreground, Hello::background}) {
        own_.purpose = purpose;
        Socket connection = connect_to({text_of(everybody_[rank].address), everybody_[rank].port}, deadline_);
        require(connection && send_all(connection, bytes_of(own_), deadline_), "tcp: rank ", launch_.rank, " on ",
                text_of(own_.host), " cannot reach rank ", rank, " on ", text_of(everybody_[rank].host), " at ",
                text_of(everybody_[rank].address), " port ", everybody_[rank].port, "; a firewall?");
        mesh.connections[purpose - 1][rank] = std::move(connection);
      }
    }
    for (std::size_t missing = 2 * (everybody_.size() - 1 - static_cast<std::size_t>(launch_.rank)); missing > 0;) {
      Socket connection = accept_from(listener_, deadline_);
      require(static_cast<bool>(connection), "tcp: rank ", launch_.rank, " on ", text_of(own_.host), " still waited for ",
              missing, " connections after ", launch_.timeout, " s");
      Hello hello;
      const std::string wrong = examine(connection, hello, Hello::foreground);
      const auto channel = static_cast<std::size_t>(std::clamp<std::int32_t>(hello.purpose - 1, 0, 1));
      if (!wrong.empty() || mesh.connections[channel][static_cast<std::size_t>(hello.rank)]) {
        refuse(connection, wrong.empty() ? "that rank is there already" : wrong);
        continue;
      }
      mesh.connections[channel][static_cast<std::size_t>(hello.rank)] = std::move(connection);
      --missing;
    }
    for (const Hello& hello : everybody_) {
      mesh.hosts.push_back(text_of(hello.host));
      mesh.machines.push_back(text_of(hello.machine));
    }
    return mesh;
  }

  const TcpLaunch& launch_;
  const Deadline deadline_;
  std::string path_;  ///< of the file that rank 0 writes; empty when the rendezvous is an address
  Hello own_;
  Socket listener_;
  std::vector<Hello> everybody_;
  std::set<std::string> reported_;
};

}  // namespace

std::string random_secret() {
  std::random_device random;
  std::string text;
  for (int i = 0; i < 8; ++i) {
    text += concat(random(), '.').substr(0, 11);
  }
  return text;
}

TcpMesh meet_over_tcp(const TcpLaunch& launch, Socket listener) {
  require<UsageError>(launch.size > 0 && launch.rank >= 0 && launch.rank < launch.size, "rank ", launch.rank, " of ",
                      launch.size, " ranks does not exist: check ATTAMBA_RANK and ATTAMBA_RANKS");
  if (launch.size == 1) {
    return {
        .hosts = {host_name()}, .machines = {own_machine()}, .connections = {std::vector<Socket>(1), std::vector<Socket>(1)}};
  }
  return Rendezvous(launch, std::move(listener)).meet();
}

}  // namespace attamba
