// How threads run: who waits for whom, in which order, on which stream, and what is counted.
#include "tests/simt/emulator.h"

#include <set>

#include "tests/simt/emulated_stream.h"
#include "tests/simt/small_kernels.h"

namespace attamba::simt {
namespace {

using namespace attamba::device;
using ::testing::AllOf;
using ::testing::AnyOf;
using ::testing::HasSubstr;

ATTAMBA_KERNEL(256, 1) block_sums_kernel(float* out, const float* x, int n) {
  float* partials = SharedMemory().take<float>(block_threads() / kWarp);
  const int i = block_x() * block_threads() + thread_index();
  const float sum = block_sum(i < n ? load(x + i) : 0.0f, partials);
  if (thread_index() == 0) {
    store(out + block_x(), sum);
  }
}

/// Sums of 256 numbers each, of 0, 1, ... 6, 0, 1, ...
std::vector<float> block_sums(std::int64_t blocks, void* stream = nullptr) {
  std::vector<float> values(static_cast<std::size_t>(256 * blocks));
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<float>(i % 7);
  }
  const Global<float> x(values), out(static_cast<std::size_t>(blocks));
  kernels::cuda::launch_kernel("block_sums", block_sums_kernel, {.device = Device::cuda, .stream = stream},
                               {.x = blocks, .threads = 256, .shared_bytes = 32}, out.data(), x.data(),
                               static_cast<int>(values.size()));
  return out.values();
}

TEST(Emulator, RunsAThousandBlocksOfAKernel) {
  const auto sums = block_sums(1024);
  for (std::size_t b = 0; b < sums.size(); ++b) {
    float expected = 0;
    for (std::size_t i = 256 * b; i < 256 * (b + 1); ++i) {
      expected += static_cast<float>(i % 7);
    }
    ASSERT_EQ(sums[b], expected) << "block " << b;
  }
}

TEST(Emulator, TellsThreadsWhereTheyAre) {
  std::set<std::array<int, 4>> seen;
  run({.x = 2, .y = 3, .z = 4, .threads = 33}, [&] {
    EXPECT_EQ(block_threads(), 33);
    EXPECT_EQ(grid_x(), 2);
    EXPECT_EQ(warp_index(), thread_index() / 32);
    seen.insert({block_x(), block_y(), block_z(), thread_index()});
  });
  EXPECT_EQ(seen.size(), 2u * 3 * 4 * 33);
  EXPECT_EQ(*seen.rbegin(), (std::array<int, 4>{1, 2, 3, 32}));
}

TEST(Emulator, RefusesGridsThatNoGpuTakes) {
  for (const Grid& grid :
       {Grid{.threads = 1025}, Grid{.threads = 0}, Grid{.y = 65536}, Grid{.shared_bytes = (227 << 10) + 1}}) {
    EXPECT_THROW(run(grid, [] {}), Error);
  }
  expect_usable();
}

TEST(Emulator, ASeedIsAnOrder) {
  const auto order_with = [](std::uint64_t seed) {
    Options changed = options();
    changed.seed = seed;
    const WithOptions scope(changed);
    std::vector<int> order;
    run({.x = 4, .threads = 128}, [&] {
      order.push_back(block_x() * 128 + thread_index());
      sync_block();
      order.push_back(block_x() * 128 + thread_index());
    });
    return order;
  };
  EXPECT_EQ(order_with(1), order_with(1));
  EXPECT_NE(order_with(1), order_with(2));
  // Neither blocks nor warps nor lanes come first because of their number.
  std::set<int> blocks, warps, lanes;
  for (std::uint64_t seed = 0; seed < 32; ++seed) {
    const int first = order_with(seed)[0];
    blocks.insert(first / 128), warps.insert(first % 128 / 32), lanes.insert(first % 32);
  }
  EXPECT_EQ(blocks.size(), 4u);
  EXPECT_EQ(warps.size(), 4u);
  EXPECT_GT(lanes.size(), 8u);
}

TEST(Emulator, ABarrierHoldsAllThreads) {
  int arrived = 0;
  expect_fine({.threads = 256}, [&] {
    for (int round = 0; round < 5; ++round) {
      ++arrived;
      sync_block();
      EXPECT_EQ(arrived % 256, 0);
      sync_block();
    }
  });
  EXPECT_EQ(arrived, static_cast<int>(kSeeds) * 5 * 256);
  // Threads that have returned are not waited for.
  expect_fine({.threads = 96}, [] {
    if (thread_index() >= 40) {
      sync_block();
    }
  });
}

TEST(Emulator, FindsDivergentBarriers) {
  expect_error(
      {.threads = 64},
      [] {
        if (warp_index() == 0) {
          sync_block();
        } else {
          sync_block();
        }
      },
      AllOf(HasSubstr("divergent"), HasSubstr("sync_block (tests/simt/emulator_test.cpp:")));
  expect_error(
      {.threads = 32},
      [] {
        if (lane_index() < 16) {
          sync_block();
        }
        sync_warp();
      },
      AllOf(HasSubstr("divergent"), HasSubstr("sync_block"), HasSubstr("sync_warp")));
}

TEST(Emulator, FindsDivergentWarps) {
  expect_error(
      {.threads = 64},
      [] {
        if (lane_index() < 16) {
          shuffle(1.0f, 0);
        } else {
          shuffle(1.0f, 0);
        }
      },
      AllOf(HasSubstr("divergent: it is at shuffle"), AnyOf(HasSubstr("0-15 are at"), HasSubstr("are at shuffle"))));
  expect_error(
      {.threads = 32}, [] { lane_index() == 3 ? static_cast<void>(ballot(true)) : sync_warp(); },
      AllOf(HasSubstr("divergent"), HasSubstr("ballot"), HasSubstr("sync_warp")));
  expect_error(
      {.threads = 32},
      [] {
        if (lane_index() != 31) {
          sync_warp();
        }
      },
      AllOf(HasSubstr("divergent"), AnyOf(HasSubstr("31 have returned"), HasSubstr("the end of the kernel"))));
  expect_error(
      {.threads = 40}, [] { sync_warp(); }, HasSubstr("the warp has only threads 32-39"));
}

TEST(Emulator, PassesOtherExceptionsOnAndUnwindsTheRest) {
  int alive = 0;
  struct Count {
    explicit Count(int& counter) : counter_(counter) { ++counter_; }
    ~Count() { --counter_; }
    int& counter_;
  };
  EXPECT_THROW(run({.threads = 256},
                   [&] {
                     const Count one(alive);
                     sync_block();
                     if (thread_index() == 100) {
                       throw std::bad_alloc();
                     }
                     sync_block();
                   }),
               std::bad_alloc);
  EXPECT_EQ(alive, 0);
  expect_usable();
}

TEST(Emulator, RecordsWhatAStreamCaptures) {
  EmulatedStream stream;
  const Global<std::uint32_t> x(std::vector<std::uint32_t>{1, 0});
  const auto add = [&](std::uint32_t value) {
    kernels::cuda::emulate("add", nullptr, &stream, {.threads = 1}, [=, p = x.data()] { store(p, load(p) + value); });
  };
  add(1);
  stream.finish();
  EXPECT_EQ(x.values()[0], 2u);
  std::vector<std::uint32_t> host{40};
  stream.begin_capture();
  stream.copy_to_device(x.data(), host.data(), 4);
  add(2);
  stream.copy_on_device(x.data() + 1, x.data(), 4);
  stream.copy_from_device(host.data(), x.data(), 4);
  EXPECT_EQ(x.values()[0], 2u);
  const EmulatedGraph graph = stream.end_capture();
  graph.launch();
  EXPECT_THAT(x.values(), ::testing::ElementsAre(42u, 42u));
  graph.launch();
  EXPECT_THAT(x.values(), ::testing::ElementsAre(44u, 44u));
  add(1);
  stream.finish();
  EXPECT_EQ(x.values()[0], 45u);
}

TEST(Emulator, AStreamWorksWhenSomebodyWaitsForIt) {
  EmulatedStream stream;
  const Global<std::uint32_t> x(std::vector<std::uint32_t>{1});
  std::vector<std::uint32_t> host{40};
  const auto add = [&](std::uint32_t value) {
    kernels::cuda::emulate("add", nullptr, &stream, {.threads = 1}, [=, p = x.data()] { store(p, load(p) + value); });
  };
  add(1);
  stream.copy_to_device(x.data(), host.data(), 4);
  host[0] = 50;  // too early: the copy has not read it
  add(2);
  EXPECT_EQ(x.values()[0], 1u);
  stream.finish_copies();
  EXPECT_EQ(x.values()[0], 50u);
  host[0] = 60;
  stream.finish();
  EXPECT_EQ(x.values()[0], 52u);
  add(3);
  stream.run([] { throw std::bad_alloc(); });
  add(4);
  EXPECT_THROW(stream.finish(), std::bad_alloc);
  stream.finish();
  EXPECT_EQ(x.values()[0], 55u) << "what comes after an error is not done";
}

TEST(Emulator, CountsWhatKernelsMove) {
  reset_counters();
  block_sums(3);
  const Counters c = counters("block_sums");
  EXPECT_EQ(c.launches, 1);
  EXPECT_EQ(c.blocks, 3);
  EXPECT_EQ(c.global_loaded, 3 * 256 * 4);
  EXPECT_EQ(c.global_stored, 3 * 4);
  EXPECT_EQ(c.shared_stored, 3 * 8 * 4);
  EXPECT_EQ(c.shared_loaded, 3 * 256 * 8 * 4);
  EXPECT_EQ(c.block_barriers, 3 * 2);
  EXPECT_EQ(c.warp_functions, 3 * 8 * 5);
  EXPECT_EQ(counters("another").launches, 0);
  EXPECT_EQ(total_counters().global_stored, c.global_stored);
  reset_counters();
  EXPECT_EQ(counters("block_sums").launches, 0);
}

}  // namespace
}  // namespace attamba::simt
