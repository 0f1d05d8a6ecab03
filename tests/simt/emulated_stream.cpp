#include "tests/simt/emulated_stream.h"

#include <utility>

#include "src/core/error.h"
#include "tests/simt/device_memory.h"

namespace attamba::simt {

void EmulatedStream::begin_capture() {
  require(!capturing_, "stream: a capture has begun already");
  capturing_ = true;
  captured_ = {};
}

EmulatedGraph EmulatedStream::end_capture() {
  require(capturing_, "stream: no capture to end");
  capturing_ = false;
  return std::exchange(captured_, {});
}

void EmulatedStream::run(std::function<void()> step) {
  if (capturing_) {
    captured_.steps_.push_back(std::move(step));
  } else {
    waiting_.push_back(std::move(step));
  }
}

void EmulatedStream::finish(std::size_t steps) {
  to_last_copy_ = to_last_copy_ > steps ? to_last_copy_ - steps : 0;
  for (; steps > 0; --steps) {
    const std::function<void()> step = std::move(waiting_.front());
    waiting_.pop_front();
    try {
      step();
    } catch (...) {
      waiting_.clear();
      to_last_copy_ = 0;
      throw;
    }
  }
}

void EmulatedStream::finish_copies() {
  finish(to_last_copy_);
}

void EmulatedStream::finish() {
  finish(waiting_.size());
}

void EmulatedStream::copy_to_device(void* device, const void* host, std::size_t bytes) {
  run([=] { simt::copy_to_device(device, host, bytes); });
  to_last_copy_ = waiting_.size();
}

void EmulatedStream::copy_from_device(void* host, const void* device, std::size_t bytes) {
  run([=] { simt::copy_from_device(host, device, bytes); });
}

void EmulatedStream::copy_on_device(void* to, const void* from, std::size_t bytes) {
  run([=] { simt::copy_on_device(to, from, bytes); });
}

void EmulatedStream::fill(void* device, unsigned char value, std::size_t bytes) {
  run([=] { simt::fill(device, value, bytes); });
}

void run_on(EmulatedStream* stream, std::function<void()> step) {
  if (stream == nullptr) {
    step();
  } else {
    stream->run(std::move(step));
  }
}

}  // namespace attamba::simt
