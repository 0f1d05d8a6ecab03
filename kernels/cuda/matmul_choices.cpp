#include "kernels/cuda/matmul_choices.h"

#include <cuda_runtime_api.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <fstream>
#include <random>
#include <sstream>
#include <vector>

#include "kernels/cuda/cublas_lt.h"
#include "src/core/error.h"

namespace attamba::kernels::cuda {

namespace {

namespace fs = std::filesystem;

// A line per choice: m n k transpose_a transpose_b accumulate input output alignment, then the algorithm's words in
// hexadecimal.
void write_line(std::ostream& out, const MatmulShape& s, const cublasLtMatmulAlgo_t& algorithm) {
  out << std::dec << s.m << ' ' << s.n << ' ' << s.k << ' ' << s.transpose_a << ' ' << s.transpose_b << ' ' << s.accumulate
      << ' ' << static_cast<int>(s.input) << ' ' << static_cast<int>(s.output) << ' ' << s.alignment << std::hex;
  for (const std::uint64_t word : algorithm.data) {
    out << ' ' << word;
  }
  out << '\n';
}

bool read_line(const std::string& line, MatmulShape& s, cublasLtMatmulAlgo_t& algorithm) {
  std::istringstream in(line);
  int input = 0, output = 0;
  in >> s.m >> s.n >> s.k >> s.transpose_a >> s.transpose_b >> s.accumulate >> input >> output >> s.alignment >> std::hex;
  s.input = static_cast<DType>(input);
  s.output = static_cast<DType>(output);
  for (std::uint64_t& word : algorithm.data) {
    in >> word;
  }
  std::string rest;
  return in && !(in >> rest);
}

fs::path cache_folder() {
  if (const char* own = std::getenv("ATTAMBA_CACHE")) {
    return own;
  }
  if (const char* user = std::getenv("XDG_CACHE_HOME")) {
    return fs::path(user) / "attamba";
  }
  if (const char* home = std::getenv("HOME")) {
    return fs::path(home) / ".cache" / "attamba";
  }
  return {};
}

/// Choices hold for one kind of GPU, driver and library.
fs::path choices_file() {
  const fs::path folder = cache_folder();
  int index = 0, driver = 0;
  cudaDeviceProp properties{};
  if (folder.empty() || cudaGetDevice(&index) != cudaSuccess || cudaGetDeviceProperties(&properties, index) != cudaSuccess) {
    return {};
  }
  cudaDriverGetVersion(&driver);
  std::string gpu = properties.name;
  std::replace_if(
      gpu.begin(), gpu.end(), [](unsigned char c) { return std::isalnum(c) == 0; }, '-');
  return folder / concat("products-", gpu, "-driver-", driver, "-cublaslt-", cublas_lt().version(), ".txt");
}

}  // namespace

std::ostream& operator<<(std::ostream& out, const MatmulShape& s) {
  return out << name_of(s.output) << '[' << s.m << ", " << s.n << "] = " << name_of(s.input) << (s.transpose_a ? " a^T" : " a")
             << (s.transpose_b ? " b^T" : " b") << " over " << s.k << (s.accumulate ? ", accumulating" : "");
}

MatmulChoices::MatmulChoices(fs::path file) : file_(std::move(file)) {
  read_missing();
}

void MatmulChoices::read_missing() {
  std::ifstream in(file_);
  std::string line;
  MatmulShape shape;
  cublasLtMatmulAlgo_t algorithm{};
  while (std::getline(in, line)) {
    if (read_line(line, shape, algorithm)) {
      choices_.emplace(shape, algorithm);
    }
  }
}

std::optional<cublasLtMatmulAlgo_t> MatmulChoices::find(const MatmulShape& shape) const {
  const auto found = choices_.find(shape);
  return found == choices_.end() ? std::nullopt : std::optional(found->second);
}

void MatmulChoices::keep(const MatmulShape& shape, const cublasLtMatmulAlgo_t& algorithm) {
  choices_[shape] = algorithm;
  if (file_.empty()) {
    return;
  }
  read_missing();
  std::error_code ignored;
  fs::create_directories(file_.parent_path(), ignored);
  // Processes of several hosts may share the folder, and have one number.
  const fs::path unfinished = concat(file_.string(), ".", getpid(), ".", std::random_device{}());
  std::ofstream out(unfinished);
  for (const auto& [kept, choice] : choices_) {
    write_line(out, kept, choice);
  }
  out.close();
  if (out) {
    fs::rename(unfinished, file_, ignored);
  } else {
    fs::remove(unfinished, ignored);  // of a full disk: what the file holds is more
  }
}

std::optional<std::size_t> least_seconds(std::size_t count, int rounds,
                                         const std::function<std::optional<double>(std::size_t)>& seconds) {
  std::vector<std::optional<double>> least(count);
  for (int round = 0; round < rounds; ++round) {
    for (std::size_t i = 0; i < count; ++i) {
      if (round > 0 && !least[i]) {
        continue;
      }
      const std::optional<double> measured = seconds(i);
      least[i] = measured && least[i] ? std::min(*measured, *least[i]) : measured;
    }
  }
  std::optional<std::size_t> best;
  for (std::size_t i = 0; i < count; ++i) {
    if (least[i] && (!best || *least[i] < *least[*best])) {
      best = i;
    }
  }
  return best;
}

MatmulChoices& matmul_choices() {
  static auto& choices = *new MatmulChoices(choices_file());  // for ever, like the products in matmul.cpp
  return choices;
}

}  // namespace attamba::kernels::cuda
