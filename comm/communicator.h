// What ranks say to each other. `comm/` never sees a gradient: it moves typed bytes.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "comm/progress.h"
#include "src/core/tensor.h"

namespace attamba {

/// A collective in flight. Destroying one that was not waited for waits.
class Request {
 public:
  virtual ~Request() = default;
  virtual void wait() = 0;
};

/// One group of ranks. Collectives must be entered by all ranks in the same order; `start_*` may overlap with anything but
/// other use of the same memory. Methods throw Error naming the collective, the rank and the size when the transport fails.
///
/// Host communicators (MPI, TCP) take host memory alone. Those made for a device (staged, NCCL) also take its memory: then a
/// collective is one more piece of the work enqueued there (DeviceRuntime). It sees what was enqueued before it, and what is
/// enqueued after it, or after a request's wait(), sees the result.
class Communicator {
 public:
  virtual ~Communicator() = default;

  virtual int rank() const = 0;
  virtual int size() const = 0;
  virtual int local_rank() const = 0;  ///< rank among those on the same host
  virtual int local_size() const = 0;
  virtual std::string description() const = 0;  ///< for logs: transport, version, ranks per host
  /// The smallest rank on the same host: a number for the host that all its ranks know.
  virtual int first_local_rank() const { return rank() - local_rank(); }
  /// The ranks that give this `color` as a group of their own, in the same order. All ranks call it; the group goes before this
  /// object does.
  virtual std::unique_ptr<Communicator> split(int color) = 0;

  /// Elementwise sum over all ranks, in place. float32, float64, int32 or int64. Integer sums are exact (they wrap), so they do
  /// not depend on the number of ranks.
  virtual void all_reduce_sum(const Tensor& data) = 0;
  /// The same, progressing in the background on a thread of its own, in pieces that the transport likes.
  virtual std::unique_ptr<Request> start_all_reduce_sum(const Tensor& data) = 0;
  /// `part` = rank r's part, the r-th of size() equal ones, of the sum of `whole` over all ranks; in the background. `whole` is
  /// used up: what it holds afterwards is nothing in particular. `part` lies outside of it, or exactly at its own place there.
  /// The types that all_reduce_sum knows; integer sums are exact.
  virtual std::unique_ptr<Request> start_reduce_scatter_sum(const Tensor& whole, const Tensor& part) = 0;
  virtual void all_reduce_max(const Tensor& data) = 0;
  /// Copies `root`'s bytes to everybody.
  virtual void broadcast(const Tensor& data, int root) = 0;
  /// Rank r's `part` lands at part.bytes() * r of `whole`.
  virtual void all_gather(const Tensor& whole, const Tensor& part) = 0;
  /// The same in the background. `part` may already lie at its place in `whole`.
  virtual std::unique_ptr<Request> start_all_gather(const Tensor& whole, const Tensor& part) = 0;
  virtual void barrier() = 0;
  /// Whether the `start_*` and wait() on device memory may be recorded (DeviceRuntime::record) and replayed.
  virtual bool recordable() const { return true; }
  /// Called each time when a piece of work with collectives on device memory has been enqueued: a watchdog counts from here.
  /// `piece` tells recordings apart: the next replay of the same one comes with the same number.
  virtual void work_enqueued([[maybe_unused]] int piece) {}
  /// How far this rank has come with its collectives over the host; a communicator around another one shares the other's.
  virtual CollectiveProgress& progress() { return progress_; }
  /// Ends the whole job at once with this exit code; used when one rank cannot go on. Does not return.
  [[noreturn]] virtual void abort(int exit_code) = 0;

 private:
  CollectiveProgress progress_;
};

/// MPI when this process was started by mpirun, srun or another MPI launcher (recognised by their environment variables,
/// without initialising MPI), TCP when the environment says who the ranks are and there is no MPI (comm/launch_environment.h),
/// otherwise a communicator of one rank that needs neither. Call once per process.
std::unique_ptr<Communicator> make_communicator();

}  // namespace attamba
