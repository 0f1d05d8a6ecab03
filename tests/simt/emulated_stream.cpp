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
    step();
  }
}

void EmulatedStream::copy_to_device(void* device, const void* host, std::size_t bytes) {
  run([=] { simt::copy_to_device(device, host, bytes); });
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
