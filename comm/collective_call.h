// One collective as a rank sees it: enough to compare it with what the other ranks are doing, and to name it in a message.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "src/core/dtype.h"
#include "src/core/error.h"

namespace attamba {

/// Ranks have come to different collectives; every rank throws it.
class RanksDisagree : public Error {
 public:
  using Error::Error;
};

struct CollectiveCall {
  enum class Kind : std::uint8_t {
    barrier,
    all_reduce_sum,
    start_all_reduce_sum,
    all_reduce_max,
    broadcast,
    all_gather,
    start_reduce_scatter_sum,
    start_all_gather,
  };

  Kind kind = Kind::barrier;
  DType dtype = DType::float32;
  int root = 0;
  std::size_t bytes = 0;  ///< that each rank gives

  /// Non-negative; equal exactly if the calls are (up to 2^43 bytes and 2^14 roots).
  std::int64_t signature() const {
    return (static_cast<std::int64_t>(kind) << 60) | (static_cast<std::int64_t>(dtype) << 57) |
           (static_cast<std::int64_t>(root & 0x3fff) << 43) | static_cast<std::int64_t>(bytes & kByteMask);
  }
  static CollectiveCall from_signature(std::int64_t signature) {
    return {static_cast<Kind>(signature >> 60), static_cast<DType>((signature >> 57) & 7),
            static_cast<int>((signature >> 43) & 0x3fff), static_cast<std::size_t>(signature) & kByteMask};
  }
  std::string_view name() const {
    constexpr std::array<std::string_view, 8> kNames = {
        "barrier",   "all_reduce_sum", "start_all_reduce_sum",     "all_reduce_max",
        "broadcast", "all_gather",     "start_reduce_scatter_sum", "start_all_gather"};
    return kNames[static_cast<std::size_t>(kind)];
  }
  std::string describe() const {
    if (kind == Kind::barrier) {
      return "barrier";
    }
    const std::string text = concat(name(), " of ", bytes, " bytes of ", name_of(dtype));
    return kind == Kind::broadcast ? concat(text, " from rank ", root) : text;
  }
  /// What RanksDisagree says when the ranks' signatures differ in the collective of this number: who does what, the most common
  /// call first, so that the ranks named last, with their hosts, are those that went astray.
  static std::string describe_disagreement(std::span<const std::int64_t> signatures, std::span<const std::string> hosts,
                                           int rank, std::int64_t number) {
    std::map<std::int64_t, std::vector<std::size_t>> ranks_in;
    for (std::size_t r = 0; r < signatures.size(); ++r) {
      ranks_in[signatures[r]].push_back(r);
    }
    std::vector<std::pair<std::int64_t, std::vector<std::size_t>>> groups(ranks_in.begin(), ranks_in.end());
    std::stable_sort(groups.begin(), groups.end(),
                     [](const auto& a, const auto& b) { return a.second.size() > b.second.size(); });
    std::string text = concat("ranks do not agree on what to do in collective number ", number, " (this is rank ", rank, " of ",
                              signatures.size(), ")");
    for (std::size_t g = 0; g < groups.size(); ++g) {
      text += g == 0 ? ": " : "; ";
      const std::vector<std::size_t>& ranks = groups[g].second;
      text += ranks.size() == 1 ? "rank" : "ranks";
      for (std::size_t i = 0; i < std::min(ranks.size(), kRanksNamed); ++i) {
        text += concat(i == 0 ? " " : ", ", ranks[i]);
        text += g == 0 ? std::string() : concat(" on ", hosts[ranks[i]]);
      }
      text += concat(ranks.size() > kRanksNamed ? ", ... in " : " in ", from_signature(groups[g].first).describe());
    }
    return text;
  }

  static constexpr std::size_t kRanksNamed = 8;
  static constexpr std::size_t kByteMask = (std::size_t{1} << 43) - 1;
};

}  // namespace attamba
