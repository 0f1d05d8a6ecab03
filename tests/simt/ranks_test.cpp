// Programs of a device that reduce over ranks: recorded only when the communicator allows it, and told of to its watchdog.
#include <gtest/gtest.h>

#include "comm/communicator.h"
#include "src/train/programs.h"
#include "tests/simt/emulated_device.h"

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
  std::unique_ptr<Communicator> split(int) override { return nullptr; }
  void all_reduce_sum(const Tensor&) override {}
  std::unique_ptr<Request> start_all_reduce_sum(const Tensor& data) override {
    struct Done final : Request {
      void wait() override {}
    };
    on_device += data.device == Device::cuda ? 1 : 0;
    ++started;
    return std::make_unique<Done>();
  }
  std::unique_ptr<Request> start_reduce_scatter_sum(const Tensor&, const Tensor&) override { return nullptr; }
  std::unique_ptr<Request> start_all_gather(const Tensor&, const Tensor&) override { return nullptr; }
  void all_reduce_max(const Tensor&) override {}
  void broadcast(const Tensor&, int) override {}
  void all_gather(const Tensor&, const Tensor&) override {}
  void barrier() override {}
  bool recordable() const override { return recordable_; }
  void work_enqueued(int) override { ++enqueued; }
  [[noreturn]] void abort(int) override { throw Error("abort"); }

  int started = 0, on_device = 0, enqueued = 0;

 private:
  bool recordable_;
};

/// The sums that a rank asks for in four steps. A recorded program asks for them when it runs for the first time and while it
/// is recorded.
int sums_of_four_steps(bool recordable) {
  simt::connect();
  Twins twins(recordable);
  ModelConfig config;
  config.vocab_size = 40;
  config.dim = 64;
  config.n_layers = 1;
  config.n_heads = 2;
  config.ffn_dim = 48;
  config.ssm = {.hidden = 32, .state = 16, .heads = 2};
  const auto chunking = make_model_chunking(config, 16);
  ModelPrograms programs(
      {.model = config, .chunking = chunking.get(), .micro_batch = {1, 16}, .global_batch = 2, .device = Device::cuda}, twins);
  programs.initialize(1);
  const std::vector<std::int32_t> window(17, 3);
  for (int step = 0; step < 4; ++step) {
    programs.inputs().write(window, {}, {}, 0, 0);
    programs.finish_step(1e-3, step, false);
  }
  EXPECT_EQ(twins.on_device, twins.started);
  EXPECT_EQ(twins.enqueued, 4) << "once a step";
  return twins.started;
}

TEST(RanksOnTheEmulator, SumsOfADevicesMemoryAreRecordedWhereTheCommunicatorAllowsIt) {
  const int step_by_step = sums_of_four_steps(false), recorded = sums_of_four_steps(true);
  EXPECT_GT(step_by_step, 0);
  EXPECT_EQ(step_by_step, 2 * recorded);
}

}  // namespace
}  // namespace attamba
