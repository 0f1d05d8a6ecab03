// The running launch: its block, warps and threads, and who waits where. Internal to the emulator.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels/cuda/launch_kernel.h"
#include "tests/simt/allocation.h"
#include "tests/simt/emulator.h"
#include "tests/simt/fiber.h"

namespace attamba::simt {

using device::kWarp;
using device::Site;
using kernels::cuda::Grid;

constexpr int kMostThreads = 1024;
constexpr std::size_t kMostShared =
    99 << 10;  ///< what a block of sm_86 may have: the least of the architectures that are built

enum class WarpFunction : std::uint8_t {
  shuffle,
  shuffle_xor,
  shuffle_up,
  shuffle_down,
  ballot,
  sync_warp,
  load_matrix_x4,
  load_matrix_x4_transposed,
  mma_16x8x16
};

/// A lane's arguments of the warp function that it waits in, and its result.
struct Lane {
  std::uint32_t value = 0;  ///< in and out
  int operand = 0;
  const void* row = nullptr;
  std::uint32_t* loaded = nullptr;
  float* d = nullptr;
  const std::uint32_t *a = nullptr, *b = nullptr;
};

struct AsyncCopy {
  std::uint32_t to;     ///< offset in shared memory
  std::uint32_t group;  ///< number of commits before it
  device::Bytes16 bytes;
  Site site;
};

struct Warp {
  std::uint32_t all = 0, runnable = 0, in_function = 0, at_barrier = 0, returned = 0;  ///< sets of lanes
  WarpFunction function{};
  Site site;
  std::uint64_t epoch = 0;         ///< warp functions since the last sync_block, shifted as in a Stamp
  Stamp first_atomic = ~Stamp{0};  ///< when a lane first did an atomic_add in this block
  int turn = 0;                    ///< lanes run in order from this one on
  std::array<Lane, kWarp> lanes;
};

struct Thread {
  Context context;
  int index = 0, lane = 0;
  Warp* warp = nullptr;
  Stamp bits = 0;             ///< of its stamps: index and number of fences
  Stamp last_fence = 0;       ///< its stamp then; 0: none in this block
  bool did_atomic = false;    ///< in this block
  bool inside = false;        ///< has begun the kernel and not returned from it
  Site site;                  ///< of the barrier that it waits at
  std::uint32_t commits = 0;  ///< of asynchronous copies
  std::vector<AsyncCopy> copies;
};

/// What a block gave to others with fence_device and then atomic_add: a thread's accesses before the stamps listed here.
struct Release {
  std::uint64_t first_epoch = 0, last_epoch = 0;  ///< of the block
  std::vector<Stamp> before;                      ///< by thread: its own accesses
  std::vector<Stamp> fences;                      ///< of the threads that called atomic_add, latest of each
};

class Machine {
 public:
  Machine();
  void run(const std::string& name, const Grid& grid, const std::function<void()>& body);

  // What the running thread calls.
  Thread& current() { return *current_; }
  const Grid& grid() const { return grid_; }
  const std::array<int, 3>& block() const { return block_; }
  std::byte* shared() const { return shared_; }
  Shadow& shared_shadow() { return *shared_shadow_; }
  Counters& counters() { return *counters_; }
  bool checks() const { return checks_; }
  Stamp stamp(const Thread& thread) const { return epoch_ << kEpochShift | thread.warp->epoch | thread.bits; }
  Now now(const Thread& thread, bool shared) const {
    return {stamp(thread), block_first_, shared ? block_first_ : launch_first_, shared};
  }
  Thread& thread(int index) { return threads_[static_cast<std::size_t>(index)]; }

  /// Enters the arguments of a lane; returns when all lanes of the warp have, and the function is done.
  void meet(WarpFunction function, Site site, const Lane& arguments);
  void sync_block(Site site);
  void fence();
  void atomic_done();

  bool ordered_between_blocks(Stamp other, bool atomic) const;
  bool knows_other_blocks() const;

  /// Throws Error out of the launch.
  template <class... Parts>
  [[noreturn]] void fail(const Thread& thread, const Site* site, const Parts&... parts) const {
    throw Error(concat(where(&thread), parts..., site == nullptr ? "" : site_text(*site)));
  }
  static std::string site_text(const Site& site);

 private:
  static void fiber_main();
  void check_grid() const;
  void prepare_threads();
  void run_block(std::int64_t index);
  void run_threads();
  void abandon();
  void thread_returned();
  void next_epoch();
  void release_barrier();
  Warp& random_warp();
  /// Who runs next, of this warp if it can; null when no thread can.
  Thread* pick(Warp& preferred);
  /// Lets others run until someone picks the running thread.
  void suspend(Warp& preferred);
  void leave(Thread& thread, Thread* next);
  std::uint32_t random();
  void complete(Warp& warp);
  std::string where(const Thread* thread) const;
  std::string stuck() const;
  [[noreturn]] void diverged(const Thread& thread, const char* function, Site site) const;

  std::string name_;
  Grid grid_;
  const std::function<void()>* body_ = nullptr;
  Counters* counters_ = nullptr;
  bool checks_ = true, shuffles_order_memory_ = false;
  std::array<int, 3> block_{};

  Context host_;
  Thread* current_ = nullptr;
  std::exception_ptr error_;
  bool abandoning_ = false;

  std::array<Warp, kMostThreads / kWarp> warps_;
  std::uint32_t ready_ = 0;  ///< warps with runnable lanes
  int live_ = 0, at_barrier_ = 0;
  Site barrier_site_;
  std::uint64_t random_state_ = 0;

  std::uint64_t epoch_ = 1;
  Stamp block_first_ = 0, launch_first_ = 0;
  bool fenced_ = false, fenced_in_epoch_ = false;
  std::uint64_t first_atomic_epoch_ = 0;
  std::vector<Release> releases_;  ///< of this launch, in the order of blocks

  std::byte* shared_ = nullptr;
  std::unique_ptr<Shadow> shared_shadow_;
  std::vector<Thread> threads_;
  std::vector<std::uint32_t> order_;
  FiberPool fibers_;
};

extern Machine machine;

Counters& counters_of(const std::string& kernel);
std::map<LaunchShape, std::int64_t>& all_launches();
std::string name_of(WarpFunction function);
/// Computes the function for all lanes of a warp (warp_functions.cpp).
void compute(WarpFunction function, Warp& warp, Thread* lane0, const Site& site);

}  // namespace attamba::simt
