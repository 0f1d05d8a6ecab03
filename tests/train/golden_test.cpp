// Golden files of the float64 oracle: this program's results against them, and files that are not what they should be.
#include "src/train/golden.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <hdf5.h>
#include <unistd.h>

#include <fstream>

#include "src/core/error.h"

namespace attamba {
namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::HasSubstr;

const fs::path kFolder = fs::path(ATTAMBA_SOURCE_DIR) / "tests/golden";

std::vector<std::string> golden_files() {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(kFolder)) {
    if (entry.path().extension() == ".h5") {
      names.push_back(entry.path().stem());
    }
  }
  std::sort(names.begin(), names.end());
  return names;
}

void expect_all_passed(const std::string& name, DType dtype) {
  const GoldenFile golden = read_golden(kFolder / (name + ".h5"));
  const std::vector<GoldenCheck> checks = verify_golden(golden, dtype);
  // bfloat16 gradients are judged by kind, of which no model has fewer than 9, and the file says nothing about training in it.
  EXPECT_GE(checks.size(), dtype == DType::bfloat16 ? 3u + 9u : golden.parameters.size() + 6u);
  for (const GoldenCheck& check : checks) {
    EXPECT_TRUE(check.passed()) << check.quantity << ": error " << check.error << ", tolerance " << check.tolerance;
  }
}

class Golden : public testing::TestWithParam<std::string> {};

TEST_P(Golden, Float32IsWithinTheOraclesTolerances) {
  expect_all_passed(GetParam(), DType::float32);
}

TEST_P(Golden, Bfloat16IsWithinTheOraclesTolerances) {
  expect_all_passed(GetParam(), DType::bfloat16);
}

TEST_P(Golden, Float64IsTheOracle) {
  expect_all_passed(GetParam(), DType::float64);
}

INSTANTIATE_TEST_SUITE_P(Files, Golden, testing::ValuesIn(golden_files()), [](const auto& test) { return test.param; });

// ---------------------------------------------------------------------------------------------- wrong numbers

class WrongNumbers : public testing::Test {
 protected:
  /// Quantities of the verdict that fail.
  static std::vector<std::string> failures(const GoldenFile& golden) {
    std::vector<std::string> failed;
    for (const GoldenCheck& check : verify_golden(golden, DType::float32)) {
      if (!check.passed()) {
        failed.push_back(check.quantity);
      }
    }
    return failed;
  }
  GoldenFile golden_ = read_golden(kFolder / "transformer_kvc_swa.h5");
};

TEST_F(WrongNumbers, InAGradientFailThatGradient) {
  auto& gradient = golden_.gradients.at("layers.0.attention.wq.weight");
  gradient.values[0] += 0.01 * std::abs(gradient.values[0]) + 1e-3;
  EXPECT_THAT(failures(golden_), testing::Contains(HasSubstr("layers.0.attention.wq.weight")));
  EXPECT_THAT(failures(golden_), testing::Not(testing::Contains("logits")));
}

TEST_F(WrongNumbers, InALogitFailTheLogits) {
  golden_.logits.values[5] += 0.01;
  EXPECT_EQ(failures(golden_), std::vector<std::string>{"logits"});
}

TEST_F(WrongNumbers, ThatAreNotNumbersFail) {
  golden_.losses[1] = std::nan("");
  EXPECT_THAT(failures(golden_), testing::Contains(AllOf(HasSubstr("losses"), HasSubstr("training"))));
}

TEST_F(WrongNumbers, InTheModelFail) {
  golden_.model.sliding_window += 1;
  EXPECT_THAT(failures(golden_), testing::IsSupersetOf({"logits", "loss", "gradients together"}));
}

// ---------------------------------------------------------------------------------------------- malformed files

/// A copy of a golden file to spoil, removed afterwards.
class MalformedGolden : public testing::Test {
 protected:
  void SetUp() override {
    path_ = fs::temp_directory_path() / concat("attamba_golden_test_", getpid(), ".h5");
    copy("transformer_kvc_swa");
  }
  void TearDown() override { fs::remove(path_); }

  void copy(const std::string& name) {
    fs::copy_file(kFolder / (name + ".h5"), path_, fs::copy_options::overwrite_existing);
    fs::permissions(path_, fs::perms::owner_write, fs::perm_options::add);
  }

  /// Opens the copy, calls body(file id) and closes it.
  template <class Body>
  void edit(const Body& body) {
    const hid_t file = H5Fopen(path_.c_str(), H5F_ACC_RDWR, H5P_DEFAULT);
    ASSERT_GE(file, 0);
    body(file);
    ASSERT_GE(H5Fclose(file), 0);
  }
  void replace_dataset(const std::string& name, const std::vector<hsize_t>& extents, double value = 0) {
    edit([&](hid_t file) {
      H5Ldelete(file, name.c_str(), H5P_DEFAULT);
      const hid_t space = H5Screate_simple(static_cast<int>(extents.size()), extents.data(), nullptr);
      const hid_t dataset = H5Dcreate2(file, name.c_str(), H5T_NATIVE_DOUBLE, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
      hsize_t count = 1;
      for (const hsize_t extent : extents) {
        count *= extent;
      }
      const std::vector<double> values(count, value);
      H5Dwrite(dataset, H5T_NATIVE_DOUBLE, H5S_ALL, H5S_ALL, H5P_DEFAULT, values.data());
      H5Dclose(dataset);
      H5Sclose(space);
    });
  }
  void replace_attribute(const std::string& name, const std::string& text) {
    edit([&](hid_t file) {
      H5Adelete(file, name.c_str());
      const hid_t type = H5Tcopy(H5T_C_S1), space = H5Screate(H5S_SCALAR);
      H5Tset_size(type, text.size());
      const hid_t attribute = H5Acreate2(file, name.c_str(), type, space, H5P_DEFAULT, H5P_DEFAULT);
      H5Awrite(attribute, type, text.data());
      H5Aclose(attribute);
      H5Sclose(space);
      H5Tclose(type);
    });
  }

  /// What reading and verifying the copy says.
  std::string message() const {
    try {
      verify_golden(read_golden(path_), DType::float32);
    } catch (const Error& error) {
      return error.what();
    }
    return "nothing was thrown";
  }

  fs::path path_;
};

TEST_F(MalformedGolden, AnUntouchedCopyPasses) {
  EXPECT_EQ(message(), "nothing was thrown");
}

TEST_F(MalformedGolden, Missing) {
  fs::remove(path_);
  EXPECT_THAT(message(), AllOf(HasSubstr(path_.string()), HasSubstr("no such file")));
}

TEST_F(MalformedGolden, Truncated) {
  for (const std::uintmax_t size : {fs::file_size(path_) / 2, std::uintmax_t{100}, std::uintmax_t{0}}) {
    fs::resize_file(path_, size);
    EXPECT_THAT(message(), AllOf(HasSubstr(path_.string()), HasSubstr("not an HDF5 file, or it cannot be read"))) << size;
  }
}

TEST_F(MalformedGolden, NotHdf5) {
  std::ofstream(path_) << "step,loss\n0,10.4\n";
  EXPECT_THAT(message(), AllOf(HasSubstr(path_.string()), HasSubstr("not an HDF5 file")));
}

TEST_F(MalformedGolden, AnHdf5FileOfSomethingElse) {
  H5Fclose(H5Fcreate(path_.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT));
  EXPECT_THAT(message(), AllOf(HasSubstr(path_.string()), HasSubstr("attribute model is missing")));
}

TEST_F(MalformedGolden, WithoutADataset) {
  for (const char* name : {"tokens", "logits", "losses", "grads/norm.weight", "params", "params_after"}) {
    copy("transformer_kvc_swa");
    edit([&](hid_t file) { H5Ldelete(file, name, H5P_DEFAULT); });
    EXPECT_THAT(message(), AllOf(HasSubstr(path_.string()), HasSubstr(name), HasSubstr("is missing")));
  }
}

TEST_F(MalformedGolden, WithoutAParameter) {
  edit([&](hid_t file) { H5Ldelete(file, "params/norm.weight", H5P_DEFAULT); });
  EXPECT_THAT(message(), AllOf(HasSubstr(path_.string()), HasSubstr("parameters")));
}

TEST_F(MalformedGolden, WithWrongShapes) {
  for (const char* name : {"params/norm.weight", "grads/norm.weight", "params_after/norm.weight"}) {
    copy("transformer_kvc_swa");
    replace_dataset(name, {3});
    EXPECT_THAT(message(), AllOf(HasSubstr(path_.string()), HasSubstr(name), HasSubstr("[3]"))) << name;
  }
  copy("transformer_kvc_swa");
  replace_dataset("logits", {2, 3, 4});
  EXPECT_THAT(message(), AllOf(HasSubstr(path_.string()), HasSubstr("logits"), HasSubstr("[2, 3, 4]")));
  copy("transformer_kvc_swa");
  replace_dataset("losses", {1});
  EXPECT_THAT(message(), AllOf(HasSubstr(path_.string()), HasSubstr("losses")));
}

TEST_F(MalformedGolden, WithUnusableTokens) {
  replace_dataset("tokens", {2, 3});
  EXPECT_THAT(message(), AllOf(HasSubstr(path_.string()), HasSubstr("tokens")));
  for (const std::vector<hsize_t>& extents : {std::vector<hsize_t>{0, 2, 9}, {2, 0, 9}, {2, 2, 1}}) {
    replace_dataset("tokens", extents);
    EXPECT_THAT(message(), AllOf(HasSubstr(path_.string()), HasSubstr("tokens are")));
  }
  replace_dataset("tokens", {2, 2, 9}, 1e6);
  EXPECT_THAT(message(), AllOf(HasSubstr(path_.string()), HasSubstr("outside the vocabulary")));
}

TEST_F(MalformedGolden, WithAnUnknownKind) {
  replace_attribute("model", R"({"kind": "perceiver", "vocab_size": 32, "dim": 16, "n_layers": 1, "n_heads": 2})");
  EXPECT_THAT(message(), AllOf(HasSubstr(path_.string()), HasSubstr("perceiver")));
}

TEST_F(MalformedGolden, WithAnImpossibleModel) {
  replace_attribute("model", R"({"kind": "transformer", "vocab_size": 32, "dim": 15, "n_layers": 1, "n_heads": 2})");
  EXPECT_THAT(message(), AllOf(HasSubstr(path_.string()), HasSubstr("15")));
}

TEST_F(MalformedGolden, WithAttributesThatAreNotJson) {
  for (const char* name : {"model", "optim", "float32_error"}) {
    copy("transformer_kvc_swa");
    replace_attribute(name, "{\"kind\": ");
    EXPECT_THAT(message(), HasSubstr(path_.string())) << name;
  }
  copy("transformer_kvc_swa");
  replace_attribute("optim", R"({"beta1": 0.9})");
  EXPECT_THAT(message(), AllOf(HasSubstr(path_.string()), HasSubstr("beta2")));
}

TEST_F(MalformedGolden, WithChunkEndsThatAreNone) {
  copy("attamba_explicit");
  replace_dataset("chunk_ends/0", {2}, 3);
  EXPECT_THAT(message(), AllOf(HasSubstr(path_.string()), HasSubstr("layer 0")));
  copy("attamba_explicit");
  edit([&](hid_t file) { H5Ldelete(file, "chunk_ends/1", H5P_DEFAULT); });
  EXPECT_THAT(message(), AllOf(HasSubstr(path_.string()), HasSubstr("chunk_ends/1")));
}

}  // namespace
}  // namespace attamba
