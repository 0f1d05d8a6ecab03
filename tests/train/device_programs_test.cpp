// Programs of a device that reduce over ranks: recorded only when the communicator allows it, and told of to its watchdog.
#include <gtest/gtest.h>

#include "comm/communicator.h"
#include "kernels/kernels.h"
#include "src/train/programs.h"
#include "tests/core/fake_device.h"

namespace attamba {
namespace {

/// Two equal ranks, of which this is one.
class Twins final : public Communicator {
 public:
  explicit Twins(bool recordable) : recordable_(recordable) {}
  int rank() const override { return 0; }
  int size() const override { return 2; }
  int local_rank() const override { return 0; }
  int local_size() const override { return 2; }
  std::string description() const override { return "test"; }
  void all_reduce_sum(const Tensor&) override {}
  std::unique_ptr<Request> start_all_reduce_sum(const Tensor& data) override {
    struct Done final : Request {
      void wait() override {}
    };
    on_device += data.device == Device::cuda ? 1 : 0;
    ++started;
    return std::make_unique<Done>();
  }
  void all_reduce_max(const Tensor&) override {}
  void broadcast(const Tensor&, int) override {}
  void all_gather(const Tensor&, const Tensor&) override {}
  void barrier() override {}
  bool recordable() const override { return recordable_; }
  void work_enqueued() override { ++enqueued; }
  [[noreturn]] void abort(int) override { throw Error("abort"); }

  int started = 0, on_device = 0, enqueued = 0;

 private:
  bool recordable_;
};

struct Outcome {
  int recordings = 0;
  Twins twins;
};

Outcome three_steps_of_two_micro_batches(bool recordable) {
  auto owned = std::make_unique<FakeDevice>(FakeDevice::Queue::immediate);
  const FakeDevice& device = *owned;
  set_runtime(Device::cuda, std::move(owned));
  kernels::set_backend(Device::cuda, kernels::on(Device::cpu));  // the fake device's memory is the host's
  ModelConfig config;
  config.vocab_size = 40;
  config.dim = 32;
  config.n_layers = 1;
  config.n_heads = 2;
  config.ffn_dim = 48;
  config.ssm = {.hidden = 16, .state = 4, .heads = 2};
  config.chunking = {.strategy = "uniform", .size = 4, .leading_tokens = 2};
  const auto chunking = make_model_chunking(config);
  Outcome outcome{.twins = Twins(recordable)};
  ModelPrograms programs(
      {.model = config, .chunking = chunking.get(), .micro_batch = {1, 16}, .global_batch = 4, .device = Device::cuda},
      outcome.twins);
  programs.initialize(1);
  const std::vector<std::int32_t> window(17, 3);
  for (int step = 0; step < 3; ++step) {
    programs.inputs().write(window, {}, {}, 0, 0);
    programs.accumulate();
    programs.finish_step(1e-3, step, false);
  }
  outcome.recordings = device.recordings;
  return outcome;
}

TEST(DevicePrograms, ReductionsGoToTheCommunicatorAsDeviceMemoryAndAreRecordedWhereItAllows) {
  const Outcome outcome = three_steps_of_two_micro_batches(true);
  EXPECT_EQ(outcome.recordings, 2) << "accumulate and closing";
  EXPECT_GT(outcome.twins.started, 0);
  EXPECT_EQ(outcome.twins.on_device, outcome.twins.started);
  EXPECT_EQ(outcome.twins.enqueued, 3) << "once a step";
}

TEST(DevicePrograms, ReductionsThatCannotBeRecordedRunOneByOne) {
  const Outcome outcome = three_steps_of_two_micro_batches(false);
  EXPECT_EQ(outcome.recordings, 1) << "accumulate alone";
  EXPECT_EQ(outcome.twins.enqueued, 3);
}

}  // namespace
}  // namespace attamba
