// The output projection fused with its cross-entropy, in chunks of tokens: logits = hidden weight^T by the matrix library, a
// kernel that turns each row of logits into its loss and, in place, into its own gradient, and the two products of the latter.
// (The vocabulary's other end is in embedding.cu.)
//   loss = log sum_j exp(x_j) - x_target;  dx = scale (softmax(x) - onehot(target))
// Logits are float32, except where a bfloat16 gradient is asked for: those are the library's float32 sums, rounded once to
// bfloat16, as is their gradient (which the CPU rounds likewise where it multiplies bfloat16 itself). That halves the bytes of
// what are the largest arrays of a step, and moves a loss by at most 2^-7 of its row's largest logit. Losses without gradient
// keep float32 logits. A target outside the vocabulary, which is an error on the CPU, gives NaN.
#include <algorithm>
#include <limits>

#include "kernels/cuda/arguments.h"
#include "kernels/cuda/launch_kernel.h"
#include "kernels/device/block.h"
#include "kernels/device/elements.h"
#include "kernels/kernels.h"

namespace attamba::kernels::cuda {
namespace {

using namespace attamba::device;

constexpr int kMostThreads = 512;
constexpr std::int64_t kMostChunkTokens = 4096;
constexpr std::int64_t kChunkStep = 128;                       ///< chunks are multiples of a product's tile
constexpr std::int64_t kChunkBytes = std::int64_t{256} << 20;  ///< bounds the logits of a chunk
constexpr std::size_t kMostRowBytes = std::size_t{96} << 10;   ///< of shared memory that every GPU since 8.0 has

/// What becomes of a row of logits.
enum class Row {
  loss,    ///< its loss alone
  shared,  ///< its loss, and its gradient from a copy of the row in shared memory: read once
  global,  ///< the same for a row that does not fit: read twice
};

/// Sums of exponentials relative to a maximum.
struct Softmax {
  float most = std::numeric_limits<float>::lowest();  // not minus infinity, of which differences are NaN
  float sum = 0;

  ATTAMBA_DEVICE static float power(float x) {
    constexpr float kLog2E = 1.442695040888963f;
    return exp2_fast(x * kLog2E);
  }
  template <class T, int kWidth>
  ATTAMBA_DEVICE void add(const Elements<T, kWidth>& x) {
    float highest = most;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      highest = x.value[i] > highest ? x.value[i] : highest;
    }
    sum *= power(most - highest);
    most = highest;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      sum += power(x.value[i] - highest);
    }
  }
  /// Of all the block's threads.
  ATTAMBA_DEVICE void combine(float* warps) {
    const float highest = block_max(most, warps);
    sum = block_sum(sum * power(most - highest), warps);
    most = highest;
  }
};

/// Calls `body(element)` for each of the thread's packs of kWidth elements.
template <int kWidth, class Body>
ATTAMBA_DEVICE void for_own_packs(std::int64_t count, const Body& body) {
  for (std::int64_t i = thread_index() * kWidth; i < count; i += block_threads() * kWidth) {
    body(i);
  }
}

/// The thread's packs of a row, copied to shared memory. Each thread reads its own ones only, so no barrier is needed.
template <class T, int kWidth>
ATTAMBA_DEVICE void copy_row(T* to, const T* row, std::int64_t vocabulary) {
  for_own_packs<kWidth>(vocabulary, [&](std::int64_t i) {
    if constexpr (kWidth == 1) {
      store(to + i, load(row + i));
    } else {
      copy_async_16(to + i, row + i, true);
    }
  });
  if constexpr (kWidth > 1) {
    copy_async_commit();
    copy_async_wait<0>();
  }
}

/// A block per row of logits.
template <class T, int kWidth, Row kRow>
ATTAMBA_KERNEL(kMostThreads, 2)
cross_entropy_rows(T* logits, float* losses, const std::int32_t* targets, std::int64_t vocabulary, float scale) {
  using Own = Elements<T, kWidth>;
  SharedMemory memory;
  float* const warps = memory.take<float>(kMostThreads / kWarp);
  T* const row = logits + block_x() * vocabulary;
  const std::int32_t target = load(targets + block_x());
  if (target < 0) {
    if constexpr (kRow != Row::loss) {
      Own zero;
      zero.fill(0);
      for_own_packs<kWidth>(vocabulary, [&](std::int64_t i) { zero.write(row + i); });
    }
    if (thread_index() == 0) {
      store(losses + block_x(), 0.0f);
    }
    return;
  }
  const T* source = row;
  if constexpr (kRow == Row::shared) {
    T* const copy = memory.take<T>(0);
    copy_row<T, kWidth>(copy, row, vocabulary);
    source = copy;
  }
  const bool valid = target < vocabulary;
  const float target_logit = thread_index() == 0 && valid ? to_float(load(row + target)) : 0;
  Softmax softmax;
  for_own_packs<kWidth>(vocabulary, [&](std::int64_t i) { softmax.add(Own::read(source + i)); });
  softmax.combine(warps);
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  if (thread_index() == 0) {
    store(losses + block_x(), valid ? (softmax.most - target_logit) + device::log(softmax.sum) : kNan);
  }
  if constexpr (kRow != Row::loss) {
    const float factor = valid ? scale / softmax.sum : kNan;
    for_own_packs<kWidth>(vocabulary, [&](std::int64_t i) {
      Own x = Own::read(source + i);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        x.value[j] = Softmax::power(x.value[j] - softmax.most) * factor - (i + j == target ? scale : 0.0f);
      }
      x.write(row + i);
    });
  }
}

// ------------------------------------------------------------------------------------------------ host

/// How the loss is cut into chunks of tokens. Depends on the extents alone.
struct LossPlan {
  std::int64_t tokens, width, vocabulary;  ///< T, D, V
  std::int64_t chunk;                      ///< tokens at a time
  DType compute, logits;
  bool gradient;

  LossPlan(const TensorType& hidden, const TensorType& weight, bool with_gradient)
      : tokens(hidden.shape.rows()),
        width(hidden.shape.columns()),
        vocabulary(weight.shape.rows()),
        compute(hidden.dtype),
        logits(with_gradient ? hidden.dtype : DType::float32),
        gradient(with_gradient) {
    require(weight.shape.columns() == width && weight.dtype == compute, "linear_cross_entropy: hidden ", hidden,
            " does not match weight ", weight);
    require(vocabulary > 0 && width > 0, "linear_cross_entropy: empty weight ", weight);
    const std::int64_t fitting = kChunkBytes / (vocabulary * static_cast<std::int64_t>(size_of(logits)));
    const std::int64_t most = std::clamp(fitting / kChunkStep * kChunkStep, kChunkStep, kMostChunkTokens);
    const std::int64_t chunks = std::max<std::int64_t>(1, ceil_div(tokens, most));
    chunk = std::min(tokens, ceil_div(ceil_div(tokens, chunks), kChunkStep) * kChunkStep);
  }

  TensorType logits_type(std::int64_t rows) const { return {logits, {rows, vocabulary}}; }
  TensorType hidden_type(std::int64_t rows) const { return {compute, {rows, width}}; }
  TensorType weight_type() const { return {compute, {vocabulary, width}}; }
  TensorType dweight_type() const { return {DType::float32, {vocabulary, width}}; }

  std::size_t logits_bytes() const { return ScratchAllocator::aligned_bytes<std::byte>(logits_type(chunk).bytes()); }
  std::size_t product_bytes() const {
    std::size_t most = 0;
    const std::int64_t last = chunk == 0 ? 0 : tokens - (tokens - 1) / chunk * chunk;
    for (const std::int64_t rows : {chunk, last}) {
      const TensorType x = logits_type(rows), h = hidden_type(rows), w = weight_type();
      most = std::max(most, matmul_workspace(x, h, w, false, true));
      if (gradient) {
        most = std::max({most, matmul_workspace(h, x, w, false, false), matmul_workspace(dweight_type(), x, h, true, false)});
      }
    }
    return most;
  }
};

template <class T>
void run_rows(const Launch& launch, const LossPlan& plan, const Tensor& logits, float* losses, const std::int32_t* targets,
              double scale) {
  const auto row_bytes = static_cast<std::size_t>(plan.vocabulary) * sizeof(T);
  const auto run = [&]<int kWidth, Row kRow>() {
    const std::int64_t packs = ceil_div(plan.vocabulary, kWidth);
    Grid grid{.x = logits.shape()[0],
              .threads = static_cast<int>(std::min<std::int64_t>(kMostThreads, ceil_div(packs, kWarp) * kWarp)),
              .shared_bytes = SharedMemory::bytes_of<float>(kMostThreads / kWarp)};
    if constexpr (kRow == Row::shared) {
      grid.shared_bytes += SharedMemory::bytes_of<T>(static_cast<int>(plan.vocabulary));
    }
    launch_kernel("linear_cross_entropy", cross_entropy_rows<T, kWidth, kRow>, launch, grid, elements_of<T>(logits), losses,
                  targets, plan.vocabulary, static_cast<float>(scale));
  };
  const auto with_width = [&]<int kWidth>() {
    if (!plan.gradient) {
      if constexpr (sizeof(T) == 4) {
        run.template operator()<kWidth, Row::loss>();
      }
    } else if (row_bytes <= kMostRowBytes) {
      run.template operator()<kWidth, Row::shared>();
    } else {
      run.template operator()<kWidth, Row::global>();
    }
  };
  if (packed_rows<T>(plan.vocabulary, {logits.data})) {
    with_width.template operator()<kPackWidth<T>>();
  } else {
    with_width.template operator()<1>();
  }
}

/// Rows `begin` .. of a tensor [T, D].
Tensor rows_of(const Tensor& tensor, std::int64_t begin, const TensorType& type) {
  const auto row_bytes = static_cast<std::int64_t>(size_of(type.dtype)) * type.shape.columns();
  return {static_cast<std::byte*>(tensor.data) + begin * row_bytes, type, Device::cuda};
}

/// dhidden and dweight are empty when no gradient is wanted.
void run_loss(const Launch& launch, const Tensor& losses, const Tensor& dhidden, const Tensor& dweight, const Tensor& hidden,
              const Tensor& weight, const Tensor& targets, double scale) {
  dispatch_compute(hidden.dtype(), "linear_cross_entropy", [&]<class T>() {});
  const LossPlan plan(hidden.type, weight.type, static_cast<bool>(dweight));
  require(losses.elements() == plan.tokens && targets.elements() == plan.tokens, "linear_cross_entropy: losses ", losses.type,
          " or targets ", targets.type, " do not match hidden ", hidden.type);
  require(launch.scratch.size() >= plan.logits_bytes() + plan.product_bytes(), "linear_cross_entropy: need ",
          plan.logits_bytes() + plan.product_bytes(), " bytes of scratch for ", hidden.type, " and ", weight.type, ", have ",
          launch.scratch.size());
  const Launch product{
      .device = launch.device, .stream = launch.stream, .scratch = launch.scratch.subspan(plan.logits_bytes())};
  const Tensor w{weight.data, plan.weight_type(), Device::cuda}, dw{dweight.data, plan.dweight_type(), Device::cuda};
  for (std::int64_t begin = 0; begin < plan.tokens; begin += plan.chunk) {
    const std::int64_t rows = std::min(plan.chunk, plan.tokens - begin);
    const Tensor logits{launch.scratch.data(), plan.logits_type(rows), Device::cuda};
    const Tensor h = rows_of(hidden, begin, plan.hidden_type(rows));
    matmul(product, logits, h, w, false, true, {});
    dispatch_compute(plan.logits, "linear_cross_entropy", [&]<class T>() {
      run_rows<T>(launch, plan, logits, losses.as<float>() + begin, targets.as<std::int32_t>() + begin, scale);
    });
    if (plan.gradient) {
      matmul(product, rows_of(dhidden, begin, plan.hidden_type(rows)), logits, w, false, false, {});
      matmul(product, dw, logits, h, true, false, dw);
    }
  }
}

}  // namespace

void linear_cross_entropy(const Launch& launch, const Tensor& losses, const Tensor& hidden, const Tensor& weight,
                          const Tensor& targets) {
  run_loss(launch, losses, {}, {}, hidden, weight, targets, 1.0);
}

void linear_cross_entropy_with_gradient(const Launch& launch, const Tensor& losses, const Tensor& dhidden,
                                        const Tensor& dweight, const Tensor& hidden, const Tensor& weight,
                                        const Tensor& targets, double scale) {
  require(dhidden.type == hidden.type && dweight.elements() == weight.elements() && dweight.dtype() == DType::float32,
          "linear_cross_entropy: gradients ", dhidden.type, " and ", dweight.type, " do not match ", hidden.type, " and ",
          weight.type);
  run_loss(launch, losses, dhidden, dweight, hidden, weight, targets, scale);
}

std::size_t linear_cross_entropy_workspace(const TensorType& hidden, const TensorType& weight, bool with_gradient) {
  dispatch_compute(hidden.dtype, "linear_cross_entropy", [&]<class T>() {});
  const LossPlan plan(hidden, weight, with_gradient);
  return plan.logits_bytes() + plan.product_bytes();
}

}  // namespace attamba::kernels::cuda
