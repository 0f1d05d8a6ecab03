// Threads, warps and blocks that touch the same place.
#include "tests/simt/small_kernels.h"

namespace attamba::simt {
namespace {

using namespace attamba::device;
using ::testing::AllOf;
using ::testing::AnyOf;
using ::testing::HasSubstr;

std::uint32_t* words() {
  return reinterpret_cast<std::uint32_t*>(dynamic_shared());
}
std::uint32_t index() {
  return static_cast<std::uint32_t>(thread_index());
}

constexpr Grid kTwoWarps{.threads = 64, .shared_bytes = 256};
constexpr Grid kOneWarp{.threads = 32, .shared_bytes = 256};

TEST(EmulatedRaces, AReaderNeedsABarrierAfterTheWriter) {
  const auto read_neighbour = [](bool barrier) {
    store(words() + thread_index(), index());
    if (barrier) {
      sync_block();
    }
    EXPECT_EQ(load(words() + (thread_index() + 32) % 64), (index() + 32) % 64);
  };
  // Either the reader comes first, and finds nothing, or the writer does.
  expect_error(
      kTwoWarps, [&] { read_neighbour(false); },
      AnyOf(HasSubstr("never written"), AllOf(HasSubstr("race with thread "), HasSubstr("which writes it"))));
  expect_fine(kTwoWarps, [&] { read_neighbour(true); });
}

TEST(EmulatedRaces, AWriterNeedsABarrierAfterTheReaders) {
  const auto overwrite = [](bool barrier) {
    store(words() + thread_index(), index());
    sync_block();
    load(words() + 5);
    if (barrier) {
      sync_block();
    }
    if (thread_index() == 5) {
      store(words() + 5, 0u);
    }
  };
  expect_error(
      kTwoWarps, [&] { overwrite(false); }, HasSubstr("race with thread "));
  expect_fine(kTwoWarps, [&] { overwrite(true); });
}

TEST(EmulatedRaces, OneReaderAmongManyIsNotForgotten) {
  // The writer itself is the last reader, of its own warp or of all.
  expect_error(
      kTwoWarps,
      [] {
        if (thread_index() == 0) {
          store(words(), 1u);
        }
        sync_block();
        if (warp_index() == 1) {
          load(words());
          if (lane_index() == 31) {
            load(words());
            store(words(), 2u);
          }
        }
      },
      AllOf(HasSubstr("race with thread "), HasSubstr("store")));
}

TEST(EmulatedRaces, TwoWritersOfOnePlace) {
  const Global<float> x(1);
  expect_error(
      kTwoWarps, [&] { store(x.data(), 1.0f); },
      AllOf(HasSubstr("store"), HasSubstr("which writes it with no barrier in between")));
  expect_fine(kTwoWarps, [&] {
    for (int i = 0; i < 64; ++i) {
      if (thread_index() == i) {
        store(x.data(), 1.0f);
      }
      sync_block();
    }
  });
}

TEST(EmulatedRaces, WithinAWarpSyncWarpIsEnough) {
  const auto read_neighbour = [](bool barrier) {
    store(words() + thread_index(), index());
    if (barrier) {
      sync_warp();
    }
    EXPECT_EQ(load(words() + (thread_index() ^ 1)), index() ^ 1);
  };
  expect_error(
      kOneWarp, [&] { read_neighbour(false); }, AnyOf(HasSubstr("race with thread "), HasSubstr("never written")));
  expect_fine(kOneWarp, [&] { read_neighbour(true); });
  expect_fine(kTwoWarps, [&] { read_neighbour(true); });
  expect_error(
      kTwoWarps,
      [] {
        store(words() + thread_index(), index());
        sync_warp();
        load(words() + (thread_index() ^ 32));
      },
      AnyOf(HasSubstr("race with thread "), HasSubstr("never written")));
}

TEST(EmulatedRaces, ShufflesOrderMemoryUnlessToldOtherwise) {
  const auto kernel = [] {
    store(words() + thread_index(), index());
    shuffle(index(), 0);
    load(words() + (thread_index() ^ 1));
  };
  Options changed = options();
  changed.shuffles_order_memory = true;
  {
    const WithOptions scope(changed);
    expect_fine(kOneWarp, kernel);
  }
  changed.shuffles_order_memory = false;
  const WithOptions scope(changed);
  expect_error(kOneWarp, kernel, HasSubstr("race with thread "));
}

TEST(EmulatedRaces, BlocksKeepApart) {
  const Global<float> x(std::vector<float>(4, 0)), y(std::vector<float>(4, 0));
  const Grid blocks{.x = 4, .threads = 32};
  expect_error(
      blocks,
      [&] {
        if (thread_index() == 0) {
          store(x.data(), 1.0f);
        }
      },
      AllOf(HasSubstr("race with another block"), HasSubstr("writes")));
  // All read, one of them writes: before, between or after the others.
  expect_error(
      blocks,
      [&] {
        if (thread_index() == 0) {
          load(x.data());
          if (block_x() == 2) {
            store(x.data(), 1.0f);
          }
        }
      },
      HasSubstr("race with another block"));
  expect_fine(blocks, [&] { load(x.data()); });
  expect_fine(blocks, [&] {
    if (thread_index() == 0) {
      store(x.data() + block_x(), load(y.data() + block_x()));
    }
  });
  expect_fine(blocks, [&] {
    if (thread_index() == 0) {
      store(y.data() + block_x(), load(x.data() + 3 - block_x()));
    }
  });
}

TEST(EmulatedRaces, AtomicsMeetEachOtherButNothingElse) {
  const auto counter = [] { return Global<std::uint32_t>(std::vector<std::uint32_t>{0}); };
  const auto sum = counter();
  run({.x = 4, .threads = 64}, [&] { atomic_add(sum.data(), 1); });
  EXPECT_EQ(sum.values()[0], 256u);
  const Global<std::int64_t> wide(std::vector<std::int64_t>{5});
  run({.x = 2, .threads = 64}, [&] { atomic_add(wide.data(), thread_index() % 2 == 0 ? -3 : 1); });
  EXPECT_EQ(wide.values()[0], 5 - 2 * 64);

  expect_error(
      {.threads = 64}, [&] { thread_index() == 40 ? load(sum.data()) : atomic_add(sum.data(), 1); },
      HasSubstr("race with thread "));
  expect_error(
      {.x = 2, .threads = 32}, [&] { block_x() == 0 ? load(sum.data()) : atomic_add(sum.data(), 1); },
      HasSubstr("race with another block"));
  // A counter in shared memory that one thread clears.
  const auto clear_and_count = [](bool barrier) {
    if (thread_index() == 0) {
      store(words(), 0u);
    }
    if (barrier) {
      sync_block();
    }
    atomic_add(words(), 1);
    sync_block();
    EXPECT_EQ(load(words()), 64u);
  };
  expect_fine(kTwoWarps, [&] { clear_and_count(true); });
  expect_error(
      kTwoWarps, [&] { clear_and_count(false); }, AnyOf(HasSubstr("race with thread "), HasSubstr("never written")));
}

/// Partial sums of all blocks, added up by the block that counts last.
struct LastBlock {
  enum class Fence { each_thread, after_barrier, none, before_store };
  static constexpr int kBlocks = 8, kThreads = 64;

  void run_once(Fence fence, bool count, bool reset) const {
    if (fence == Fence::before_store) {
      fence_device();
    }
    store(partials.data() + block_x() * kThreads + thread_index(), index());
    if (fence == Fence::each_thread) {
      fence_device();
    }
    sync_block();
    if (thread_index() == 0) {
      if (fence == Fence::after_barrier) {
        fence_device();
      }
      const std::uint32_t before = count ? atomic_add(counter.data(), 1) : 0;
      store(words(), std::uint32_t{before + 1 == kBlocks});
    }
    sync_block();
    if (load(words()) != 0 || !count) {
      std::uint32_t sum = 0;
      for (int b = 0; b < kBlocks; ++b) {
        sum += load(partials.data() + b * kThreads + thread_index());
      }
      store(sums.data() + thread_index(), sum);
      if (reset && thread_index() == 0) {
        store(counter.data(), 0u);
      }
    }
  }

  Global<std::uint32_t> partials{kBlocks * kThreads}, sums{kThreads}, counter{std::vector<std::uint32_t>{0}};
  Grid grid{.x = kBlocks, .threads = kThreads, .shared_bytes = 16};
};

TEST(EmulatedRaces, TheLastBlockMayReadWhatOthersReleased) {
  for (const auto fence : {LastBlock::Fence::each_thread, LastBlock::Fence::after_barrier}) {
    const LastBlock last;
    expect_fine(last.grid, [&] { last.run_once(fence, true, true); });
    for (std::uint32_t i = 0; i < LastBlock::kThreads; ++i) {
      EXPECT_EQ(last.sums.values()[i], LastBlock::kBlocks * i);
    }
  }
}

TEST(EmulatedRaces, TheLastBlockNeedsFenceAndCounter) {
  const LastBlock last;
  const auto expect_race = [&](const std::function<void()>& kernel) {
    const std::vector<std::uint32_t> zeros(LastBlock::kBlocks * LastBlock::kThreads);
    for (std::uint64_t seed = 0; seed < kSeeds; ++seed) {
      copy_to_device(last.counter.data(), zeros.data(), 4);
      copy_to_device(last.partials.data(), zeros.data(), 4 * zeros.size());
      expect_error(last.grid, kernel, HasSubstr("race with another block"), seed);
    }
  };
  expect_race([&] { last.run_once(LastBlock::Fence::none, true, false); });
  expect_race([&] { last.run_once(LastBlock::Fence::before_store, true, false); });
  // Without the counter every block takes itself for the last one.
  expect_race([&] { last.run_once(LastBlock::Fence::each_thread, false, false); });
}

TEST(EmulatedRaces, LaunchesFollowEachOther) {
  const Global<float> x(std::vector<float>(64, 0)), y(64);
  for (int i = 0; i < 3; ++i) {
    expect_fine({.x = 2, .threads = 32}, [&] { store(x.data() + block_x() * 32 + thread_index(), 1.0f); });
    expect_fine({.x = 2, .threads = 32}, [&] {
      store(y.data() + block_x() * 32 + thread_index(), load(x.data() + (1 - block_x()) * 32 + thread_index()));
    });
  }
}

}  // namespace
}  // namespace attamba::simt
