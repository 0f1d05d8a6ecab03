#include "tests/simt/fiber.h"

#include <pthread.h>
#include <sys/mman.h>

#include <boost/context/detail/fcontext.hpp>

#include "src/core/error.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace attamba::simt {

namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr std::size_t kStackBytes = 256 << 10;
#else
constexpr std::size_t kStackBytes = 64 << 10;
#endif
constexpr std::size_t kGuardBytes = 4096;

void (*fiber_main)() = nullptr;

/// What a switch does on arrival: the flow that was left notes where it stands.
void arrive(boost::context::detail::transfer_t from, [[maybe_unused]] void* fake_stack) {
  static_cast<Context*>(from.data)->handle = from.fctx;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

void begin(boost::context::detail::transfer_t from) {
  arrive(from, nullptr);
  fiber_main();
}

}  // namespace

void switch_context(Context& from, Context& to) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
  const auto back = boost::context::detail::jump_fcontext(to.handle, &from);
  arrive(back, from.fake_stack);
}

void describe_own_stack([[maybe_unused]] Context& context) {
#ifdef __SANITIZE_ADDRESS__
  pthread_attr_t attributes;
  void* lowest = nullptr;
  require(pthread_getattr_np(pthread_self(), &attributes) == 0, "fibers: the thread's stack is unknown");
  pthread_attr_getstack(&attributes, &lowest, &context.stack_bytes);
  pthread_attr_destroy(&attributes);
  context.stack = lowest;
#endif
}

FiberPool::~FiberPool() {
  for (void* stack : stacks_) {
    munmap(stack, kGuardBytes + kStackBytes);
  }
}

void FiberPool::start(Context& context, void (*main)()) {
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  require(memory != MAP_FAILED && mprotect(memory, kGuardBytes, PROT_NONE) == 0, "fibers: no memory for a stack");
  // Stacks that all began at the same offset within a page would compete for the same few lines of the cache.
  const std::size_t shift = stacks_.size() % 31 * 128;
  stacks_.push_back(memory);
  context.stack = static_cast<std::byte*>(memory) + kGuardBytes;
  context.stack_bytes = kStackBytes - shift;
  fiber_main = main;
  context.handle = boost::context::detail::make_fcontext(static_cast<std::byte*>(memory) + kGuardBytes + context.stack_bytes,
                                                         context.stack_bytes, begin);
}

}  // namespace attamba::simt
