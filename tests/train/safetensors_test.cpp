// The format as its readers know it, byte by byte, and nothing that is not whole is taken for one.
#include "src/train/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <nlohmann/json.hpp>

#include "src/train/checkpoint_tools.h"
#include "tests/train/checkpoint_test_support.h"

namespace attamba {
namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::HasSubstr;

class Safetensors : public CheckpointTest {
 protected:
  fs::path path() const { return folder_ / "weights.safetensors"; }
  void write_two() {
    write_safetensors(
        {.path = path(), .tensors = {{"b", {DType::float32, {2, 3}}}, {"a", {DType::int64, {1}}}}, .metadata = {{"step", "5"}}},
        [&](const SafetensorsEntry& entry, std::span<std::byte> bytes) {
          for (std::size_t i = 0; i < bytes.size(); ++i) {
            bytes[i] = static_cast<std::byte>(i + (entry.name == "a" ? 100 : 0));
          }
        });
  }
};

TEST_F(Safetensors, TheBytesAreThoseOfTheFormat) {
  write_two();
  const std::string bytes = read_file(path());
  std::uint64_t length = 0;
  std::memcpy(&length, bytes.data(), 8);
  ASSERT_LE(8 + length, bytes.size());
  EXPECT_EQ(length % 8, 0u);
  const auto header = nlohmann::json::parse(bytes.substr(8, length));
  EXPECT_EQ(header, nlohmann::json::parse(R"({"__metadata__": {"step": "5"},
      "b": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
      "a": {"dtype": "I64", "shape": [1], "data_offsets": [24, 32]}})"));
  ASSERT_EQ(bytes.size(), 8 + length + 32);
  EXPECT_EQ(bytes[8 + length + 23], 23);
  EXPECT_EQ(bytes[8 + length + 24], 100);
}

TEST_F(Safetensors, ComesBack) {
  write_two();
  const SafetensorsFile file = open_safetensors(path());
  ASSERT_EQ(file.tensors.size(), 2u);
  EXPECT_EQ(file.tensors[0].name, "b");
  EXPECT_EQ(file.tensors[0].type, (TensorType{DType::float32, {2, 3}}));
  EXPECT_EQ(file.metadata.at("step"), "5");
  const std::vector<std::byte> values = read_safetensor(file, file.tensors[1]);
  EXPECT_EQ(values.size(), 8u);
  EXPECT_EQ(values[7], std::byte{107});
}

TEST_F(Safetensors, WhatIsNotWholeIsRefused) {
  write_two();
  const std::string good = read_file(path());
  for (std::size_t size = 0; size < good.size(); size += 7) {
    write_file(path(), good.substr(0, size));
    EXPECT_THAT(error_of([&] { open_safetensors(path()); }), AllOf(HasSubstr("weights.safetensors"), HasSubstr("not a whole")))
        << size << " bytes";
  }
  write_file(path(), good + "more");
  EXPECT_THAT(error_of([&] { open_safetensors(path()); }), HasSubstr("end at byte"));
  std::string other = good;
  other.replace(other.find("F32"), 3, "F8_");
  write_file(path(), other);
  EXPECT_THAT(error_of([&] { open_safetensors(path()); }), AllOf(HasSubstr("b has type F8_"), HasSubstr("BF16")));
  other = good;
  other.replace(other.find("[2,3]"), 5, "[2,4]");
  write_file(path(), other);
  EXPECT_THAT(error_of([&] { open_safetensors(path()); }), AllOf(HasSubstr("b lies at"), HasSubstr("[2, 4]")));
}

TEST_F(Safetensors, ExportTakesTheWeightsAloneAndRoundsWhenAsked) {
  SomeState state(4);
  save(1, state);
  export_weights(open_checkpoint(CheckpointTest::path(1)), path(), std::nullopt);
  SafetensorsFile file = open_safetensors(path());
  ASSERT_EQ(file.tensors.size(), 2u);
  EXPECT_EQ(file.tensors[0].name, "layers.0.w");
  EXPECT_EQ(file.tensors[0].type, (TensorType{DType::float32, {40, 25}}));
  std::vector<std::byte> bytes = read_safetensor(file, file.tensors[0]);
  EXPECT_EQ(std::memcmp(bytes.data(), state.weights.data(), bytes.size()), 0);

  export_weights(open_checkpoint(CheckpointTest::path(1)), path(), DType::bfloat16);
  file = open_safetensors(path());
  bytes = read_safetensor(file, file.tensors[0]);
  ASSERT_EQ(bytes.size(), 2000u);
  for (std::size_t i = 0; i < state.weights.size(); ++i) {
    std::uint16_t bits = 0;
    std::memcpy(&bits, bytes.data() + 2 * i, 2);
    EXPECT_EQ(bits, bfloat16(state.weights[i]).bits) << i;
  }
}

TEST_F(Safetensors, ReshardingKeepsEveryBit) {
  SomeState state(5), loaded;
  save(1, state);
  const std::uint32_t crc = open_checkpoint(CheckpointTest::path(1)).manifest.state_crc();
  for (const int files : {5, 1, 8, 2}) {
    reshard(open_checkpoint(CheckpointTest::path(1)), files, folder_);
    const Checkpoint resharded = checked_checkpoint(CheckpointTest::path(1), alone_);
    EXPECT_EQ(resharded.manifest.files.size(), static_cast<std::size_t>(files));
    EXPECT_EQ(resharded.manifest.state_crc(), crc);
    load_slices(resharded, whole_slices(loaded.tensors()));
    EXPECT_EQ(loaded, state) << files;
    EXPECT_EQ(entries(), 1u);
  }
}

}  // namespace
}  // namespace attamba
