#include "comm/ordered_worker.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <vector>

#include "src/core/error.h"

namespace attamba {
namespace {

TEST(OrderedWorker, RunsJobsInTheOrderOfThePosts) {
  std::vector<int> order;
  std::vector<std::unique_ptr<Request>> requests;
  OrderedWorker worker;
  for (int i = 0; i < 100; ++i) {
    requests.push_back(worker.post([&order, i] { order.push_back(i); }));
  }
  requests.back()->wait();
  ASSERT_EQ(order.size(), 100u);
  for (int i = 0; i < 100; ++i) {
    EXPECT_EQ(order[i], i);
  }
}

TEST(OrderedWorker, PostDoesNotWaitForTheJob) {
  std::promise<void> gate;
  OrderedWorker worker;
  // The job can only end after post() has returned.
  const auto request = worker.post([&gate] { gate.get_future().wait(); });
  gate.set_value();
  request->wait();
}

TEST(OrderedWorker, WaitRethrowsEveryTimeAndLaterJobsStillRun) {
  OrderedWorker worker;
  const auto bad = worker.post([] { throw Error("lost"); });
  bool ran = false;
  const auto good = worker.post([&ran] { ran = true; });
  EXPECT_THROW(bad->wait(), Error);
  EXPECT_THROW(bad->wait(), Error);
  good->wait();
  EXPECT_TRUE(ran);
}

TEST(OrderedWorker, DestroyingARequestWaitsAndSwallowsTheError) {
  std::atomic<bool> finished = false;
  OrderedWorker worker;
  {
    const auto request = worker.post([&finished] {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      finished = true;
      throw Error("nobody asked");
    });
  }
  EXPECT_TRUE(finished);
}

TEST(OrderedWorker, FinishesItsJobsBeforeItEndsAndRequestsOutliveIt) {
  std::atomic<int> finished = 0;
  std::vector<std::unique_ptr<Request>> requests;
  {
    OrderedWorker worker;
    for (int i = 0; i < 5; ++i) {
      requests.push_back(worker.post([&finished] {
        std::this_thread::sleep_for(std::chrono::milliseconds(2));
        ++finished;
      }));
    }
  }
  EXPECT_EQ(finished, 5);
  for (const auto& request : requests) {
    request->wait();
  }
}

TEST(OrderedWorker, LeavesSignalsToTheOtherThreads) {
  OrderedWorker worker;
  sigset_t blocked;
  worker.post([&blocked] { pthread_sigmask(SIG_SETMASK, nullptr, &blocked); })->wait();
  EXPECT_EQ(sigismember(&blocked, SIGUSR1), 1);
  EXPECT_EQ(sigismember(&blocked, SIGTERM), 1);
  sigset_t own;
  pthread_sigmask(SIG_SETMASK, nullptr, &own);
  EXPECT_EQ(sigismember(&own, SIGUSR1), 0) << "the caller's own mask was not restored";
}

}  // namespace
}  // namespace attamba
