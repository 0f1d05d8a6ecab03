#include "src/train/shard_layout.h"

#include <algorithm>
#include <map>
#include <string>

#include "src/core/error.h"

namespace attamba {

namespace {

constexpr std::int64_t round_up(std::int64_t elements) {
  return (elements + ShardLayout::kAlignment - 1) / ShardLayout::kAlignment * ShardLayout::kAlignment;
}

/// "layers.3" of a block's parameter, nothing of all others.
std::string block_of(const std::string& name) {
  constexpr std::string_view kPrefix = "layers.";
  return name.starts_with(kPrefix) ? name.substr(0, name.find('.', kPrefix.size())) : std::string();
}

}  // namespace

ShardLayout::ShardLayout(std::span<const ParameterInfo> parameters, std::span<const DType> dtypes, const Options& options)
    : ranks_(options.ranks) {
  require(parameters.size() == dtypes.size() && options.ranks > 0, "shards: ", parameters.size(), " parameters, ",
          dtypes.size(), " types, ", options.ranks, " ranks");
  const bool mixed = std::any_of(dtypes.begin(), dtypes.end(), [&](DType dtype) { return dtype != dtypes[0]; });
  struct Open {
    Bucket bucket;
    std::string block;
    std::int64_t next = 0;
  };
  std::map<DType, Open> open;
  const auto finish = [&](Open& o) {
    if (o.bucket.members.empty()) {
      return;
    }
    o.bucket.part = round_up((o.next + ranks_ - 1) / ranks_);
    o.bucket.total = o.bucket.part * ranks_;
    buckets_.push_back(std::move(o.bucket));
    o = {};
  };
  for (std::size_t i = parameters.size(); i-- > 0;) {
    const std::string block = block_of(parameters[i].name);
    Open& o = open[dtypes[i]];
    const bool whole_blocks = options.by_block && !(mixed && dtypes[i] != DType::bfloat16);
    if (whole_blocks && block != o.block) {
      finish(o);
    }
    o.block = block;
    o.bucket.dtype = dtypes[i];
    o.bucket.spread = !whole_blocks;
    const std::int64_t elements = parameters[i].shape.elements();
    o.bucket.members.push_back({i, o.next, elements});
    o.next += round_up(elements);
    if (!whole_blocks && static_cast<std::size_t>(o.next) * options.width >= options.bucket_bytes) {
      finish(o);
    }
  }
  for (auto& [dtype, o] : open) {
    finish(o);
  }
}

std::vector<ShardLayout::Slice> ShardLayout::slices(std::size_t bucket, int rank) const {
  const Bucket& b = buckets_.at(bucket);
  const std::int64_t from = b.part * rank, to = from + b.part;
  std::vector<Slice> slices;
  for (const Member& m : b.members) {
    const std::int64_t begin = std::max(m.first, from), end = std::min(m.first + m.elements, to);
    if (begin < end) {
      slices.push_back({bucket, m.parameter, begin - m.first, end - m.first, begin - from});
    }
  }
  return slices;
}

std::vector<ShardLayout::Slice> ShardLayout::slices(int rank) const {
  std::vector<Slice> all;
  for (std::size_t bucket = 0; bucket < buckets_.size(); ++bucket) {
    const std::vector<Slice> own = slices(bucket, rank);
    all.insert(all.end(), own.begin(), own.end());
  }
  return all;
}

std::int64_t ShardLayout::total() const {
  std::int64_t sum = 0;
  for (const Bucket& bucket : buckets_) {
    sum += bucket.total;
  }
  return sum;
}

}  // namespace attamba
