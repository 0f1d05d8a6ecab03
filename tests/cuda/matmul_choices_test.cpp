// What the file of chosen algorithms keeps, and what it does with a file that is damaged. Nothing here needs a GPU.
#include "kernels/cuda/matmul_choices.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <sstream>

#include "tests/core/temporary_folder.h"

namespace attamba::kernels::cuda {
namespace {

const MatmulShape kProduct{.m = 16384, .n = 1680, .k = 512, .input = DType::bfloat16, .output = DType::bfloat16};

cublasLtMatmulAlgo_t algorithm(std::uint64_t seed) {
  cublasLtMatmulAlgo_t result{};
  for (std::uint64_t& word : result.data) {
    word = seed = seed * 6364136223846793005u + 1442695040888963407u;
  }
  return result;
}
bool same(const cublasLtMatmulAlgo_t& a, const cublasLtMatmulAlgo_t& b) {
  return std::equal(std::begin(a.data), std::end(a.data), std::begin(b.data));
}

TEST(MatmulChoices, ComeBackAndShapesAreToldApart) {
  const TemporaryFolder folder;
  const auto file = folder / "cache/products.txt";
  MatmulShape transposed = kProduct, unaligned = kProduct, accumulating = kProduct;
  transposed.transpose_b = true;
  unaligned.alignment = 16;
  accumulating.accumulate = true;
  {
    MatmulChoices choices(file);
    EXPECT_FALSE(choices.find(kProduct));
    std::uint64_t seed = 1;
    for (const MatmulShape& shape : {kProduct, transposed, unaligned}) {
      choices.keep(shape, algorithm(seed++));
    }
    choices.keep(transposed, algorithm(9));
  }
  const MatmulChoices read(file);
  ASSERT_TRUE(read.find(kProduct) && read.find(transposed) && read.find(unaligned));
  EXPECT_TRUE(same(*read.find(kProduct), algorithm(1)));
  EXPECT_TRUE(same(*read.find(transposed), algorithm(9)));
  EXPECT_TRUE(same(*read.find(unaligned), algorithm(3)));
  EXPECT_FALSE(read.find(accumulating));
}

TEST(MatmulChoices, ALineThatIsCutOrTooLongIsNone) {
  const TemporaryFolder folder;
  const auto file = folder / "products.txt";
  MatmulChoices(file).keep(kProduct, algorithm(1));
  std::ostringstream text;
  text << std::ifstream(file).rdbuf();
  const std::string line = text.str();
  for (const std::string& damaged : {line.substr(0, line.find_last_of(' ')), line.substr(0, line.size() - 1) + " 7\n",
                                     std::string("?") + line, std::string("\n\n")}) {
    std::ofstream(file, std::ios::trunc) << damaged;
    EXPECT_FALSE(MatmulChoices(file).find(kProduct)) << damaged;
  }
}

TEST(MatmulChoices, WithoutAPlaceForThemTheyAreKeptInMemory) {
  const TemporaryFolder folder;
  std::ofstream(folder / "file") << "in the way";
  for (const std::filesystem::path& file : {std::filesystem::path(), folder / "file/products.txt"}) {
    MatmulChoices choices(file);
    choices.keep(kProduct, algorithm(1));
    EXPECT_TRUE(choices.find(kProduct));
  }
}

}  // namespace
}  // namespace attamba::kernels::cuda
