// For the emulator's own tests: kernels written in place, and what becomes of them.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/launch_kernel.h"
#include "kernels/device/block.h"
#include "tests/simt/device_memory.h"
#include "tests/simt/emulator.h"

namespace attamba::simt {

using kernels::cuda::Grid;

inline void run(const Grid& grid, const std::function<void()>& body) {
  kernels::cuda::emulate("small_kernel", nullptr, nullptr, grid, body);
}

/// Device memory of `count` elements, written by the host when there are values.
template <class T>
class Global {
 public:
  explicit Global(std::size_t count) : memory_(count * sizeof(T)) {}
  explicit Global(const std::vector<T>& values) : Global(values.size()) {
    copy_to_device(memory_.data(), values.data(), memory_.size());
  }
  T* data() const { return reinterpret_cast<T*>(memory_.data()); }
  std::vector<T> values() const {
    std::vector<T> values(memory_.size() / sizeof(T));
    copy_from_device(values.data(), memory_.data(), memory_.size());
    return values;
  }

 private:
  DeviceMemory memory_;
};

inline void expect_usable() {
  Global<std::uint32_t> sum(std::vector<std::uint32_t>{0});
  run({.x = 3, .threads = 64, .shared_bytes = 256}, [&] {
    auto* shared = device::SharedMemory().take<std::uint32_t>(64);
    const int i = device::thread_index();
    device::store(shared + i, static_cast<std::uint32_t>(i));
    device::sync_block();
    device::atomic_add(sum.data(), device::shuffle_xor(device::load(shared + 63 - i), 1));
  });
  EXPECT_EQ(sum.values()[0], 3u * 2016u);
}

/// Restores the options that a test changes.
class WithOptions {
 public:
  explicit WithOptions(const Options& changed) : before_(std::exchange(options(), changed)) {}
  WithOptions(const WithOptions&) = delete;
  WithOptions& operator=(const WithOptions&) = delete;
  ~WithOptions() { options() = before_; }

 private:
  Options before_;
};

constexpr std::uint64_t kSeeds = 8;

/// The kernel is refused with such a message, after which the emulator works.
template <class Matcher>
void expect_error(const Grid& grid, const std::function<void()>& body, const Matcher& message, std::uint64_t seed) {
  Options changed = options();
  changed.seed = seed;
  const WithOptions scope(changed);
  try {
    run(grid, body);
    ADD_FAILURE() << "nothing was found wrong with seed " << seed;
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), ::testing::StartsWith("small_kernel: block ("));
    EXPECT_THAT(error.what(), message) << "seed " << seed;
  }
  expect_usable();
}

/// The same under several orders.
template <class Matcher>
void expect_error(const Grid& grid, const std::function<void()>& body, const Matcher& message) {
  for (std::uint64_t seed = 0; seed < kSeeds; ++seed) {
    expect_error(grid, body, message, seed);
  }
}

inline void expect_fine(const Grid& grid, const std::function<void()>& body) {
  for (std::uint64_t seed = 0; seed < kSeeds; ++seed) {
    Options changed = options();
    changed.seed = seed;
    const WithOptions scope(changed);
    EXPECT_NO_THROW(run(grid, body)) << "seed " << seed;
  }
}

}  // namespace attamba::simt
