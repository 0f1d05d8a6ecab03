// Ranks that talk over TCP, from host memory: for launchers that start processes and nothing else.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "comm/collective_call.h"
#include "comm/communicator.h"
#include "comm/ordered_worker.h"
#include "comm/reduce.h"
#include "comm/tcp_channel.h"
#include "comm/tcp_rendezvous.h"

namespace attamba {

/// Every rank is connected to every other one, once for the foreground and once for sums in the background.
///
/// Each collective begins at rank 0: all others tell it what they are about to do, and hear when they disagree. Small data
/// travels along, and the result comes with the answer. Large data then moves along the chain of ranks 0, 1, ..., N - 1, in
/// pieces: each rank adds its own to what comes from the left and passes it to the right; from the last rank results travel
/// back, on the other direction of the same connections, while later pieces are still on their way. So each sum is
/// ((x0 + x1) + x2) + ..., whatever its size, and each connection carries the data once in each direction. Sums of which each
/// rank wants a part alone go straight to that rank, which adds them up in the same order.
///
/// Who ends the job when a rank fails: as with MPI (comm/mpi_communicator.h); the other ranks find its connections closed.
class TcpCommunicator final : public Communicator {
 public:
  /// What travels with the announcement.
  static constexpr std::size_t kSmallBytes = std::size_t{16} << 10;
  /// Of a sum in parts, what all ranks send to one at a time together; but not less than the smaller number from each.
  static constexpr std::size_t kPieceBytes = std::size_t{4} << 20, kLeastPieceBytes = std::size_t{64} << 10;

  explicit TcpCommunicator(const TcpLaunch& launch);
  /// A group of ranks of another one; `listener` as for meet_over_tcp.
  TcpCommunicator(const TcpLaunch& launch, Socket listener);
  ~TcpCommunicator() override;
  TcpCommunicator(const TcpCommunicator&) = delete;
  TcpCommunicator& operator=(const TcpCommunicator&) = delete;

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  int local_rank() const override { return local_rank_; }
  int local_size() const override { return local_size_; }
  std::string description() const override;
  int first_local_rank() const override { return first_local_rank_; }
  std::unique_ptr<Communicator> split(int color) override;

  void all_reduce_sum(const Tensor& data) override;
  std::unique_ptr<Request> start_all_reduce_sum(const Tensor& data) override;
  std::unique_ptr<Request> start_reduce_scatter_sum(const Tensor& whole, const Tensor& part) override;
  /// A NaN on any rank gives NaN on all.
  void all_reduce_max(const Tensor& data) override;
  void broadcast(const Tensor& data, int root) override;
  void all_gather(const Tensor& whole, const Tensor& part) override;
  std::unique_ptr<Request> start_all_gather(const Tensor& whole, const Tensor& part) override;
  void barrier() override;
  [[noreturn]] void abort(int exit_code) override;

 private:
  using Call = CollectiveCall;
  /// One thread's side: its connections, and how many collectives it has begun.
  struct Side {
    TcpChannel channel;
    CollectiveProgress::Lane lane;
    std::int64_t begun = 0;
  };

  bool small(const Call& call) const;
  /// Tells rank 0, and hears from it; `result`, where data is small, is what this rank gives, and then what all get.
  void meet(Side& side, const Call& call, std::span<std::byte> own, std::span<std::byte> result);
  void lead(Side& side, const Call& call, std::span<std::byte> result);
  void follow(Side& side, const Call& call, std::span<const std::byte> own, std::span<std::byte> result);
  void reduce(Side& side, const Call& call, Reduction operation, const Tensor& data);
  void reduce_along_the_chain(TcpChannel& channel, Reduction operation, const Tensor& data);
  void scatter(Side& side, const Call& call, const Tensor& whole, const Tensor& part);
  void gather(Side& side, const Call& call, const Tensor& whole, const Tensor& part);

  int rank_ = 0;
  int size_ = 1;
  int local_rank_ = 0;
  int local_size_ = 1;
  int first_local_rank_ = 0;
  int hosts_ = 1;
  double seconds_to_meet_ = 0;
  int exceptions_at_start_ = 0;
  std::unique_ptr<Side> foreground_, background_;
  std::unique_ptr<OrderedWorker> worker_;
};

}  // namespace attamba
