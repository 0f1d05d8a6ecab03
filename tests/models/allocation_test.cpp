// Replaying a program allocates nothing: counted in operator new, all threads together. What oneDNN makes for itself with every
// product, where it multiplies bfloat16, is not the program's.
#include <dlfcn.h>
#include <gtest/gtest.h>
#include <malloc.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#include "tests/models/tiny_model.h"

namespace {

std::atomic<bool> counting{false};
std::atomic<long> allocations{0};

bool is_of_onednn(const void* code) {
  Dl_info info{};
  return dladdr(code, &info) != 0 && std::strstr(info.dli_fname, "libdnnl") != nullptr;
}

void* counted(std::size_t size, const void* caller) {
  if (counting && !is_of_onednn(caller)) {
    ++allocations;
  }
  if (void* memory = std::malloc(size == 0 ? 1 : size)) {
    return memory;
  }
  throw std::bad_alloc();
}

}  // namespace

[[gnu::noinline]] void* operator new(std::size_t size) {
  return counted(size, __builtin_return_address(0));
}
[[gnu::noinline]] void* operator new[](std::size_t size) {
  return counted(size, __builtin_return_address(0));
}
[[gnu::noinline]] void operator delete(void* memory) noexcept {
  std::free(memory);
}
[[gnu::noinline]] void operator delete[](void* memory) noexcept {
  std::free(memory);
}
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept {
  std::free(memory);
}
[[gnu::noinline]] void operator delete[](void* memory, std::size_t) noexcept {
  std::free(memory);
}

namespace attamba::testing_support {
namespace {

class Allocations : public testing::TestWithParam<DType> {};

TEST_P(Allocations, AReplayMakesNone) {
  for (const TinyConfig& c : tiny_configs()) {
    TinyModel model(c.config, {.dtype = GetParam(), .batch = {.sequences = 2, .length = 64}});
    model.program().run({});
    model.program().run({});  // libraries have made what they keep for all threads, or nearly
    bool grew = true;         // a leak grows every time
    for (int attempt = 0; attempt < 20 && grew; ++attempt) {
      const std::size_t before = mallinfo2().uordblks;
      allocations = 0;
      counting = true;
      for (int replay = 0; replay < 5; ++replay) {
        model.program().run({});
      }
      counting = false;
      grew = mallinfo2().uordblks > before;
      ASSERT_EQ(allocations, 0) << c.name << ": calls of operator new in five replays";
    }
    EXPECT_FALSE(grew) << c.name << ": bytes in use grow with every five replays";
  }
}

INSTANTIATE_TEST_SUITE_P(Types, Allocations, testing::Values(DType::float32, DType::bfloat16, DType::float64),
                         [](const auto& test) { return std::string(name_of(test.param)); });

}  // namespace
}  // namespace attamba::testing_support
