// Ranks that talk through MPI, from host memory.
//
// Who ends the job when a rank fails: the launcher owns the communicator outside of its `try`, prints the exception and calls
// abort(code). Should an exception pass through the scope that owns the communicator after all, the destructor aborts the job
// with exit code 1, because finalising MPI would wait for ranks that are still inside a collective.
#pragma once

// The C++ bindings that Open MPI 4 and MPICH still carry are neither used nor linked.
#define OMPI_SKIP_MPICXX 1
#define MPICH_SKIP_MPICXX 1
#include <mpi.h>

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "comm/collective_call.h"
#include "comm/communicator.h"
#include "comm/launch_environment.h"
#include "comm/ordered_worker.h"

namespace attamba {

/// Every collective begins with a meeting: a non-blocking exchange of what each rank is about to do, polled with growing
/// sleeps, so that ranks which wait for a late one leave their core to whoever has work, and ranks that are about to do
/// different things fail instead of hanging. The data then moves in blocking calls on pieces of kPieceBytes.
///
/// Construct and destroy on the thread that runs main; at most one per process, and its groups. Collectives are called from one
/// thread at a time; those in the background use a group of their own and never mix with them.
class MpiCommunicator final : public Communicator {
 public:
  /// Larger pieces fall out of the caches and make MPI allocate (and page in) larger temporary buffers.
  static constexpr std::size_t kPieceBytes = std::size_t{4} << 20;

  explicit MpiCommunicator(const LaunchEnvironment& launch);
  /// A group of ranks of another one.
  explicit MpiCommunicator(MPI_Comm ranks);
  ~MpiCommunicator() override;
  MpiCommunicator(const MpiCommunicator&) = delete;
  MpiCommunicator& operator=(const MpiCommunicator&) = delete;

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
  /// MPI itself: initialised unless somebody else did, and finalised by whom it was initialised.
  struct Session {
    Session();
    ~Session();
    bool owned = false;
  };
  using Call = CollectiveCall;
  using Lane = CollectiveProgress::Lane;

  void join(MPI_Comm ranks);
  void meet(Lane lane, const Call& call);
  void check(int code, const Call& call) const;
  MPI_Comm group_of(Lane lane) const { return lane == Lane::background ? background_ : foreground_; }
  void sum_in_pieces(Lane lane, const Tensor& data, const Call& call);
  void scatter_in_pieces(const Tensor& whole, const Tensor& part, const Call& call);
  void gather_in_pieces(Lane lane, const Tensor& whole, const Tensor& part, const Call& call);

  Session session_;
  MPI_Comm foreground_ = MPI_COMM_NULL;
  MPI_Comm background_ = MPI_COMM_NULL;
  MPI_Op nan_keeping_max_ = MPI_OP_NULL;
  int rank_ = 0;
  int size_ = 1;
  int local_rank_ = 0;
  int local_size_ = 1;
  int first_local_rank_ = 0;
  int hosts_ = 1;
  int exceptions_at_start_ = 0;
  std::unique_ptr<OrderedWorker> worker_;
};

}  // namespace attamba
