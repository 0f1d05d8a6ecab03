// Addresses and contents: what a kernel may touch, and what it may read.
#include <array>

#include "tests/simt/shadow.h"
#include "tests/simt/small_kernels.h"

namespace attamba::simt {
namespace {

using namespace attamba::device;
using ::testing::AllOf;
using ::testing::HasSubstr;

TEST(EmulatedMemory, RefusesWhatLiesOutsideOfAnAllocation) {
  const Global<float> x(std::vector<float>(10, 1));
  expect_error(
      {.threads = 32}, [&] { load(x.data() + (thread_index() == 10 ? 10 : 0)); },
      AllOf(HasSubstr("load of 4 bytes"), HasSubstr("offset 40 of an allocation of 40 bytes: out of bounds"),
            HasSubstr("thread 10"), HasSubstr("(tests/simt/memory_test.cpp:")));
  expect_error(
      {.threads = 1}, [&] { store(x.data() - 1, 0.0f); }, HasSubstr("store of 4 bytes"));
  expect_error(
      {.threads = 1}, [&] { store(x.data() - 1, 0.0f); }, HasSubstr("offset -4 of an allocation of 40 bytes"));
  // Aligned, and only its second half is outside.
  expect_error(
      {.threads = 1}, [&] { load(reinterpret_cast<const Bytes16*>(x.data() + 8)); }, HasSubstr("out of bounds"));
  expect_fine({.threads = 1}, [&] { load(x.data() + 9); });
}

TEST(EmulatedMemory, RefusesWhatIsNotTheDevices) {
  std::array<float, 4> host{};
  expect_error(
      {.threads = 1}, [&] { load(host.data()); }, HasSubstr("not in device memory"));
  expect_error(
      {.threads = 1}, [] { load(static_cast<const float*>(nullptr)); }, HasSubstr("not in device memory"));
  EXPECT_THROW(copy_to_device(host.data(), host.data(), 4), Error);
}

TEST(EmulatedMemory, RefusesWhatWasReleased) {
  const float* p = nullptr;
  {
    const Global<float> x(std::vector<float>{1, 2});
    p = x.data();
  }
  expect_error(
      {.threads = 1}, [&] { load(p + 1); }, HasSubstr("offset 4 of an allocation of 8 bytes: used after release"));
}

TEST(EmulatedMemory, RefusesAddressesThatAreNotAligned) {
  const Global<float> x(std::vector<float>(8, 1));
  expect_error(
      {.threads = 1}, [&] { load(reinterpret_cast<const Bytes16*>(x.data() + 2)); },
      AllOf(HasSubstr("load of 16 bytes"), HasSubstr("misaligned")));
  expect_error(
      {.threads = 1, .shared_bytes = 64}, [] { store(reinterpret_cast<std::uint32_t*>(dynamic_shared() + 6), 0u); },
      HasSubstr("store of 4 bytes at offset 6 of shared memory: misaligned"));
}

TEST(EmulatedMemory, KeepsABlockWithinItsSharedMemory) {
  expect_error(
      {.threads = 26, .shared_bytes = 100},
      [] { store(reinterpret_cast<std::uint32_t*>(dynamic_shared()) + thread_index(), 0u); },
      HasSubstr("offset 100 of shared memory: out of bounds, the block has 100 bytes"));
}

TEST(EmulatedMemory, RefusesToReadWhatNobodyWrote) {
  const Global<float> x(8);
  expect_error(
      {.threads = 1}, [&] { load(x.data() + 3); }, HasSubstr("never written"));
  mark_written(x.data() + 2, 8);
  expect_fine({.threads = 1}, [&] { load(x.data() + 3); });
  expect_error(
      {.threads = 1}, [&] { load(x.data() + 4); }, HasSubstr("never written"));
  expect_error(
      {.threads = 1}, [&] { load(reinterpret_cast<const Bytes16*>(x.data())); }, HasSubstr("never written"));
  run({.threads = 1}, [&] { store(x.data() + 4, 1.0f); });
  expect_fine({.threads = 1}, [&] { load(x.data() + 4); });
  poison(x.data(), 32);
  expect_error(
      {.threads = 1}, [&] { load(x.data() + 4); }, HasSubstr("never written"));
  expect_error(
      {.threads = 1}, [&] { atomic_add(reinterpret_cast<std::uint32_t*>(x.data()), 1); }, HasSubstr("never written"));
}

TEST(EmulatedMemory, SharedMemoryIsNewInEachBlock) {
  expect_error(
      {.x = 2, .threads = 1, .shared_bytes = 16},
      [] {
        auto* p = reinterpret_cast<std::uint32_t*>(dynamic_shared());
        store(p, 1u);
        load(p);
        load(p + 1);
      },
      HasSubstr("load of 4 bytes at offset 4 of shared memory: never written"));
  Global<std::uint32_t> found(3);
  run({.x = 3, .threads = 1, .shared_bytes = 16}, [&] {
    auto* p = reinterpret_cast<std::uint32_t*>(dynamic_shared());
    store(found.data() + block_x(), *p);  // on purpose past the checks
    store(p, 1u);
  });
  EXPECT_THAT(found.values(), ::testing::Each(0xffffffffu));
}

TEST(EmulatedMemory, HalvesOfAWordAreTwoPlaces) {
  const Global<std::uint16_t> x(64);
  const Global<std::uint8_t> bytes(64);
  expect_fine({.x = 2, .threads = 32, .shared_bytes = 64}, [&] {
    store(x.data() + 2 * thread_index() + block_x(), static_cast<std::uint16_t>(1));
    store(bytes.data() + 2 * thread_index() + block_x(), static_cast<std::uint8_t>(1));
    auto* shared = reinterpret_cast<std::uint16_t*>(dynamic_shared());
    store(shared + thread_index(), static_cast<std::uint16_t>(thread_index()));
    load(shared + thread_index());
    sync_block();
    load(reinterpret_cast<const Bytes16*>(shared) + thread_index() % 4);
  });
  EXPECT_THAT(x.values(), ::testing::Each(1));
}

TEST(EmulatedMemory, ContentsOutliveTheCountOfTimes) {
  Shadow shadow(64);
  const Now late{kEpochs / 2 << kEpochShift, kEpochs / 2 << kEpochShift, kEpochs / 2 << kEpochShift, false};
  EXPECT_EQ(shadow.store(0, 16, late).verdict, Verdict::fine);
  shadow.forget_times();
  const Now early{Stamp{2} << kEpochShift, Stamp{2} << kEpochShift, Stamp{2} << kEpochShift, false};
  EXPECT_EQ(shadow.load(8, 4, early).verdict, Verdict::fine);
  EXPECT_EQ(shadow.load(16, 4, early).verdict, Verdict::unwritten);
  EXPECT_EQ(shadow.store(8, 4, early).verdict, Verdict::fine);
}

}  // namespace
}  // namespace attamba::simt
