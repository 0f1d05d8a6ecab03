// Asynchronous copies: nobody sees them before their wait, nobody else before a barrier.
#include <cstring>
#include <numeric>

#include "tests/simt/small_kernels.h"

namespace attamba::simt {
namespace {

using namespace attamba::device;
using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr Grid kGrid{.threads = 64, .shared_bytes = 2048};

struct CopyTest : ::testing::Test {
  CopyTest() : source(std::vector<std::uint32_t>(256)), out(256) {
    std::vector<std::uint32_t> values(256);
    std::iota(values.begin(), values.end(), 0u);
    copy_to_device(source.data(), values.data(), 1024);
  }
  static std::byte* place(int stage = 0, int thread = thread_index()) { return dynamic_shared() + 1024 * stage + 16 * thread; }
  const std::uint32_t* from() const { return source.data() + 4 * thread_index(); }

  Global<std::uint32_t> source, out;
};
using EmulatedCopies = CopyTest;

TEST_F(EmulatedCopies, ArriveAfterCommitWaitAndBarrier) {
  expect_fine(kGrid, [&] {
    copy_async_16(place(), from(), true);
    copy_async_commit();
    copy_async_wait<0>();
    sync_block();
    store(reinterpret_cast<Bytes16*>(out.data()) + thread_index(),
          load(reinterpret_cast<const Bytes16*>(place(0, 63 - thread_index()))));
  });
  for (std::uint32_t i = 0; i < 256; ++i) {
    EXPECT_EQ(out.values()[i], (63 - i / 4) * 4 + i % 4);
  }
}

TEST_F(EmulatedCopies, AreZerosWhenInvalidAndReadNothing) {
  expect_fine(kGrid, [&] {
    copy_async_16(place(), nullptr, false);
    copy_async_commit();
    copy_async_wait<0>();
    EXPECT_EQ(load(reinterpret_cast<const Bytes8*>(place())).word[1], 0u);
  });
}

TEST_F(EmulatedCopies, CannotBeReadOrWrittenInFlight) {
  const auto touch = [&](const std::function<void()>& body) {
    return [&, body] {
      copy_async_16(place(), from(), true);
      copy_async_commit();
      body();
      copy_async_wait<0>();
    };
  };
  expect_error(kGrid, touch([] { load(reinterpret_cast<const std::uint32_t*>(place()) + 3); }), HasSubstr("is in flight"));
  expect_error(kGrid, touch([] { store(reinterpret_cast<std::uint32_t*>(place()), 0u); }), HasSubstr("is in flight"));
  expect_error(kGrid, touch([] {
                 sync_block();
                 load(reinterpret_cast<const std::uint32_t*>(place(0, thread_index() ^ 1)));
               }),
               AllOf(HasSubstr("is in flight"), HasSubstr("asynchronous copy of thread ")));
  // The bytes themselves are not there either.
  run(kGrid, touch([] { EXPECT_EQ(std::to_integer<int>(*place()), 0xff); }));
}

TEST_F(EmulatedCopies, NeedTheirCommitAndTheirWait) {
  expect_error(
      kGrid,
      [&] {
        copy_async_16(place(), from(), true);
        copy_async_wait<0>();  // of no group
        load(reinterpret_cast<const std::uint32_t*>(place()));
      },
      HasSubstr("is in flight"));
  const auto two_stages = [&](bool all) {
    for (int stage = 0; stage < 2; ++stage) {
      copy_async_16(place(stage), from(), true);
      copy_async_commit();
    }
    all ? copy_async_wait<0>() : copy_async_wait<1>();
    load(reinterpret_cast<const std::uint32_t*>(place(0)));
    load(reinterpret_cast<const std::uint32_t*>(place(all ? 1 : 0)));
    copy_async_wait<0>();
    load(reinterpret_cast<const std::uint32_t*>(place(1)));
  };
  expect_fine(kGrid, [&] { two_stages(false); });
  expect_fine(kGrid, [&] { two_stages(true); });
  expect_error(
      kGrid,
      [&] {
        for (int stage = 0; stage < 2; ++stage) {
          copy_async_16(place(stage), from(), true);
          copy_async_commit();
        }
        copy_async_wait<1>();
        load(reinterpret_cast<const std::uint32_t*>(place(1)));
      },
      HasSubstr("is in flight"));
}

TEST_F(EmulatedCopies, NeedABarrierForOtherThreads) {
  const auto read_others = [&](bool barrier_before_wait) {
    copy_async_16(place(), from(), true);
    copy_async_commit();
    if (barrier_before_wait) {
      sync_block();
    }
    copy_async_wait<0>();
    load(reinterpret_cast<const std::uint32_t*>(place(0, (thread_index() + 32) % 64)));
  };
  expect_error(
      kGrid, [&] { read_others(true); }, ::testing::AnyOf(HasSubstr("is in flight"), HasSubstr("race with thread ")));
}

TEST_F(EmulatedCopies, NeedABarrierAfterTheReadersOfTheirPlace) {
  const auto reuse = [&](bool barrier) {
    for (int step = 0; step < 2; ++step) {
      copy_async_16(place(), from(), true);
      copy_async_commit();
      copy_async_wait<0>();
      sync_block();
      load(reinterpret_cast<const std::uint32_t*>(place(0, (thread_index() + 32) % 64)));
      if (barrier) {
        sync_block();
      }
    }
  };
  expect_fine(kGrid, [&] { reuse(true); });
  expect_error(
      kGrid, [&] { reuse(false); }, ::testing::AnyOf(HasSubstr("race with thread "), HasSubstr("is in flight")));
}

TEST_F(EmulatedCopies, MustHaveBeenWaitedForAtTheEnd) {
  expect_error(
      kGrid,
      [&] {
        copy_async_16(place(), from(), true);
        copy_async_commit();
      },
      HasSubstr("returned with 1 asynchronous copies in flight, the first one never waited for"));
  expect_error(
      kGrid,
      [&] {
        copy_async_16(place(), from(), true);
        copy_async_wait<0>();
      },
      HasSubstr("never committed"));
  // What an earlier block left in flight does not bother the next launch.
  expect_fine(kGrid, [] { store(reinterpret_cast<std::uint32_t*>(place()), 0u); });
}

TEST_F(EmulatedCopies, CheckTheirSourceAndAlignment) {
  const Global<std::uint32_t> fresh(4);
  expect_error(
      kGrid, [&] { copy_async_16(place(), fresh.data(), true); }, HasSubstr("never written"));
  expect_error(
      kGrid, [&] { copy_async_16(place(), source.data() + 256, true); }, HasSubstr("out of bounds"));
  expect_error(
      kGrid, [&] { copy_async_16(place(), source.data() + 1, true); }, HasSubstr("misaligned"));
  expect_error(
      kGrid, [&] { copy_async_16(place() + 8, source.data(), true); }, HasSubstr("misaligned"));
  expect_error(
      kGrid, [&] { copy_async_16(out.data(), source.data(), true); }, HasSubstr("not in shared memory"));
}

}  // namespace
}  // namespace attamba::simt
