// What the file of chosen algorithms keeps, and what it does with a file that is damaged. Nothing here needs a GPU.
#include "kernels/cuda/matmul_choices.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <optional>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

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

TEST(MatmulChoices, ThoseOfProcessesThatShareAFileAddUp) {
  const TemporaryFolder folder;
  const auto file = folder / "products.txt";
  MatmulShape other = kProduct;
  other.m = 1;
  MatmulChoices first(file), second(file);
  first.keep(kProduct, algorithm(1));
  second.keep(other, algorithm(2));
  second.keep(kProduct, algorithm(3));  // what was chosen here is not replaced by what is read
  EXPECT_TRUE(same(*second.find(kProduct), algorithm(3)));
  first.keep(other, algorithm(4));
  const MatmulChoices read(file);
  ASSERT_TRUE(read.find(kProduct) && read.find(other));
  EXPECT_TRUE(same(*read.find(kProduct), algorithm(1)));
  EXPECT_TRUE(same(*read.find(other), algorithm(4)));
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(file.parent_path()), std::filesystem::directory_iterator()), 1)
      << "unfinished files are left";
}

TEST(MatmulChoices, WhoeverReadsWhileOthersWriteSeesWholeLines) {
  const TemporaryFolder folder;
  const auto file = folder / "products.txt";
  MatmulChoices(file).keep(kProduct, algorithm(0));
  std::vector<std::thread> writers;
  for (std::int64_t writer = 0; writer < 4; ++writer) {
    writers.emplace_back([&file, writer] {
      MatmulChoices choices(file);
      for (std::int64_t n = 0; n < 50; ++n) {
        MatmulShape shape = kProduct;
        shape.m = writer;
        shape.n = n;
        choices.keep(shape, algorithm(1));
        std::ostringstream text;
        text << std::ifstream(file).rdbuf();
        ASSERT_EQ(text.str().substr(text.str().size() - 1), "\n");
        std::istringstream lines(text.str());
        for (std::string line; std::getline(lines, line);) {
          // Nine numbers of the shape, eight of the algorithm.
          ASSERT_EQ(std::count(line.begin(), line.end(), ' '), 9 + 8 - 1) << line;
        }
      }
    });
  }
  for (std::thread& writer : writers) {
    writer.join();
  }
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

TEST(LeastSeconds, AClockThatRisesMeanwhileDoesNotFavourTheLast) {
  const std::vector<double> work{1.05, 1, 1.03, 1.1};  // seconds at full clock
  double now = 0;
  const auto seconds = [&](std::size_t i) {
    const double took = work[i] * std::max(1.0, 3 - now / 5);  // which ten seconds lead to, from a third of it
    now += took;
    return std::optional(took);
  };
  EXPECT_EQ(least_seconds(work.size(), 1, seconds), 3u);
  now = 0;
  EXPECT_EQ(least_seconds(work.size(), 2, seconds), 1u);
}

TEST(LeastSeconds, OneThatDoesNotWorkIsAskedOnceAndNeverChosen) {
  std::vector<int> asked(3);
  const auto seconds = [&](std::size_t i) {
    ++asked[i];
    return i == 1 ? std::nullopt : std::optional(2.0 - static_cast<double>(i) / 10);
  };
  EXPECT_EQ(least_seconds(3, 3, seconds), 2u);
  EXPECT_EQ(asked, (std::vector{3, 1, 3}));
  EXPECT_FALSE(least_seconds(2, 2, [](std::size_t) { return std::optional<double>(); }));
}

}  // namespace
}  // namespace attamba::kernels::cuda
