// Stackful coroutines: a switch is a few nanoseconds, and AddressSanitizer is told of it.
#pragma once

#include <cstddef>
#include <vector>

namespace attamba::simt {

/// Where a flow of control is suspended; one of them belongs to the stack of the caller, the others to fibers.
struct Context {
  void* handle = nullptr;
  const void* stack = nullptr;  ///< lowest address, and size: for AddressSanitizer
  std::size_t stack_bytes = 0;
  void* fake_stack = nullptr;
};

/// Suspends the running flow, which is `from`, and resumes `to`.
void switch_context(Context& from, Context& to);

/// Makes `context` that of the calling thread's own stack.
void describe_own_stack(Context& context);

/// Stacks with a guard page below each, kept for the next block. A fiber never returns: it is switched away from for good.
class FiberPool {
 public:
  FiberPool() = default;
  FiberPool(const FiberPool&) = delete;
  FiberPool& operator=(const FiberPool&) = delete;
  ~FiberPool();

  /// Readies a new stack on which the first switch to `context` calls main(), which must not return.
  void start(Context& context, void (*main)());

 private:
  std::vector<void*> stacks_;
};

}  // namespace attamba::simt
