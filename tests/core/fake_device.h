// A device whose memory is the host's, and whose queue runs when somebody waits for it: what forgets to wait, or lets go of
// memory too early, reads wrong numbers.
#pragma once

#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "src/core/device.h"

namespace attamba {

class FakeDevice final : public DeviceRuntime {
 public:
  enum class Queue : std::uint8_t { immediate, late };
  explicit FakeDevice(Queue queue) : queue_(queue) {}

  std::string description() const override { return "fake device"; }
  void* stream() override { return this; }
  std::byte* allocate(std::size_t bytes, const std::string& purpose) override {
    if (device_bytes + bytes > limit) {
      throw OutOfMemory("fake memory", purpose, bytes, limit - device_bytes, limit);
    }
    ++allocations;
    device_bytes += bytes;
    return make(bytes);
  }
  void release(std::byte* memory) noexcept override { bury(memory); }
  std::byte* allocate_host(std::size_t bytes, const std::string&) override {
    ++allocations;
    return make(bytes);
  }
  void release_host(std::byte* memory) noexcept override { bury(memory); }
  void copy_to_device(void* device, const void* host, std::size_t bytes) override {
    enqueue([=] { copy(device, host, bytes); });
  }
  void copy_to_host(void* host, const void* device, std::size_t bytes) override {
    enqueue([=] { copy(host, device, bytes); });
  }
  void copy_on_device(void* to, const void* from, std::size_t bytes) override {
    enqueue([=] { copy(to, from, bytes); });
  }
  void clear(void* device, std::size_t bytes) override {
    enqueue([=] { std::memset(device, 0, bytes); });
  }
  void wait_for_copies() override { synchronize(); }
  void synchronize() override {
    const auto work = std::exchange(pending_, {});
    for (const auto& one : work) {
      one();
    }
    graveyard_.clear();
  }
  double seconds_of(const std::function<void()>& body) override {
    body();
    synchronize();
    return 1e-3;
  }
  std::unique_ptr<RecordedWork> record(const std::function<void()>& body) override {
    ++recordings;
    struct Again final : RecordedWork {
      explicit Again(std::function<void()> again) : body(std::move(again)) {}
      void launch() override { body(); }
      std::function<void()> body;
    };
    return std::make_unique<Again>(body);
  }

  void begin_range(const char* name) override { ranges += concat('(', name); }
  void end_range() override { ranges += ')'; }

  int allocations = 0, recordings = 0;
  std::size_t device_bytes = 0;                                 ///< allocated over its life, host memory not counted
  std::size_t limit = std::numeric_limits<std::size_t>::max();  ///< of these
  std::string ranges;  ///< that were begun, each with what was begun and ended inside: "(a(b)(c))"

 private:
  struct Block {
    explicit Block(std::size_t bytes) : memory(bytes == 0 ? 1 : bytes) {}
    std::vector<std::byte> memory;
  };
  static void copy(void* to, const void* from, std::size_t bytes) {
    if (bytes != 0) {
      std::memcpy(to, from, bytes);
    }
  }
  std::byte* make(std::size_t bytes) {
    blocks_.push_back(std::make_unique<Block>(bytes));
    return blocks_.back()->memory.data();
  }
  /// What is in the queue may still use the memory, but finds nothing good there.
  void bury(std::byte* memory) {
    for (auto block = blocks_.begin(); block != blocks_.end(); ++block) {
      if ((*block)->memory.data() == memory) {
        std::memset(memory, 0xff, (*block)->memory.size());
        graveyard_.push_back(std::move(*block));
        blocks_.erase(block);
        return;
      }
    }
  }
  void enqueue(std::function<void()> work) {
    if (queue_ == Queue::immediate) {
      work();
    } else {
      pending_.push_back(std::move(work));
    }
  }

  Queue queue_;
  std::vector<std::function<void()>> pending_;
  std::vector<std::unique_ptr<Block>> blocks_, graveyard_;
};

}  // namespace attamba
