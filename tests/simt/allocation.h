// Which allocation an address belongs to.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>

#include "tests/simt/shadow.h"

namespace attamba::simt {

struct Allocation {
  explicit Allocation(std::size_t size);
  ~Allocation();
  Allocation(const Allocation&) = delete;
  Allocation& operator=(const Allocation&) = delete;

  bool contains(std::uintptr_t address) const { return address - begin < bytes; }
  bool contains(std::uintptr_t address, std::size_t count) const {
    return address >= begin && address - begin <= bytes && count <= bytes - (address - begin);
  }

  std::byte* memory = nullptr;  ///< with red zones of kRedZone bytes on both sides
  std::uintptr_t begin = 0;
  std::size_t bytes = 0;
  bool released = false;
  Shadow shadow;

  static constexpr std::size_t kRedZone = 256;
};

class Registry {
 public:
  Allocation& add(std::size_t bytes);
  void release(void* p);
  /// The live allocation that holds the address; null when there is none.
  Allocation* find(std::uintptr_t address) {
    Allocation*& recent = recent_[address >> 10 & (recent_.size() - 1)];
    if (recent == nullptr || !recent->contains(address)) [[unlikely]] {
      Allocation* found = search(address);
      if (found == nullptr) {
        return nullptr;
      }
      recent = found;
    }
    return recent;
  }
  /// Live allocation that holds all of these bytes; throws Error with the name of the operation otherwise.
  Allocation& holding(const char* operation, const void* p, std::size_t bytes);
  /// What is wrong with an access to this address.
  std::string describe(std::uintptr_t address, std::size_t bytes) const;
  void forget_times();

 private:
  Allocation* search(std::uintptr_t address) const;
  /// The allocation, released ones too, whose red zones the address lies between, or the last one that starts below it.
  const Allocation* nearest(std::uintptr_t address) const;

  std::map<std::uintptr_t, std::unique_ptr<Allocation>> allocations_;  ///< by first address; released ones too, for a while
  std::deque<std::uintptr_t> released_;
  std::size_t released_bytes_ = 0;
  std::array<Allocation*, 64> recent_{};
};

Registry& registry();

}  // namespace attamba::simt
