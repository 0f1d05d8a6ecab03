// Which rank owns which part of the weights' gradients and optimizer state (docs/architecture.md, Sharding).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "src/core/dtype.h"
#include "src/models/model.h"

namespace attamba {

/// Parameters lie in buckets, in the order in which the backward pass completes their gradients. All memory of a bucket
/// (gradients, sums, weights) has the same places, counted in elements: each parameter begins at a multiple of kAlignment, and
/// the whole is padded so that it makes as many equal, aligned parts as there are ranks. Rank r owns the r-th part of every
/// bucket. A bucket's weights are of one compute type.
class ShardLayout {
 public:
  /// Elements; bfloat16 numbers of which are as many bytes as memory is aligned by.
  static constexpr std::int64_t kAlignment = 128;

  struct Member {
    std::size_t parameter = 0;  ///< in the order of declaration
    std::int64_t first = 0;     ///< its first element's place
    std::int64_t elements = 0;
  };
  struct Bucket {
    DType dtype = DType::float32;
    std::vector<Member> members;
    std::int64_t part = 0;   ///< elements that a rank owns
    bool spread = false;     ///< its parameters belong to many blocks
    std::int64_t total = 0;  ///< part * ranks
  };
  /// Elements [begin, end) of a parameter, which lie at place `at` of the owner's part.
  struct Slice {
    std::size_t bucket = 0, parameter = 0;
    std::int64_t begin = 0, end = 0, at = 0;
    std::int64_t elements() const { return end - begin; }
  };
  struct Options {
    int ranks = 1;
    std::size_t bucket_bytes = 0;  ///< a bucket ends when it has so many ...
    std::size_t width = 4;         ///< ... with this many bytes per element
    bool by_block = false;         ///< a bucket ends where a block of the model does, instead; what is of the accumulator type
                                   ///< beside matrices of another one is spread over buckets of bucket_bytes
  };

  /// `dtypes`: the compute type of each parameter.
  ShardLayout(std::span<const ParameterInfo> parameters, std::span<const DType> dtypes, const Options& options);

  const std::vector<Bucket>& buckets() const { return buckets_; }
  int ranks() const { return ranks_; }
  /// What a rank owns of a bucket, in the order of places.
  std::vector<Slice> slices(std::size_t bucket, int rank) const;
  /// Of all buckets.
  std::vector<Slice> slices(int rank) const;

 private:
  int ranks_;
  std::vector<Bucket> buckets_;
};

}  // namespace attamba
