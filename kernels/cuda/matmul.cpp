// Matrix products by cuBLASLt. The algorithm for a shape is chosen when it first runs: by timing the library's proposals, or,
// where results must not depend on timings, its first one. Choices are kept on disk (matmul_choices.h).
#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <map>
#include <optional>
#include <vector>

#include "kernels/cuda/check.h"
#include "kernels/cuda/connect.h"
#include "kernels/cuda/cublas_lt.h"
#include "kernels/cuda/matmul_choices.h"
#include "kernels/kernels.h"
#include "src/core/clock.h"
#include "src/core/random.h"

namespace attamba::kernels::cuda {

namespace {

constexpr std::size_t kWorkspace = std::size_t{32} << 20;  ///< what cuBLAS asks for on Hopper
constexpr int kProposals = 8;
constexpr int kTimedRuns = 3, kRounds = 3;
constexpr double kRaiseSeconds = 0.05;

void check_product(cublasStatus_t status, const MatmulShape& shape) {
  if (status != CUBLAS_STATUS_SUCCESS) [[unlikely]] {
    throw Error(concat("matmul on the GPU, ", shape, ": ", cublas_lt().status_string(status)));
  }
}

cudaDataType_t type_of(DType type) {
  return type == DType::bfloat16 ? CUDA_R_16BF : CUDA_R_32F;
}

/// Descriptions of one product. cuBLASLt counts columns first, so out^T = op(b)^T op(a)^T is what it is asked for: a row-major
/// matrix is its own transpose there.
class Description {
 public:
  explicit Description(const MatmulShape& s) : shape_(s) {
    const CublasLt& lt = cublas_lt();
    check_product(lt.desc_create(&operation_, CUBLAS_COMPUTE_32F, CUDA_R_32F), s);
    const cublasOperation_t first = s.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N,
                            second = s.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N;
    check_product(lt.desc_set(operation_, CUBLASLT_MATMUL_DESC_TRANSA, &first, sizeof first), s);
    check_product(lt.desc_set(operation_, CUBLASLT_MATMUL_DESC_TRANSB, &second, sizeof second), s);
    b_ = layout(s.input, s.transpose_b ? s.k : s.n, s.transpose_b ? s.n : s.k);
    a_ = layout(s.input, s.transpose_a ? s.m : s.k, s.transpose_a ? s.k : s.m);
    out_ = layout(s.output, s.n, s.m);
  }
  ~Description() {
    const CublasLt& lt = cublas_lt();
    for (cublasLtMatrixLayout_t layout : {a_, b_, out_}) {
      if (layout != nullptr) {
        lt.layout_destroy(layout);
      }
    }
    lt.desc_destroy(operation_);
  }
  Description(const Description&) = delete;
  Description& operator=(const Description&) = delete;

  /// The library's proposals, best guess first. Partial sums stay float32.
  std::vector<cublasLtMatmulAlgo_t> proposals() const {
    const CublasLt& lt = cublas_lt();
    cublasLtMatmulPreference_t preference = nullptr;
    check_product(lt.preference_create(&preference), shape_);
    const std::uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    lt.preference_set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &kWorkspace, sizeof kWorkspace);
    lt.preference_set(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reductions, sizeof reductions);
    for (const cublasLtMatmulPreferenceAttributes_t operand :
         {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
          CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
      lt.preference_set(preference, operand, &shape_.alignment, sizeof shape_.alignment);
    }
    std::array<cublasLtMatmulHeuristicResult_t, kProposals> results{};
    int found = 0;
    const cublasStatus_t status =
        lt.heuristic(lt.handle, operation_, b_, a_, out_, out_, preference, kProposals, results.data(), &found);
    lt.preference_destroy(preference);
    check_product(status, shape_);
    std::vector<cublasLtMatmulAlgo_t> algorithms;
    for (int i = 0; i < found; ++i) {
      if (results[static_cast<std::size_t>(i)].state == CUBLAS_STATUS_SUCCESS) {
        algorithms.push_back(results[static_cast<std::size_t>(i)].algo);
      }
    }
    require(!algorithms.empty(), "matmul on the GPU, ", shape_, ": cuBLASLt knows no algorithm");
    return algorithms;
  }

  /// Whether this GPU and library can run a product by it.
  bool can_run(const cublasLtMatmulAlgo_t& algorithm) const {
    cublasLtMatmulHeuristicResult_t result{};
    const CublasLt& lt = cublas_lt();
    return lt.algorithm_check(lt.handle, operation_, b_, a_, out_, out_, &algorithm, &result) == CUBLAS_STATUS_SUCCESS &&
           result.workspaceSize <= kWorkspace;
  }

  cublasStatus_t run(const cublasLtMatmulAlgo_t& algorithm, void* out, const void* a, const void* b, const void* addend,
                     std::span<std::byte> workspace, void* stream) const {
    const float one = 1, beta = addend != nullptr ? 1 : 0;
    const CublasLt& lt = cublas_lt();
    return lt.matmul(lt.handle, operation_, &one, b, b_, a, a_, &beta, addend != nullptr ? addend : out, out_, out, out_,
                     &algorithm, workspace.data(), std::min(workspace.size(), kWorkspace), static_cast<cudaStream_t>(stream));
  }

 private:
  /// Column-major [rows, columns], packed.
  cublasLtMatrixLayout_t layout(DType type, std::int64_t rows, std::int64_t columns) const {
    cublasLtMatrixLayout_t layout = nullptr;
    check_product(cublas_lt().layout_create(&layout, type_of(type), static_cast<std::uint64_t>(rows),
                                            static_cast<std::uint64_t>(columns), rows),
                  shape_);
    return layout;
  }

  MatmulShape shape_;
  cublasLtMatmulDesc_t operation_ = nullptr;
  cublasLtMatrixLayout_t a_ = nullptr, b_ = nullptr, out_ = nullptr;
};

bool capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status), "CUDA stream");
  return status != cudaStreamCaptureStatusNone;
}

struct Choice {
  cublasLtMatmulAlgo_t algorithm;
  bool timed;
};

/// From idle a GPU takes tens of milliseconds to reach the clock that it then keeps: `work` fills them, once per process.
void raise_clock(DeviceRuntime& device, const std::function<void()>& work) {
  static bool raised = false;
  for (const double begin = monotonic_seconds(); !raised && monotonic_seconds() - begin < kRaiseSeconds;) {
    work();
    device.synchronize();
  }
  raised = true;
}

/// The fastest of the proposals on these operands. Its results go to memory of its own; where there is none left the library's
/// first proposal has to do, as where there is nothing to choose or no time may be measured. Ranks that share a GPU disturb
/// each other's timings: whichever of them are chosen are right, and at worst somewhat slower.
Choice fastest(const Description& description, const MatmulShape& shape, const Launch& launch, const void* a, const void* b) {
  const std::vector<cublasLtMatmulAlgo_t> proposals = description.proposals();
  if (proposals.size() == 1 || !tune_products() || capturing(launch.stream)) {
    return {proposals.front(), false};
  }
  DeviceRuntime& device = runtime(Device::cuda);
  std::optional<Memory> memory;
  try {
    memory.emplace(Device::cuda, static_cast<std::size_t>(shape.m * shape.n) * size_of(shape.output), "choosing a product");
  } catch (const OutOfMemory&) {
    return {proposals.front(), false};
  }
  const Memory& result = *memory;
  const void* addend = shape.accumulate ? result.data() : nullptr;
  const auto runs = [&](std::size_t i, int count) {
    cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
    for (int r = 0; r < count && status == CUBLAS_STATUS_SUCCESS; ++r) {
      status = description.run(proposals[i], result.data(), a, b, addend, launch.scratch, launch.stream);
    }
    return status == CUBLAS_STATUS_SUCCESS;
  };
  const auto all_once = [&] {
    for (std::size_t i = 0; i < proposals.size(); ++i) {
      runs(i, 1);
    }
  };
  all_once();  // the first run of a kernel also loads it
  raise_clock(device, all_once);
  const std::optional<std::size_t> best = least_seconds(proposals.size(), kRounds, [&](std::size_t i) {
    bool done = false;
    const double seconds = device.seconds_of([&] { done = runs(i, kTimedRuns); });
    return done ? std::optional(seconds) : std::nullopt;
  });
  device.synchronize();
  require(best.has_value(), "matmul on the GPU, ", shape, ": none of cuBLASLt's ", proposals.size(), " algorithms runs");
  return {proposals[*best], true};
}

struct Product {
  explicit Product(const MatmulShape& shape) : description(shape) {}
  Description description;
  cublasLtMatmulAlgo_t algorithm{};
};

Product& product_for(const MatmulShape& shape, const Launch& launch, const void* a, const void* b) {
  // For ever: at the end of the process the library may be gone before they are.
  static auto& products = *new std::map<MatmulShape, std::unique_ptr<Product>>;
  std::unique_ptr<Product>& product = products[shape];
  if (!product) {
    auto made = std::make_unique<Product>(shape);
    MatmulChoices& choices = matmul_choices();
    if (const auto kept = choices.find(shape); kept && tune_products() && made->description.can_run(*kept)) {
      made->algorithm = *kept;
    } else {
      const Choice choice = fastest(made->description, shape, launch, a, b);
      made->algorithm = choice.algorithm;
      if (choice.timed) {
        choices.keep(shape, choice.algorithm);
      }
    }
    product = std::move(made);
  }
  return *product;
}

/// The largest power of two up to 256 that all of these addresses are multiples of.
std::uint32_t alignment_of(std::initializer_list<const void*> operands) {
  std::uintptr_t bits = 256;
  for (const void* operand : operands) {
    bits |= reinterpret_cast<std::uintptr_t>(operand);
  }
  return static_cast<std::uint32_t>(bits & -bits);
}

MatmulShape shape_of(const TensorType& out, const TensorType& a, bool transpose_a, bool transpose_b, bool accumulate,
                     std::uint32_t alignment) {
  require<UsageError>(a.dtype == DType::float32 || a.dtype == DType::bfloat16,
                      "matmul: the GPU multiplies float32 and bfloat16, not ", name_of(a.dtype));
  return {.m = out.shape.rows(),
          .n = out.shape.columns(),
          .k = transpose_a ? a.shape.rows() : a.shape.columns(),
          .transpose_a = transpose_a,
          .transpose_b = transpose_b,
          .accumulate = accumulate,
          .input = a.dtype,
          .output = out.dtype,
          .alignment = alignment};
}

}  // namespace

void matmul(const Launch& launch, const Tensor& out, const Tensor& a, const Tensor& b, bool transpose_a, bool transpose_b,
            const Tensor& addend) {
  const MatmulShape shape = shape_of(out.type, a.type, transpose_a, transpose_b, static_cast<bool>(addend),
                                     alignment_of({out.data, a.data, b.data, addend.data}));
  if (shape.m == 0 || shape.n == 0) {
    return;
  }
  require(reinterpret_cast<std::uintptr_t>(launch.scratch.data()) % kAlignment == 0,
          "matmul on the GPU: scratch is not aligned by ", kAlignment, " bytes");
  const Product& product = product_for(shape, launch, a.data, b.data);
  check_product(
      product.description.run(product.algorithm, out.data, a.data, b.data, addend.data, launch.scratch, launch.stream), shape);
}

std::size_t matmul_workspace(const TensorType&, const TensorType&, const TensorType&, bool, bool) {
  return kWorkspace;
}

namespace {

/// Numbers of magnitude 0.5 to 1 and both signs: multipliers draw less power, and clocks rise, on zeros.
void fill_with_numbers(DeviceRuntime& device, const Memory& memory, DType dtype, std::uint32_t seed) {
  constexpr std::size_t kWords = std::size_t{1} << 20;
  RandomStream random(seed);
  std::vector<std::uint32_t> words(std::min(kWords, memory.size() / sizeof(std::uint32_t)));
  for (std::uint32_t& word : words) {
    const std::uint32_t bits = random.next();
    word = dtype == DType::float32 ? (bits & 0x807fffffu) | 0x3f000000u : (bits & 0x807f807fu) | 0x3f003f00u;
  }
  const std::size_t bytes = words.size() * sizeof(std::uint32_t);
  for (std::size_t begin = 0; begin < memory.size(); begin += bytes) {
    device.copy_to_device(memory.data() + begin, words.data(), std::min(bytes, memory.size() - begin));
  }
  device.synchronize();
}

}  // namespace

double measure_matmul_peak(DType dtype, double seconds) {
  constexpr std::int64_t kSize = 8192;
  const TensorType type{dtype == DType::float32 ? DType::float32 : DType::bfloat16, {kSize, kSize}};
  const Memory a(Device::cuda, type.bytes(), "measuring products"), b(Device::cuda, type.bytes(), "measuring products"),
      c(Device::cuda, type.bytes(), "measuring products"), scratch(Device::cuda, kWorkspace, "measuring products");
  DeviceRuntime& device = runtime(Device::cuda);
  const Launch launch{.device = Device::cuda, .stream = device.stream(), .scratch = {scratch.data(), scratch.size()}};
  const auto tensor = [&](const Memory& memory) { return Tensor{memory.data(), type, Device::cuda}; };
  fill_with_numbers(device, a, dtype, 1);
  fill_with_numbers(device, b, dtype, 2);
  const auto run = [&] { matmul(launch, tensor(c), tensor(a), tensor(b), false, true, {}); };
  run();
  double best = 0;
  for (double spent = 0; spent < seconds;) {
    const double took = device.seconds_of(run);
    best = best == 0 ? took : std::min(best, took);
    spent += took;
  }
  return 2.0 * static_cast<double>(kSize) * kSize * kSize / best;
}

const char* matmul_library(DType) {
  static const std::string text = [] {
    const std::size_t version = cublas_lt().version();
    return concat("cuBLASLt ", version / 10000, '.', version % 10000 / 100, '.', version % 100);
  }();
  return text.c_str();
}

}  // namespace attamba::kernels::cuda
