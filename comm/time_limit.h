// Calls that other ranks can make wait for ever.
#pragma once

#include <chrono>
#include <future>
#include <optional>
#include <thread>
#include <type_traits>
#include <utility>

namespace attamba {

/// What `work` returns or throws, or nothing when it is not done after `limit` seconds (0: there is none). It runs on a thread
/// of its own, which then goes on alone: `work` owns what it uses, or refers to what lives as long as the process.
template <class Work>
std::optional<std::invoke_result_t<Work&>> within(double limit, Work work) {
  std::packaged_task<std::invoke_result_t<Work&>()> task(std::move(work));
  auto result = task.get_future();
  std::thread(std::move(task)).detach();
  if (limit > 0 && result.wait_for(std::chrono::duration<double>(limit)) != std::future_status::ready) {
    return std::nullopt;
  }
  return result.get();
}

}  // namespace attamba
