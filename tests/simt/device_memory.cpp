#include "tests/simt/device_memory.h"

#include <cstring>
#include <new>

#include "src/core/error.h"
#include "tests/simt/allocation.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes) static_cast<void>(address)
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes) static_cast<void>(address)
#endif

namespace attamba::simt {

namespace {

constexpr std::size_t kAlign = 256;
constexpr std::size_t kKeptBytes = 64 << 20;  ///< of released memory, so that its addresses are not given out again at once
constexpr std::byte kPoison{0xff};

std::uintptr_t address_of(const void* p) {
  return reinterpret_cast<std::uintptr_t>(p);
}

}  // namespace

Allocation::Allocation(std::size_t size)
    : memory(new (std::align_val_t{kAlign}) std::byte[size + 2 * kRedZone]),
      begin(address_of(memory + kRedZone)),
      bytes(size),
      shadow(size) {
  std::memset(memory, static_cast<int>(kPoison), size + 2 * kRedZone);
  ASAN_POISON_MEMORY_REGION(memory, kRedZone);
  ASAN_POISON_MEMORY_REGION(memory + kRedZone + size, kRedZone);
}

Allocation::~Allocation() {
  ASAN_UNPOISON_MEMORY_REGION(memory, bytes + 2 * kRedZone);
  ::operator delete[](memory, std::align_val_t{kAlign});
}

Registry& registry() {
  static Registry registry;
  return registry;
}

Allocation& Registry::add(std::size_t bytes) {
  auto fresh = std::make_unique<Allocation>(bytes);
  auto& place = allocations_[fresh->begin];
  place = std::move(fresh);
  return *place;
}

void Registry::release(void* p) {
  const auto found = allocations_.find(address_of(p));
  require(found != allocations_.end() && !found->second->released, "release: ", p, " is not allocated");
  Allocation& allocation = *found->second;
  allocation.released = true;
  allocation.shadow = Shadow(0);
  ASAN_POISON_MEMORY_REGION(allocation.memory + Allocation::kRedZone, allocation.bytes);
  released_.push_back(allocation.begin);
  released_bytes_ += allocation.bytes;
  while (released_bytes_ > kKeptBytes) {
    const auto oldest = allocations_.find(released_.front());
    released_bytes_ -= oldest->second->bytes;
    allocations_.erase(oldest);
    released_.pop_front();
  }
  recent_.fill(nullptr);
}

const Allocation* Registry::nearest(std::uintptr_t address) const {
  // The red zone in front belongs to the allocation behind it.
  auto after = allocations_.upper_bound(address + Allocation::kRedZone);
  if (after == allocations_.begin()) {
    return nullptr;
  }
  --after;
  if (after->first > address && address < after->first - Allocation::kRedZone) {
    return nullptr;
  }
  return after->second.get();
}

Allocation* Registry::search(std::uintptr_t address) const {
  const auto after = allocations_.upper_bound(address);
  if (after == allocations_.begin()) {
    return nullptr;
  }
  Allocation* allocation = std::prev(after)->second.get();
  return allocation->contains(address) && !allocation->released ? allocation : nullptr;
}

Allocation& Registry::holding(const char* operation, const void* p, std::size_t bytes) {
  Allocation* allocation = search(address_of(p));
  require(allocation != nullptr && allocation->contains(address_of(p), bytes), operation, ": ", bytes, " bytes at ",
          describe(address_of(p), bytes));
  return *allocation;
}

std::string Registry::describe(std::uintptr_t address, std::size_t bytes) const {
  const auto* p = reinterpret_cast<const void*>(address);
  const Allocation* allocation = nearest(address);
  if (allocation == nullptr || address - allocation->begin + Allocation::kRedZone > allocation->bytes + (1 << 20)) {
    return concat(p, ": not in device memory");
  }
  const auto offset = static_cast<std::int64_t>(address - allocation->begin);
  const bool outside = offset < 0 || offset + static_cast<std::int64_t>(bytes) > static_cast<std::int64_t>(allocation->bytes);
  return concat(p, ", offset ", offset, " of an allocation of ", allocation->bytes, " bytes",
                allocation->released ? ": used after release"
                : outside            ? ": out of bounds"
                                     : "");
}

void Registry::forget_times() {
  for (auto& [begin, allocation] : allocations_) {
    allocation->shadow.forget_times();
  }
}

void* allocate(std::size_t bytes) {
  return registry().add(bytes).memory + Allocation::kRedZone;
}

void release(void* p) {
  registry().release(p);
}

void mark_written(void* device, std::size_t bytes) {
  if (bytes > 0) {
    Allocation& allocation = registry().holding("mark_written", device, bytes);
    allocation.shadow.set_written(address_of(device) - allocation.begin, bytes, kHostWrote);
  }
}

void poison(void* device, std::size_t bytes) {
  if (bytes > 0) {
    Allocation& allocation = registry().holding("poison", device, bytes);
    allocation.shadow.set_written(address_of(device) - allocation.begin, bytes, kUnwritten);
    std::memset(device, static_cast<int>(kPoison), bytes);
  }
}

void copy_to_device(void* device, const void* host, std::size_t bytes) {
  mark_written(device, bytes);
  if (bytes > 0) {
    std::memcpy(device, host, bytes);
  }
}

void copy_on_device(void* to, const void* from, std::size_t bytes) {
  if (bytes > 0) {
    registry().holding("copy_on_device", from, bytes);
    mark_written(to, bytes);
    std::memmove(to, from, bytes);
  }
}

void copy_from_device(void* host, const void* device, std::size_t bytes) {
  if (bytes > 0) {
    registry().holding("copy_from_device", device, bytes);
    std::memcpy(host, device, bytes);
  }
}

void fill(void* device, unsigned char value, std::size_t bytes) {
  mark_written(device, bytes);
  if (bytes > 0) {
    std::memset(device, value, bytes);
  }
}

}  // namespace attamba::simt
