// What ranks with GPUs decide before and beside the library that moves their memory; nothing here needs a GPU.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "comm/collective_call.h"
#include "comm/communicator.h"
#include "comm/progress.h"

namespace attamba {

/// Which GPU a rank computes on.
struct GpuOfRank {
  std::string host;  ///< up to 63 bytes, like the others
  std::string gpu;   ///< an identifier that no other GPU in the world has
  std::string name;
  int library_version = 0;
};

/// Every rank's entry, in the order of the ranks. All ranks call it.
std::vector<GpuOfRank> gather_gpus(Communicator& host, const GpuOfRank& own);

/// Throws UsageError with advice when two ranks share a GPU, or run different versions of NCCL.
void require_usable_for_nccl(std::span<const GpuOfRank> ranks);

/// "2.28.9" of NCCL's number for it.
std::string nccl_version_text(int version);

/// "8 GPUs on 2 hosts (NVIDIA H100 80GB HBM3)".
std::string describe_gpus(std::span<const GpuOfRank> ranks);

/// Opens the first of these shared libraries that loads. Throws UsageError that says where it looked, why the last one failed,
/// and `advice`.
void* open_library(std::span<const std::string> places, const std::string& advice);

/// The collectives of a device as a watchdog knows them. They come in pieces of work (one replay of a program), in which each
/// has a position from 1; the device reports a mark when it comes to one and when it has done it, and 0 between pieces. Numbers
/// count a rank's collectives from the start of the run and agree between ranks. One thread enqueues, another watches.
class CollectiveLog {
 public:
  static std::size_t mark_before(std::size_t position) { return 2 * position - 1; }
  static std::size_t mark_after(std::size_t position) { return 2 * position; }

  struct Stuck {
    CollectiveCall call;
    std::int64_t number = 0;  ///< of the collective that comes next
    std::size_t position = 0, of = 0;
    double seconds = 0;  ///< since anything moved
  };

  /// The next collective of the piece being enqueued; returns its position. `recorded`: it runs later, when it is replayed.
  std::size_t add(const CollectiveCall& call, bool recorded, double now);
  /// All of the piece is enqueued: what `add` was told since the last one or, in a replay, since the last one when this one was
  /// recorded; `piece` tells recordings apart. False: there is no collective in it, and it does not count.
  bool close_piece(int piece, double now);
  /// What the device has done: the pieces finished since the last call, and its mark, read after these were counted.
  void observe(std::size_t pieces_finished, std::size_t mark, double now);
  /// Where the device was when it was last observed.
  CollectiveProgress::Position position() const;
  /// The collective that has kept the device for more than `limit` seconds; a limit of 0 is none.
  std::optional<Stuck> stuck(double now, double limit) const;

 private:
  struct Piece {
    std::int64_t first = 1;  ///< number of its first collective
    std::vector<CollectiveCall> collectives;
    double since = 0;
  };
  const Piece* oldest() const;
  void see(const Piece& piece, std::size_t mark);
  std::size_t done() const { return mark_ / 2; }

  mutable std::mutex mutex_;
  std::int64_t next_ = 1;  ///< number of the next piece's first collective
  bool building_ = false;  ///< `add` has been called since the last piece was closed
  bool running_ = false;   ///< ... for collectives that run as they are added
  Piece open_;             ///< the piece being enqueued
  std::map<int, Piece> recorded_;
  std::deque<Piece> enqueued_;
  std::size_t mark_ = 0;
  CollectiveProgress::Position observed_;
  double moved_ = 0;
};

/// "rank 3 of 8 on node7: ..."
std::string describe_stuck(const CollectiveLog::Stuck& stuck, int rank, int size, const std::string& host);

}  // namespace attamba
