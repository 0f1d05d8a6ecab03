// Checkpoints are whole or absent, and what is damaged is found before anything is loaded.
#include "src/train/checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <csignal>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <vector>

#include "src/core/error.h"
#include "src/core/random.h"

namespace attamba {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

class Checkpoint : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "attamba-checkpoint-XXXXXX").string();
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
    for (std::size_t i = 0; i < weights_.size(); ++i) {
      weights_[i] = static_cast<float>(i) * 0.5f;
    }
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::vector<NamedTensor> tensors() {
    return {{"parameters/layers.0.w", {weights_.data(), {DType::float32, {40, 25}}}},
            {"moment1/layers.0.w", {moments_.data(), {DType::float64, {7}}}}};
  }
  static TrainingState state(std::int64_t step) {
    return {.step = step, .updates = step - 1, .seconds = 1.5, .data_fingerprint = "abc", .configuration = "x = 1\n"};
  }
  static std::string error_of(const std::function<void()>& body) {
    try {
      body();
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  }
  fs::path file(std::int64_t step) const { return checkpoint_path(folder_, step) / "tensors.h5"; }

  fs::path folder_;
  std::vector<float> weights_ = std::vector<float>(1000);
  std::vector<double> moments_ = {1, -2, 3e-300, 4, 5, 6, 7};
};

TEST_F(Checkpoint, ComesBackBitForBit) {
  const std::vector<float> weights = weights_;
  const std::vector<double> moments = moments_;
  save_checkpoint(folder_, state(12), tensors());
  std::fill(weights_.begin(), weights_.end(), -1.0f);
  std::fill(moments_.begin(), moments_.end(), 0.0);
  const auto newest = newest_checkpoint(folder_);
  ASSERT_TRUE(newest.has_value());
  load_tensors(*newest, tensors());
  EXPECT_EQ(weights_, weights);
  EXPECT_EQ(moments_, moments);
  const TrainingState found = read_training_state(*newest);
  EXPECT_EQ(found.step, 12);
  EXPECT_EQ(found.updates, 11);
  EXPECT_EQ(found.seconds, 1.5);
  EXPECT_EQ(found.data_fingerprint, "abc");
  EXPECT_EQ(found.configuration, "x = 1\n");
}

TEST_F(Checkpoint, NoneIsNoneAndTheNewestWholeOneIsTaken) {
  EXPECT_FALSE(newest_checkpoint(folder_ / "nowhere").has_value());
  EXPECT_FALSE(newest_checkpoint(folder_).has_value());
  for (const std::int64_t step : {9, 10, 100}) {
    save_checkpoint(folder_, state(step), tensors());
  }
  EXPECT_EQ(newest_checkpoint(folder_), checkpoint_path(folder_, 100));
  fs::create_directories(folder_ / "step-000000200.unfinished");
  fs::create_directories(folder_ / "step-banana");
  EXPECT_EQ(newest_checkpoint(folder_), checkpoint_path(folder_, 100));
  fs::remove(checkpoint_path(folder_, 100) / "manifest.json");
  EXPECT_EQ(newest_checkpoint(folder_), checkpoint_path(folder_, 10));
}

TEST_F(Checkpoint, EveryFlippedOrMissingByteIsFound) {
  save_checkpoint(folder_, state(1), tensors());
  save_checkpoint(folder_, state(2), tensors());
  const auto size = static_cast<std::int64_t>(fs::file_size(file(2)));
  std::ifstream in(file(2), std::ios::binary);
  const std::string good(std::istreambuf_iterator<char>(in), {});
  RandomStream random(7);
  const auto write = [&](const std::string& bytes) {
    std::ofstream(file(2), std::ios::binary | std::ios::trunc).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  };
  for (int mutation = 0; mutation < 300; ++mutation) {
    std::string bad = good;
    const auto at = static_cast<std::size_t>(random.below(static_cast<std::uint64_t>(size)));
    if (mutation % 3 == 0) {
      bad.resize(at);
    } else {
      bad[at] = static_cast<char>(bad[at] ^ (1 << random.below(8)));
    }
    write(bad);
    ASSERT_EQ(newest_checkpoint(folder_), checkpoint_path(folder_, 1)) << "mutation " << mutation << " at " << at;
  }
  write(good);
  EXPECT_EQ(newest_checkpoint(folder_), checkpoint_path(folder_, 2));
}

TEST_F(Checkpoint, WhenAllAreDamagedItSaysSo) {
  save_checkpoint(folder_, state(1), tensors());
  fs::resize_file(file(1), 10);
  EXPECT_THAT(error_of([&] { newest_checkpoint(folder_); }),
              testing::AllOf(HasSubstr("none is whole"), HasSubstr("tensors.h5"), HasSubstr("10 bytes")));
}

TEST_F(Checkpoint, AFullDiskLeavesTheEarlierOneAndNothingElse) {
  save_checkpoint(folder_, state(1), tensors());
  std::vector<float> big(1 << 20);
  std::vector<NamedTensor> many = tensors();
  many.push_back({"parameters/big", {big.data(), {DType::float32, {1 << 20}}}});
  // The file may not grow beyond 1 MiB, as on a full disk.
  rlimit before{};
  getrlimit(RLIMIT_FSIZE, &before);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit small{1 << 20, before.rlim_max};
  setrlimit(RLIMIT_FSIZE, &small);
  const std::string message = error_of([&] { save_checkpoint(folder_, state(2), many); });
  setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  EXPECT_THAT(message, testing::AllOf(HasSubstr("step 2 was not saved"), HasSubstr("earlier ones are untouched"),
                                      HasSubstr("no room for"), HasSubstr("tensors.h5")));
  EXPECT_EQ(newest_checkpoint(folder_), checkpoint_path(folder_, 1));
  EXPECT_EQ(std::distance(fs::directory_iterator(folder_), fs::directory_iterator()), 1) << "something was left behind";
  save_checkpoint(folder_, state(2), many);
  EXPECT_EQ(newest_checkpoint(folder_), checkpoint_path(folder_, 2));
}

TEST_F(Checkpoint, TheSameStepIsSavedAgainOverAnInterruptedSave) {
  fs::create_directories(checkpoint_path(folder_, 5).string() + ".unfinished");
  std::ofstream(checkpoint_path(folder_, 5).string() + ".unfinished/tensors.h5") << "half";
  save_checkpoint(folder_, state(5), tensors());
  EXPECT_EQ(newest_checkpoint(folder_), checkpoint_path(folder_, 5));
}

TEST_F(Checkpoint, AnotherModelIsRefusedByName) {
  save_checkpoint(folder_, state(1), tensors());
  std::vector<NamedTensor> wider = tensors();
  wider[0].tensor.type.shape = {20, 50};
  EXPECT_THAT(error_of([&] { load_tensors(checkpoint_path(folder_, 1), wider); }),
              testing::AllOf(HasSubstr("layers.0.w"), HasSubstr("[40, 25]"), HasSubstr("[20, 50]")));
  std::vector<NamedTensor> other = tensors();
  other[1].name = "moment2/layers.0.w";
  EXPECT_THAT(error_of([&] { load_tensors(checkpoint_path(folder_, 1), other); }), HasSubstr("moment2/layers.0.w"));
}

TEST_F(Checkpoint, OldOnesAreRemovedButNeverTheNewest) {
  for (std::int64_t step = 1; step <= 5; ++step) {
    save_checkpoint(folder_, state(step), tensors());
  }
  fs::create_directories(folder_ / "step-000000009.unfinished");
  remove_old_checkpoints(folder_, 2);
  EXPECT_TRUE(fs::exists(checkpoint_path(folder_, 5)));
  EXPECT_TRUE(fs::exists(checkpoint_path(folder_, 4)));
  EXPECT_FALSE(fs::exists(checkpoint_path(folder_, 3)));
  EXPECT_FALSE(fs::exists(folder_ / "step-000000009.unfinished"));
  remove_old_checkpoints(folder_, 0);
  EXPECT_TRUE(fs::exists(checkpoint_path(folder_, 4))) << "0 keeps all";
}

}  // namespace
}  // namespace attamba
