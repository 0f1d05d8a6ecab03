// Both ends of the vocabulary: the embedding, and the output projection fused with its cross-entropy.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/cpu/matmul_tile.h"
#include "kernels/cpu/vector_math.h"
#include "kernels/kernels.h"

namespace attamba::kernels::cpu {
namespace {

constexpr std::int64_t kEmbeddingRows = 32;     ///< tokens that one task looks up
constexpr std::int64_t kEmbeddingColumns = 32;  ///< columns of the table's gradient that one task owns

constexpr std::int64_t kTileWidth = 256;        ///< words whose logits are one tile
constexpr std::int64_t kMostGroups = 16;        ///< partial sums of a chunk's dhidden: one per group of tiles
constexpr std::int64_t kMostChunkTokens = 512;  ///< enough to read and write dweight rarely
constexpr std::int64_t kChunkBytes = 80 << 20;  ///< bounds the logits and partial sums of a chunk

void require_rows(const char* operation, const char* what, const Tensor& rows, std::int64_t tokens, std::int64_t limit,
                  bool may_be_negative) {
  require(rows.elements() == tokens, operation, ": ", what, " ", rows.type, " do not match ", tokens, " tokens");
  const auto* values = rows.as<std::int32_t>();
  for (std::int64_t t = 0; t < tokens; ++t) {
    require(values[t] < limit && (may_be_negative || values[t] >= 0), operation, ": ", what, "[", t, "] = ", values[t],
            " is outside the vocabulary of ", limit);
  }
}

/// How the loss is cut: chunks of tokens, and the vocabulary into tiles, and these into groups. Depends on the extents alone.
struct LossPlan {
  std::int64_t tokens, width, vocabulary;  ///< T, D, V
  std::int64_t chunk = 0;                  ///< tokens at a time
  std::int64_t tiles = 0, groups = 0;
  bool gradient;
  bool converted;  ///< bfloat16 operands that this processor does not multiply: float32 copies of a chunk and of a tile

  LossPlan(const TensorType& hidden, const TensorType& weight, bool with_gradient)
      : tokens(hidden.shape.columns() == 0 ? 0 : hidden.shape.rows()),
        width(hidden.shape.columns()),
        vocabulary(weight.shape.columns() == 0 ? 0 : weight.shape.rows()),
        gradient(with_gradient),
        converted(hidden.dtype == DType::bfloat16 && !has_native_bfloat16()) {
    require(weight.shape.columns() == width && weight.dtype == hidden.dtype, "linear_cross_entropy: hidden ", hidden,
            " does not match weight ", weight);
    require(vocabulary > 0 && width > 0, "linear_cross_entropy: empty weight ", weight);
    tiles = (vocabulary + kTileWidth - 1) / kTileWidth;
    groups = std::min(tiles, kMostGroups);
    const auto token_bytes = (vocabulary + groups * width) * static_cast<std::int64_t>(size_of(accumulator_of(hidden.dtype)));
    const std::int64_t most = std::clamp<std::int64_t>(kChunkBytes / token_bytes / 32 * 32, 32, kMostChunkTokens);
    const std::int64_t chunks = (tokens + most - 1) / most;
    chunk = chunks == 0 ? 0 : (tokens + chunks - 1) / chunks;
  }

  std::int64_t tile_width(std::int64_t tile) const { return std::min(kTileWidth, vocabulary - tile * kTileWidth); }
  std::int64_t group_begin(std::int64_t group) const { return tiles * group / groups; }

  DType operand(DType compute) const { return converted ? DType::float32 : compute; }
  TileProduct logits_product(DType compute, std::int64_t rows, std::int64_t columns) const {
    return {.m = rows,
            .n = columns,
            .k = width,
            .a_stride = width,
            .b_stride = width,
            .c_stride = columns,
            .transpose_b = true,
            .input = operand(compute),
            .output = accumulator_of(compute)};
  }
  /// dhidden's partial sum (+)= dlogits W over one tile's words.
  TileProduct dhidden_product(DType compute, std::int64_t rows, std::int64_t columns, bool accumulate) const {
    return {.m = rows,
            .n = width,
            .k = columns,
            .a_stride = columns,
            .b_stride = width,
            .c_stride = width,
            .input = operand(compute),
            .output = accumulator_of(compute),
            .accumulate = accumulate};
  }
  TileProduct dweight_product(DType compute, std::int64_t rows, std::int64_t columns) const {
    return {.m = columns,
            .n = width,
            .k = rows,
            .a_stride = columns,
            .b_stride = width,
            .c_stride = width,
            .transpose_a = true,
            .input = operand(compute),
            .output = accumulator_of(compute),
            .accumulate = true};
  }
};

/// The scratch of one call, in pieces.
template <class T>
struct LossScratch {
  using A = Accumulator<T>;
  std::size_t logits, partial, maxima, hidden;        ///< elements
  std::size_t worker_logits, worker_weight, product;  ///< of each worker: elements, elements, bytes

  explicit LossScratch(const LossPlan& plan) {
    const auto chunk = static_cast<std::size_t>(plan.chunk), width = static_cast<std::size_t>(plan.width);
    const auto words = static_cast<std::size_t>(std::min(plan.vocabulary, kTileWidth));
    logits = plan.gradient ? static_cast<std::size_t>(plan.tiles * kTileWidth) * chunk : 0;
    partial = plan.gradient ? static_cast<std::size_t>(plan.groups) * chunk * width : 0;
    maxima = static_cast<std::size_t>(plan.tiles) * chunk;
    hidden = plan.converted ? chunk * width : 0;
    worker_logits = plan.gradient ? 0 : words * chunk;
    worker_weight = plan.converted ? words * width : 0;
    product = 0;
    const std::int64_t last = plan.tokens - (plan.chunk == 0 ? 0 : (plan.tokens - 1) / plan.chunk * plan.chunk);
    for (const std::int64_t rows : {plan.chunk, last}) {
      for (const std::int64_t columns : {plan.tile_width(0), plan.tile_width(plan.tiles - 1)}) {
        for (const auto& tile :
             {plan.logits_product(kDTypeOf<T>, rows, columns), plan.dweight_product(kDTypeOf<T>, rows, columns),
              plan.dhidden_product(kDTypeOf<T>, rows, columns, false),
              plan.dhidden_product(kDTypeOf<T>, rows, columns, true)}) {
          product = std::max(product, tile_scratch_bytes(tile));
        }
      }
    }
  }

  std::size_t shared_bytes() const {
    return ScratchAllocator::aligned_bytes<A>(logits) + ScratchAllocator::aligned_bytes<A>(partial) +
           2 * ScratchAllocator::aligned_bytes<A>(maxima) + ScratchAllocator::aligned_bytes<A>(kMostChunkTokens) +
           ScratchAllocator::aligned_bytes<A>(hidden);
  }
  std::size_t worker_bytes() const {
    return ScratchAllocator::aligned_bytes<A>(worker_logits) + ScratchAllocator::aligned_bytes<A>(worker_weight) +
           ScratchAllocator::aligned_bytes<std::byte>(product);
  }
};

template <class T>
class Loss {
 public:
  using A = Accumulator<T>;

  Loss(const Launch& launch, const LossPlan& plan, const Tensor& hidden, const Tensor& weight, const Tensor& targets)
      : plan_(plan), sizes_(plan), hidden_(hidden.as<T>()), weight_(weight.as<T>()), targets_(targets.as<std::int32_t>()) {
    const std::size_t need = sizes_.shared_bytes() + sizes_.worker_bytes();
    require(launch.scratch.size() >= need, "linear_cross_entropy: need ", need, " bytes of scratch for ", hidden.type, " and ",
            weight.type, ", have ", launch.scratch.size());
    workers_ = worker_count(launch.scratch.size() - sizes_.shared_bytes(), sizes_.worker_bytes());
    ScratchAllocator scratch(launch);
    logits_ = scratch.take<A>(sizes_.logits);
    partial_ = scratch.take<A>(sizes_.partial);
    maxima_ = scratch.take<A>(sizes_.maxima);
    sums_ = scratch.take<A>(sizes_.maxima);
    target_logits_ = scratch.take<A>(kMostChunkTokens);
    converted_hidden_ = scratch.take<A>(sizes_.hidden);
    worker_scratch_ = launch.scratch.data() + sizes_.shared_bytes();
  }

  /// `dhidden` and `dweight` are null when no gradient is wanted.
  void run(A* losses, T* dhidden, A* dweight, A scale) {
    for (begin_ = 0; begin_ < plan_.tokens; begin_ += plan_.chunk) {
      rows_ = std::min(plan_.chunk, plan_.tokens - begin_);
      convert_hidden();
      parallel_workers(plan_.tiles, workers_, [&](std::int64_t tile, int worker) { exponentiate_tile(tile, worker); });
      finish_losses(losses + begin_, scale);
      if (dweight != nullptr) {
        parallel_workers(plan_.groups, workers_,
                         [&](std::int64_t group, int worker) { differentiate_group(group, worker, dweight, scale); });
        sum_partials(dhidden + begin_ * plan_.width);
      }
    }
  }

 private:
  struct WorkerScratch {
    A* logits;
    A* weight;
    std::byte* product;
  };

  WorkerScratch scratch_of(int worker) const {
    std::byte* base = worker_scratch_ + static_cast<std::size_t>(worker) * sizes_.worker_bytes();
    std::byte* weight = base + ScratchAllocator::aligned_bytes<A>(sizes_.worker_logits);
    return {reinterpret_cast<A*>(base), reinterpret_cast<A*>(weight),
            weight + ScratchAllocator::aligned_bytes<A>(sizes_.worker_weight)};
  }

  void convert_hidden() {
    if constexpr (std::is_same_v<T, bfloat16>) {
      if (plan_.converted) {
        parallel_ranges(rows_, kEmbeddingRows, [&](std::int64_t begin, std::int64_t end) {
          convert_block(converted_hidden_ + begin * plan_.width, plan_.width, hidden_ + (begin_ + begin) * plan_.width,
                        plan_.width, end - begin, plan_.width);
        });
      }
    }
  }

  const void* hidden_operand() const {
    return plan_.converted ? static_cast<const void*>(converted_hidden_) : hidden_ + begin_ * plan_.width;
  }

  /// The rows of the weight that belong to a tile, as the products read them.
  const void* weight_operand(std::int64_t tile, const WorkerScratch& scratch) const {
    const T* rows = weight_ + tile * kTileWidth * plan_.width;
    if constexpr (std::is_same_v<T, bfloat16>) {
      if (plan_.converted) {
        convert_block(scratch.weight, plan_.width, rows, plan_.width, plan_.tile_width(tile), plan_.width);
        return scratch.weight;
      }
    }
    return rows;
  }

  A* tile_logits(std::int64_t tile, const WorkerScratch& scratch) const {
    return plan_.gradient ? logits_ + tile * kTileWidth * plan_.chunk : scratch.logits;
  }

  /// Logits of one tile become exp(logit - row's maximum in the tile), with that maximum and the row's sum kept.
  void exponentiate_tile(std::int64_t tile, int worker) {
    const WorkerScratch scratch = scratch_of(worker);
    const std::int64_t width = plan_.tile_width(tile);
    A* logits = tile_logits(tile, scratch);
    run_tile(plan_.logits_product(kDTypeOf<T>, rows_, width), logits, hidden_operand(), weight_operand(tile, scratch),
             scratch.product);
    for (std::int64_t t = 0; t < rows_; ++t) {
      A* row = logits + t * width;
      const std::int64_t target = targets_[begin_ + t] - tile * kTileWidth;
      if (target >= 0 && target < width) {
        target_logits_[t] = row[target];
      }
      A highest = row[0], sum = 0;
#pragma omp simd reduction(max : highest)
      for (std::int64_t j = 0; j < width; ++j) {
        highest = row[j] > highest ? row[j] : highest;
      }
#pragma omp simd reduction(+ : sum)
      for (std::int64_t j = 0; j < width; ++j) {
        const A value = fast_exp(row[j] - highest);
        row[j] = value;
        sum += value;
      }
      maxima_[tile * plan_.chunk + t] = highest;
      sums_[tile * plan_.chunk + t] = sum;
    }
  }

  /// loss = log sum exp - target's logit; maxima become the factors that turn a tile's exponentials into scale * softmax.
  void finish_losses(A* losses, A scale) {
    parallel_ranges(rows_, kEmbeddingRows, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t t = first; t < last; ++t) {
        double highest = -std::numeric_limits<double>::infinity(), sum = 0;
        for (std::int64_t tile = 0; tile < plan_.tiles; ++tile) {
          highest = std::max<double>(highest, maxima_[tile * plan_.chunk + t]);
        }
        for (std::int64_t tile = 0; tile < plan_.tiles; ++tile) {
          sum += static_cast<double>(sums_[tile * plan_.chunk + t]) * std::exp(maxima_[tile * plan_.chunk + t] - highest);
        }
        const bool counts = targets_[begin_ + t] >= 0;
        losses[t] = counts ? static_cast<A>(highest + std::log(sum) - static_cast<double>(target_logits_[t])) : A(0);
        for (std::int64_t tile = 0; tile < plan_.tiles; ++tile) {
          A& factor = maxima_[tile * plan_.chunk + t];
          factor = counts ? static_cast<A>(static_cast<double>(scale) / sum * std::exp(factor - highest)) : A(0);
        }
      }
    });
  }

  /// Exponentials of one tile become the logits' gradient, scale * (softmax - onehot), in place.
  void differentiate_tile(std::int64_t tile, A* logits, A scale) const {
    const std::int64_t width = plan_.tile_width(tile);
    for (std::int64_t t = 0; t < rows_; ++t) {
      A* row = logits + t * width;
      const A factor = maxima_[tile * plan_.chunk + t];
#pragma omp simd
      for (std::int64_t j = 0; j < width; ++j) {
        row[j] *= factor;
      }
      const std::int64_t target = targets_[begin_ + t] - tile * kTileWidth;
      if (targets_[begin_ + t] >= 0 && target >= 0 && target < width) {
        row[target] -= scale;
      }
      if constexpr (std::is_same_v<T, bfloat16>) {
        if (!plan_.converted) {  // packed to the front of the tile's memory: never past what has been read
          bfloat16 packed[kTileWidth];
          convert_block(packed, width, row, width, 1, width);
          std::memcpy(reinterpret_cast<std::byte*>(logits) + t * width * 2, packed, static_cast<std::size_t>(width) * 2);
        }
      }
    }
  }

  void differentiate_group(std::int64_t group, int worker, A* dweight, A scale) {
    const WorkerScratch scratch = scratch_of(worker);
    const std::int64_t first = plan_.group_begin(group), last = plan_.group_begin(group + 1);
    A* partial = partial_ + group * plan_.chunk * plan_.width;
    for (std::int64_t tile = first; tile < last; ++tile) {
      A* logits = tile_logits(tile, scratch);
      differentiate_tile(tile, logits, scale);
      const std::int64_t width = plan_.tile_width(tile);
      run_tile(plan_.dweight_product(kDTypeOf<T>, rows_, width), dweight + tile * kTileWidth * plan_.width, logits,
               hidden_operand(), scratch.product);
      run_tile(plan_.dhidden_product(kDTypeOf<T>, rows_, width, tile > first), partial, logits, weight_operand(tile, scratch),
               scratch.product);
    }
  }

  void sum_partials(T* dhidden) const {
    parallel_ranges(rows_ * plan_.width, std::int64_t{1} << 12, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        A sum = 0;
        for (std::int64_t group = 0; group < plan_.groups; ++group) {
          sum += partial_[group * plan_.chunk * plan_.width + i];
        }
        dhidden[i] = convert<T>(sum);
      }
    });
  }

  LossPlan plan_;
  LossScratch<T> sizes_;
  const T* hidden_;
  const T* weight_;
  const std::int32_t* targets_;
  int workers_ = 1;
  A *logits_, *partial_, *maxima_, *sums_, *target_logits_, *converted_hidden_;
  std::byte* worker_scratch_;
  std::int64_t begin_ = 0, rows_ = 0;  ///< the chunk at hand
};

void run_loss(const Launch& launch, const Tensor& losses, const Tensor& dhidden, const Tensor& dweight, const Tensor& hidden,
              const Tensor& weight, const Tensor& targets, double scale) {
  const LossPlan plan(hidden.type, weight.type, static_cast<bool>(dweight));
  require(losses.elements() == plan.tokens, "linear_cross_entropy: losses ", losses.type, " do not match hidden ", hidden.type);
  require_rows("linear_cross_entropy", "targets", targets, plan.tokens, plan.vocabulary, true);
  if (plan.tokens == 0) {
    return;
  }
  dispatch_floating(hidden.dtype(), "linear_cross_entropy", [&]<class T>() {
    using A = Accumulator<T>;
    Loss<T>(launch, plan, hidden, weight, targets)
        .run(losses.as<A>(), dhidden ? dhidden.as<T>() : nullptr, dweight ? dweight.as<A>() : nullptr, static_cast<A>(scale));
  });
}

}  // namespace

void embedding(const Launch&, const Tensor& out, const Tensor& table, const Tensor& tokens) {
  const std::int64_t vocabulary = table.shape()[0], width = table.shape().columns();
  require(out.dtype() == table.dtype() && out.shape().columns() == width, "embedding: output ", out.type,
          " does not match table ", table.type);
  require_rows("embedding", "tokens", tokens, out.shape().rows(), vocabulary, false);
  const auto* rows = tokens.as<std::int32_t>();
  const auto bytes = static_cast<std::size_t>(width) * size_of(table.dtype());
  const auto* from = static_cast<const std::byte*>(table.data);
  auto* to = static_cast<std::byte*>(out.data);
  parallel_ranges(out.shape().rows(), kEmbeddingRows, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      std::memcpy(to + static_cast<std::size_t>(t) * bytes, from + static_cast<std::size_t>(rows[t]) * bytes, bytes);
    }
  });
}

std::size_t embedding_backward_workspace(const TensorType&) {
  return 0;
}

void embedding_backward(const Launch&, const Tensor& dtable, const Tensor& dout, const Tensor& tokens) {
  const std::int64_t vocabulary = dtable.shape()[0], width = dtable.shape().columns(), count = dout.shape().rows();
  require(dout.shape().columns() == width, "embedding_backward: dout ", dout.type, " does not match dtable ", dtable.type);
  require_rows("embedding_backward", "tokens", tokens, count, vocabulary, false);
  const auto* rows = tokens.as<std::int32_t>();
  dispatch_floating(dout.dtype(), "embedding_backward", [&]<class T>() {
    using A = Accumulator<T>;
    A* gradient = dtable.as<A>();
    const T* from = dout.as<T>();
    // Each task owns a few columns and walks all tokens in order: no two tasks add to one element.
    parallel_ranges(width, kEmbeddingColumns, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t t = 0; t < count; ++t) {
        A* row = gradient + rows[t] * width;
        const T* add = from + t * width;
#pragma omp simd
        for (std::int64_t j = begin; j < end; ++j) {
          row[j] += convert<A>(add[j]);
        }
      }
    });
  });
}

void linear_cross_entropy(const Launch& launch, const Tensor& losses, const Tensor& hidden, const Tensor& weight,
                          const Tensor& targets) {
  run_loss(launch, losses, {}, {}, hidden, weight, targets, 1.0);
}

void linear_cross_entropy_with_gradient(const Launch& launch, const Tensor& losses, const Tensor& dhidden,
                                        const Tensor& dweight, const Tensor& hidden, const Tensor& weight,
                                        const Tensor& targets, double scale) {
  require(dhidden.type == hidden.type && dweight.elements() == weight.elements(), "linear_cross_entropy: gradients ",
          dhidden.type, " and ", dweight.type, " do not match ", hidden.type, " and ", weight.type);
  run_loss(launch, losses, dhidden, dweight, hidden, weight, targets, scale);
}

std::size_t linear_cross_entropy_workspace(const TensorType& hidden, const TensorType& weight, bool with_gradient) {
  const LossPlan plan(hidden, weight, with_gradient);
  return dispatch_floating(hidden.dtype, "linear_cross_entropy", [&]<class T>() {
    const LossScratch<T> sizes(plan);
    return sizes.shared_bytes() + sizes.worker_bytes() * static_cast<std::size_t>(thread_count());
  });
}

}  // namespace attamba::kernels::cpu
