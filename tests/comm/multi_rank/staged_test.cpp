// Sums of a device's memory through host memory: the same bits as the host's own, whenever the device gets round to its work.
#include "comm/staged_communicator.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "src/core/storage.h"
#include "tests/comm/multi_rank/world.h"
#include "tests/core/fake_device.h"

namespace attamba {
namespace {

constexpr std::int64_t kSizes[] = {0, 1, 3, 1000, 100'003};

template <class T>
Tensor view(std::vector<T>& values) {
  return {values.data(), {kDTypeOf<T>, {static_cast<std::int64_t>(values.size())}}};
}

template <class T>
std::vector<T> values_of(int rank, std::int64_t n) {
  std::vector<T> values(static_cast<std::size_t>(n));
  for (std::int64_t i = 0; i < n; ++i) {
    values[i] = static_cast<T>(1000 * std::sin(static_cast<double>(i) * 0.37 + rank * 1.7));
  }
  return values;
}

/// Values that are put into the device's memory without waiting, and a way to look at them later.
template <class T>
class OnDevice {
 public:
  explicit OnDevice(std::vector<T> values) : host_(std::move(values)), memory_(Device::cuda, host_.size() * sizeof(T), "test") {
    runtime(Device::cuda).copy_to_device(memory_.data(), host_.data(), memory_.size());
  }
  Tensor tensor() const { return {memory_.data(), {kDTypeOf<T>, {static_cast<std::int64_t>(host_.size())}}, Device::cuda}; }
  std::vector<T> read() const {
    const HostCopy copy(tensor());
    const auto values = copy.tensor().template span<T>();
    return {values.begin(), values.end()};
  }

 private:
  std::vector<T> host_;
  Memory memory_;
};

template <class T>
bool same_bytes(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

class Staged : public testing::TestWithParam<FakeDevice::Queue> {
 protected:
  void SetUp() override {
    auto device = std::make_unique<FakeDevice>(GetParam());
    device_ = device.get();
    set_runtime(Device::cuda, std::move(device));
  }
  FakeDevice* device_ = nullptr;
};
INSTANTIATE_TEST_SUITE_P(Queues, Staged, testing::Values(FakeDevice::Queue::immediate, FakeDevice::Queue::late),
                         [](const auto& test) { return test.param == FakeDevice::Queue::late ? "late" : "immediate"; });

template <class T>
void expect_the_hosts_bits() {
  StagedCommunicator staged(world());
  for (const std::int64_t n : kSizes) {
    const std::vector<T> own = values_of<T>(world().rank(), n);
    std::vector<T> sum = own, largest = own;
    world().all_reduce_sum(view(sum));
    world().all_reduce_max(view(largest));

    const OnDevice<T> front(own), behind(own), max(own);
    const auto request = staged.start_all_reduce_sum(behind.tensor());
    staged.all_reduce_sum(front.tensor());
    staged.all_reduce_max(max.tensor());
    request->wait();
    EXPECT_TRUE(same_bytes(front.read(), sum)) << n;
    EXPECT_TRUE(same_bytes(behind.read(), sum)) << n;
    EXPECT_TRUE(same_bytes(max.read(), largest)) << n;
  }
}

TEST_P(Staged, ReductionsHaveTheHostsBits) {
  expect_the_hosts_bits<float>();
  expect_the_hosts_bits<double>();
  expect_the_hosts_bits<std::int32_t>();
  expect_the_hosts_bits<std::int64_t>();
}

TEST_P(Staged, StepsOfManySumsReuseTheirBuffers) {
  StagedCommunicator staged(world());
  constexpr int kBuckets = 5;
  for (int step = 0; step < 3; ++step) {
    std::vector<std::unique_ptr<OnDevice<float>>> buckets;
    std::vector<std::unique_ptr<Request>> requests;
    for (int b = 0; b < kBuckets; ++b) {
      buckets.push_back(std::make_unique<OnDevice<float>>(values_of<float>(world().rank() + step, 1000 * (b + 1))));
    }
    const int before = device_->allocations;
    for (const auto& bucket : buckets) {
      requests.push_back(staged.start_all_reduce_sum(bucket->tensor()));
    }
    for (auto request = requests.rbegin(); request != requests.rend(); ++request) {
      (*request)->wait();
    }
    requests.clear();
    EXPECT_EQ(device_->allocations - before, step == 0 ? kBuckets : 0) << "step " << step;
    for (int b = 0; b < kBuckets; ++b) {
      std::vector<float> expected = values_of<float>(world().rank() + step, 1000 * (b + 1));
      world().all_reduce_sum(view(expected));
      EXPECT_TRUE(same_bytes(buckets[b]->read(), expected)) << "step " << step << ", bucket " << b;
    }
  }
}

TEST_P(Staged, BroadcastAndGatherMoveADevicesBytes) {
  StagedCommunicator staged(world());
  for (const std::int64_t n : kSizes) {
    std::vector<std::int32_t> expected;
    for (int rank = 0; rank < world().size(); ++rank) {
      const auto part = values_of<std::int32_t>(rank, n);
      expected.insert(expected.end(), part.begin(), part.end());
    }
    const OnDevice<std::int32_t> whole(std::vector<std::int32_t>(expected.size())),
        part(values_of<std::int32_t>(world().rank(), n));
    staged.all_gather(whole.tensor(), part.tensor());
    EXPECT_TRUE(same_bytes(whole.read(), expected)) << n;
    for (int root = 0; root < world().size(); ++root) {
      const OnDevice<std::int32_t> data(values_of<std::int32_t>(world().rank(), n));
      staged.broadcast(data.tensor(), root);
      EXPECT_TRUE(same_bytes(data.read(), values_of<std::int32_t>(root, n))) << n << " from " << root;
    }
  }
}

template <class T>
void expect_parts_and_wholes() {
  StagedCommunicator staged(world());
  for (int step = 0; step < 2; ++step) {  // buffers are used again
    for (const std::int64_t n : kSizes) {
      std::vector<T> sum = values_of<T>(world().rank() + step, n * world().size());
      const OnDevice<T> whole(sum), part(std::vector<T>(static_cast<std::size_t>(n))), gathered(std::vector<T>(sum.size()));
      std::vector<T> own(static_cast<std::size_t>(n)), all(sum.size());
      const auto scattered = staged.start_reduce_scatter_sum(whole.tensor(), part.tensor());
      world().start_reduce_scatter_sum(view(sum), view(own))->wait();
      scattered->wait();
      const auto gathering = staged.start_all_gather(gathered.tensor(), part.tensor());
      world().start_all_gather(view(all), view(own))->wait();
      gathering->wait();
      EXPECT_TRUE(same_bytes(part.read(), own)) << n;
      EXPECT_TRUE(same_bytes(gathered.read(), all)) << n;
    }
  }
}

TEST_P(Staged, PartsOfSumsAndWholesOfPartsHaveTheHostsBits) {
  expect_parts_and_wholes<float>();
  expect_parts_and_wholes<double>();
  expect_parts_and_wholes<std::int32_t>();
  expect_parts_and_wholes<std::int64_t>();
}

TEST_P(Staged, APartMayLieAtItsPlaceInTheWhole) {
  StagedCommunicator staged(world());
  constexpr std::int64_t kPart = 1001;
  std::vector<float> values = values_of<float>(world().rank(), kPart * world().size()), sum = values;
  std::vector<float> own(kPart);
  world().start_reduce_scatter_sum(view(sum), view(own))->wait();
  std::vector<float> all(values.size());
  world().all_gather(view(all), view(own));
  const OnDevice<float> whole(values);
  const Tensor place{whole.tensor().as<float>() + kPart * world().rank(), {DType::float32, {kPart}}, Device::cuda};
  staged.start_reduce_scatter_sum(whole.tensor(), place)->wait();
  staged.start_all_gather(whole.tensor(), place)->wait();
  EXPECT_TRUE(same_bytes(whole.read(), all));
}

TEST_P(Staged, ResultsOutliveTheCommunicatorAndHostMemoryPassesThrough) {
  const OnDevice<float> data(values_of<float>(world().rank(), 5000));
  std::vector<float> sum = values_of<float>(world().rank(), 5000), on_host = sum;
  {
    StagedCommunicator staged(world());
    EXPECT_FALSE(staged.recordable());
    staged.start_all_reduce_sum(data.tensor())->wait();  // the copy back is in the queue when the buffers go
    const int before = device_->allocations;
    staged.start_all_reduce_sum(view(on_host))->wait();
    EXPECT_EQ(device_->allocations, before);
  }
  world().all_reduce_sum(view(sum));
  EXPECT_TRUE(same_bytes(data.read(), sum));
  EXPECT_TRUE(same_bytes(on_host, sum));
}

TEST_P(Staged, TransportsOfTheHostRefuseADevicesMemory) {
  if (world().size() == 1 && world().description().find("no MPI") != std::string::npos) {
    GTEST_SKIP() << "one process has no transport";
  }
  const OnDevice<float> data(std::vector<float>(4));
  EXPECT_THAT([&] { world().all_reduce_sum(data.tensor()); },
              testing::ThrowsMessage<Error>(testing::HasSubstr("in a device's memory")));
  EXPECT_THROW(world().start_all_reduce_sum(data.tensor()), Error);
  EXPECT_THROW(world().broadcast(data.tensor(), 0), Error);
}

}  // namespace
}  // namespace attamba
