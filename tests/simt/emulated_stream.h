// A stream as kernels' launches carry it (Launch::stream), and graphs captured from one.
#pragma once

#include <cstddef>
#include <deque>
#include <functional>
#include <vector>

namespace attamba::simt {

/// Work recorded from a stream, with the arguments it had then.
class EmulatedGraph {
 public:
  void launch() const {
    for (const auto& step : steps_) {
      step();
    }
  }
  std::size_t size() const { return steps_.size(); }

 private:
  friend class EmulatedStream;
  std::vector<std::function<void()>> steps_;
};

/// Does things in order and as late as a device may: when somebody waits for them. While it captures nothing is done, and
/// recorded instead.
class EmulatedStream {
 public:
  void begin_capture();
  EmulatedGraph end_capture();
  bool capturing() const { return capturing_; }

  void run(std::function<void()> step);
  void copy_to_device(void* device, const void* host, std::size_t bytes);
  void copy_from_device(void* host, const void* device, std::size_t bytes);
  void copy_on_device(void* to, const void* from, std::size_t bytes);
  void fill(void* device, unsigned char value, std::size_t bytes);

  /// Returns when all copies to the device are done, and what came before them.
  void finish_copies();
  /// Returns when everything is done; throws what failed, and drops what came after it.
  void finish();

 private:
  void finish(std::size_t steps);

  bool capturing_ = false;
  EmulatedGraph captured_;
  std::deque<std::function<void()>> waiting_;
  std::size_t to_last_copy_ = 0;  ///< steps that wait, up to the last copy to the device
};

/// Without a stream, at once.
void run_on(EmulatedStream* stream, std::function<void()> step);

}  // namespace attamba::simt
