// Replaying a program allocates nothing: counted for the tests' own thread, in operator new.
#include <gtest/gtest.h>
#include <malloc.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "tests/models/tiny_model.h"

namespace {

std::atomic<bool> counting{false};
std::atomic<long> allocations{0};

void* counted(std::size_t size) {
  if (counting) {
    ++allocations;
  }
  if (void* memory = std::malloc(size == 0 ? 1 : size)) {
    return memory;
  }
  throw std::bad_alloc();
}

}  // namespace

void* operator new(std::size_t size) {
  return counted(size);
}
void* operator new[](std::size_t size) {
  return counted(size);
}
void operator delete(void* memory) noexcept {
  std::free(memory);
}
void operator delete[](void* memory) noexcept {
  std::free(memory);
}
void operator delete(void* memory, std::size_t) noexcept {
  std::free(memory);
}
void operator delete[](void* memory, std::size_t) noexcept {
  std::free(memory);
}

namespace attamba::testing_support {
namespace {

class Allocations : public testing::TestWithParam<DType> {};

TEST_P(Allocations, AReplayMakesNone) {
  for (const TinyConfig& c : tiny_configs()) {
    TinyModel model(c.config, {.dtype = GetParam(), .batch = {.sequences = 2, .length = 64}});
    model.program().run({});
    model.program().run({});  // libraries have made what they keep
    const std::size_t before = mallinfo2().uordblks;
    allocations = 0;
    counting = true;
    for (int replay = 0; replay < 5; ++replay) {
      model.program().run({});
    }
    counting = false;
    const std::size_t after = mallinfo2().uordblks;
    EXPECT_EQ(allocations, 0) << c.name << ": calls of operator new in five replays";
    EXPECT_LE(after, before) << c.name << ": bytes in use grew over five replays";
  }
}

INSTANTIATE_TEST_SUITE_P(Types, Allocations, testing::Values(DType::float32, DType::bfloat16, DType::float64),
                         [](const auto& test) { return std::string(name_of(test.param)); });

}  // namespace
}  // namespace attamba::testing_support
