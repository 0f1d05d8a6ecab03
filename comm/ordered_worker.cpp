#include "comm/ordered_worker.h"

#include <utility>

#include "src/core/signal_free_thread.h"

namespace attamba {
namespace {

class JobRequest final : public Request {
 public:
  JobRequest(std::shared_future<void> result, CollectiveProgress* progress) : result_(std::move(result)), progress_(progress) {}
  ~JobRequest() override { result_.wait(); }
  void wait() override {
    const CollectiveProgress::Waiting waiting(progress_);
    result_.get();
  }

 private:
  std::shared_future<void> result_;
  CollectiveProgress* progress_;
};

}  // namespace

OrderedWorker::OrderedWorker(CollectiveProgress* progress)
    : progress_(progress), thread_(start_signal_free_thread([this] { run(); })) {}

OrderedWorker::~OrderedWorker() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  posted_.notify_one();
  thread_.join();
}

std::unique_ptr<Request> OrderedWorker::post(std::function<void()> job) {
  std::packaged_task<void()> task(std::move(job));
  auto request = std::make_unique<JobRequest>(task.get_future().share(), progress_);
  {
    const std::lock_guard lock(mutex_);
    queue_.push_back(std::move(task));
  }
  posted_.notify_one();
  return request;
}

void OrderedWorker::run() {
  std::unique_lock lock(mutex_);
  for (;;) {
    posted_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
    if (queue_.empty()) {
      return;
    }
    std::packaged_task<void()> task = std::move(queue_.front());
    queue_.pop_front();
    lock.unlock();
    task();
    lock.lock();
  }
}

}  // namespace attamba
