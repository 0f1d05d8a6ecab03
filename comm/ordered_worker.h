// A thread that runs what it is given, one job after the other.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <thread>

#include "comm/communicator.h"

namespace attamba {

class OrderedWorker {
 public:
  /// `progress`, which outlives the worker and its requests, hears when a request is waited for; it may be null.
  explicit OrderedWorker(CollectiveProgress* progress = nullptr);
  /// Finishes all posted jobs first.
  ~OrderedWorker();
  OrderedWorker(const OrderedWorker&) = delete;
  OrderedWorker& operator=(const OrderedWorker&) = delete;

  /// Jobs run in the order of the posts. A request's wait() rethrows what the job threw; it may outlive the worker.
  std::unique_ptr<Request> post(std::function<void()> job);

 private:
  void run();

  CollectiveProgress* progress_;
  std::mutex mutex_;
  std::condition_variable posted_;
  std::deque<std::packaged_task<void()>> queue_;
  bool stopping_ = false;
  std::thread thread_;  ///< last: it uses all of the above
};

}  // namespace attamba
