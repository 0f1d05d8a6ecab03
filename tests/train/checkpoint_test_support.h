// A folder for checkpoints, and a state to put into them.
#pragma once

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

#include "comm/single_process.h"
#include "src/core/random.h"
#include "src/train/checkpoint.h"
#include "src/train/programs.h"
#include "tests/core/temporary_folder.h"

namespace attamba {

/// Tensors of several types and sizes, one of them with no divisor in common with any number of ranks, one of a single element.
struct SomeState {
  std::vector<float> weights = std::vector<float>(1000), odd = std::vector<float>(13);
  std::vector<double> moments = std::vector<double>(77);
  std::vector<std::int64_t> one = {0};

  explicit SomeState(std::uint64_t seed = 0) {
    RandomStream random(seed);
    const auto draw = [&](auto& values) {
      for (auto& value : values) {
        value = static_cast<std::decay_t<decltype(value)>>(random.normal() * 100);
      }
    };
    if (seed != 0) {
      draw(weights), draw(odd), draw(moments), draw(one);
    }
  }
  friend bool operator==(const SomeState&, const SomeState&) = default;

  std::vector<NamedTensor> tensors() {
    return {{"parameters/layers.0.w", {weights.data(), {DType::float32, {40, 25}}}},
            {"parameters/norm", {odd.data(), {DType::float32, {13}}}},
            {"moment1/layers.0.w", {moments.data(), {DType::float64, {7, 11}}}},
            {"count", {one.data(), {DType::int64, {1}}}}};
  }
};

class CheckpointTest : public testing::Test {
 protected:
  static TrainingState at_step(std::int64_t step) {
    return {.step = step, .updates = step - 1, .seconds = 1.5, .data_fingerprint = "abc", .configuration = "x = \"\n\"\n"};
  }
  /// Saves as one rank does.
  void save(std::int64_t step, SomeState& state) {
    save_checkpoint(folder_, at_step(step), whole_slices(state.tensors()), alone_);
  }
  std::filesystem::path path(std::int64_t step) const { return checkpoint_path(folder_, step); }
  std::filesystem::path file(std::int64_t step, const char* name = "rank-00000.h5") const { return path(step) / name; }
  /// The step of the newest whole checkpoint; -1: there is none.
  std::int64_t newest() {
    const auto found = newest_checkpoint(folder_, alone_);
    return found ? found->manifest.state.step : -1;
  }
  static std::string error_of(const std::function<void()>& body) {
    try {
      body();
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  }
  static std::string read_file(const std::filesystem::path& path) {
    std::ifstream in(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  static void write_file(const std::filesystem::path& path, const std::string& bytes) {
    std::ofstream(path, std::ios::binary | std::ios::trunc).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  }
  std::size_t entries() const {
    return static_cast<std::size_t>(
        std::distance(std::filesystem::directory_iterator(folder_), std::filesystem::directory_iterator()));
  }

  const TemporaryFolder temporary_;
  const std::filesystem::path folder_ = temporary_.path();
  SingleProcess alone_;
};

}  // namespace attamba
