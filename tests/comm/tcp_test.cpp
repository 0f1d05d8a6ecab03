// Ranks that find each other over TCP, each a process of its own on the loopback interface, and what they say when one fails.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <functional>
#include <thread>
#include <vector>

#include "comm/tcp_communicator.h"
#include "comm/tcp_socket.h"
#include "src/core/error.h"
#include "tests/core/temporary_folder.h"

namespace attamba {
namespace {

using testing::AllOf;
using testing::HasSubstr;

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// Processes that run at the same time, and what each has to say: what `body` returns, or the message of what it throws.
class Processes {
 public:
  ~Processes() {
    for (const Child& child : children_) {
      if (!child.ended) {
        kill(child.pid, SIGKILL);
        waitpid(child.pid, nullptr, 0);
      }
    }
  }
  pid_t start(const std::function<std::string()>& body) {
    int ends[2];
    EXPECT_EQ(pipe(ends), 0);
    const pid_t pid = fork();
    if (pid == 0) {
      close(ends[0]);
      std::string text;
      try {
        text = body();
      } catch (const std::exception& error) {
        text = error.what();
      }
      const bool written = write(ends[1], text.data(), text.size()) == static_cast<ssize_t>(text.size());
      _exit(written ? 0 : 1);
    }
    close(ends[1]);
    children_.push_back({pid, ends[0]});
    return pid;
  }
  /// Of the i-th process, when it has ended.
  std::string said(std::size_t i) {
    Child& child = children_[i];
    std::string text;
    char buffer[512];
    for (ssize_t count; (count = read(child.pipe, buffer, sizeof buffer)) > 0;) {
      text.append(buffer, static_cast<std::size_t>(count));
    }
    close(child.pipe);
    waitpid(child.pid, nullptr, 0);
    child.ended = true;
    return text;
  }

 private:
  struct Child {
    pid_t pid;
    int pipe;
    bool ended = false;
  };
  std::vector<Child> children_;
};

/// A port that nobody used a moment ago.
int free_port() {
  const Socket listener = listen_on({"127.0.0.1", 0});
  return local_endpoint(listener).port;
}

TcpLaunch launch_of(int rank, int size, int port) {
  TcpLaunch launch;
  launch.rank = rank;
  launch.size = size;
  launch.rendezvous = concat("127.0.0.1:", port);
  launch.secret = "right";
  launch.timeout = 20;
  return launch;
}

std::string sum_of_ranks(TcpCommunicator& comm) {
  std::int64_t value = comm.rank();
  comm.all_reduce_sum({&value, {DType::int64, {1}}});
  return concat("sum ", value);
}

TEST(Tcp, RanksMeetAtAnAddressInAnyOrderOfComing) {
  Processes ranks;
  const int port = free_port();
  for (const int rank : {2, 1, 0}) {
    ranks.start([=] {
      std::this_thread::sleep_for(std::chrono::milliseconds(rank == 0 ? 300 : 0));
      TcpCommunicator comm(launch_of(rank, 3, port));
      return concat(sum_of_ranks(comm), ", ", comm.local_rank(), " of ", comm.local_size(), ", ", comm.description());
    });
  }
  for (std::size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(ranks.said(i), concat("sum 3, ", 2 - i, " of 3, TCP, 3 ranks on 1 host (3 on this one)"));
  }
}

TEST(Tcp, ALeftOverFileIsPassedOver) {
  const TemporaryFolder folder;
  const std::string file = folder / "rendezvous";
  // Another job of today waits where the file leads; then the right rank 0 comes and writes a new one.
  Processes ranks;
  const int other = free_port();
  std::ofstream(file) << "attamba 127.0.0.1 " << other << " old-secret\n";
  ranks.start([=] {
    TcpLaunch launch = launch_of(0, 2, other);
    launch.timeout = 3;
    TcpCommunicator comm(launch);
    return std::string("met");
  });
  for (const int rank : {1, 0}) {
    ranks.start([=] {
      std::this_thread::sleep_for(std::chrono::milliseconds(rank == 0 ? 700 : 0));
      TcpLaunch launch = launch_of(rank, 2, 0);
      launch.rendezvous = "file:" + file;
      launch.interface = "lo";
      TcpCommunicator comm(launch);
      return sum_of_ranks(comm);
    });
  }
  EXPECT_THAT(ranks.said(0), HasSubstr("did not come")) << "the other job's rank 0 lets nobody in";
  EXPECT_EQ(ranks.said(1), "sum 1");
  EXPECT_EQ(ranks.said(2), "sum 1");
  EXPECT_FALSE(std::filesystem::exists(file));
}

TEST(Tcp, StrangersAreRefusedAndTheRanksStillMeet) {
  Processes ranks;
  const int port = free_port();
  ranks.start([=] {
    TcpCommunicator comm(launch_of(0, 2, port));
    return sum_of_ranks(comm);
  });
  ranks.start([=] {
    TcpLaunch launch = launch_of(1, 2, port);
    launch.secret = "wrong";
    TcpCommunicator comm(launch);
    return std::string("met");
  });
  EXPECT_THAT(ranks.said(1), AllOf(HasSubstr("rank 1"), HasSubstr("refused"), HasSubstr("wrong secret")));
  ranks.start([=] {
    TcpCommunicator comm(launch_of(1, 3, port));
    return std::string("met");
  });
  EXPECT_THAT(ranks.said(2), HasSubstr("it counts 3 ranks, rank 0 counts 2"));
  {
    const Socket scanner = connect_to({"127.0.0.1", port}, seconds_from_now(5));
    const std::string request = "GET / HTTP/1.0\r\n\r\n";
    EXPECT_TRUE(send_all(scanner, std::as_bytes(std::span(request)), seconds_from_now(5)));
  }
  ranks.start([=] {
    TcpCommunicator comm(launch_of(1, 2, port));
    return sum_of_ranks(comm);
  });
  EXPECT_EQ(ranks.said(3), "sum 1");
  EXPECT_EQ(ranks.said(0), "sum 1");
}

TEST(Tcp, AMissingRankIsNamedByThoseThatCame) {
  Processes ranks;
  const int port = free_port();
  for (const int rank : {0, 2}) {
    ranks.start([=] {
      TcpLaunch launch = launch_of(rank, 4, port);
      launch.timeout = 1.5;
      TcpCommunicator comm(launch);
      return std::string("met");
    });
  }
  EXPECT_THAT(ranks.said(0), AllOf(HasSubstr("of 4 ranks"), HasSubstr("within 1.5 s: 1, 3")));
  EXPECT_THAT(ranks.said(1), AllOf(HasSubstr("rank 2"), HasSubstr("within 1.5 s: 1, 3")));
}

TEST(Tcp, RankZeroThatNeverComesIsNamed) {
  TcpLaunch launch = launch_of(1, 2, free_port());
  launch.timeout = 0.5;
  EXPECT_THAT([&] { TcpCommunicator comm(launch); },
              testing::ThrowsMessage<Error>(AllOf(HasSubstr("did not find rank 0 at 127.0.0.1:"), HasSubstr("nobody waits"))));
}

TEST(Tcp, ATakenPortAndAForeignAddressAreUsageErrors) {
  const Socket taken = listen_on({"127.0.0.1", 0});
  EXPECT_THAT([&] { TcpCommunicator comm(launch_of(0, 2, local_endpoint(taken).port)); },
              testing::ThrowsMessage<UsageError>(AllOf(HasSubstr("is taken"), HasSubstr("ATTAMBA_RENDEZVOUS"))));
  TcpLaunch launch = launch_of(0, 2, 1);
  launch.rendezvous = "192.0.2.1:29500";
  EXPECT_THAT([&] { TcpCommunicator comm(launch); },
              testing::ThrowsMessage<UsageError>(HasSubstr("no address of this machine")));
  launch.rendezvous = "somewhere";
  EXPECT_THAT([&] { TcpCommunicator comm(launch); }, testing::ThrowsMessage<UsageError>(HasSubstr("host:port")));
}

TEST(Tcp, ListensOnTheLoopbackInterfaceAloneWhenRanksMeetThere) {
  const Socket listener = listen_on({"127.0.0.1", 0});
  EXPECT_EQ(local_endpoint(listener).address, "127.0.0.1");
  const std::string outside = address_of_interface("");
  if (!is_loopback(outside)) {
    EXPECT_FALSE(connect_to({outside, local_endpoint(listener).port}, seconds_from_now(1)));
  }
  EXPECT_EQ(address_of_interface("lo"), "127.0.0.1");
  EXPECT_THROW(address_of_interface("no-such-interface"), UsageError);
}

/// Rank 1 of 4 dies by SIGKILL or stops by SIGSTOP while the others are in a large sum; what they say.
std::vector<std::string> others_say(int signal, const char* limit, double& took) {
  Processes ranks;
  const int port = free_port();
  pid_t victim = 0;
  for (int rank = 0; rank < 4; ++rank) {
    const pid_t pid = ranks.start([=] {
      setenv("ATTAMBA_TIMEOUT", limit, 1);
      const auto comm = std::make_unique<TcpCommunicator>(launch_of(rank, 4, port));
      comm->barrier();
      if (rank == 1) {
        std::this_thread::sleep_for(std::chrono::seconds(60));
      }
      std::vector<float> values(1 << 20);
      try {
        comm->all_reduce_sum({values.data(), {DType::float32, {1 << 20}}});
        return std::string("got through");
      } catch (const Error& error) {
        return std::string(error.what());
      }
    });
    victim = rank == 1 ? pid : victim;
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(500));
  kill(victim, signal);
  const double start = seconds();
  std::vector<std::string> said;
  for (const std::size_t rank : {0, 2, 3}) {
    said.push_back(ranks.said(rank));
  }
  took = seconds() - start;
  return said;
}

TEST(Tcp, ARankThatDiesIsNamedByAllWithinSeconds) {
  double took = 0;
  const std::vector<std::string> said = others_say(SIGKILL, "600", took);
  EXPECT_THAT(said, testing::Each(AllOf(HasSubstr("all_reduce_sum of 4194304 bytes of float32 (number 2)"),
                                        HasSubstr("rank 1 on "), HasSubstr("has gone"))));
  EXPECT_LT(took, 10);
}

TEST(Tcp, ARankThatHangsRunsIntoTheTimeLimit) {
  double took = 0;
  const std::vector<std::string> said = others_say(SIGSTOP, "1", took);
  // Rank 0 waits for rank 1's announcement; the others for rank 0, until it has left.
  EXPECT_THAT(said[0], AllOf(HasSubstr("nothing came from rank 1"), HasSubstr("ATTAMBA_TIMEOUT")));
  EXPECT_LT(took, 10);
}

}  // namespace
}  // namespace attamba
