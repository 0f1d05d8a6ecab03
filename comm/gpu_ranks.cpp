#include "comm/gpu_ranks.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <set>

#include "src/core/error.h"

namespace attamba {

namespace {

/// A GpuOfRank as it travels.
struct Packed {
  std::array<char, 64> host{}, gpu{}, name{};
  std::int32_t library_version = 0;
};
static_assert(sizeof(Packed) % sizeof(std::int32_t) == 0);

std::array<char, 64> pack(const std::string& text) {
  std::array<char, 64> packed{};
  std::memcpy(packed.data(), text.data(), std::min(text.size(), packed.size() - 1));
  return packed;
}

std::string list(const std::vector<std::size_t>& ranks) {
  std::string text;
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    text += concat(i == 0 ? "" : i + 1 == ranks.size() ? " and " : ", ", ranks[i]);
  }
  return text;
}

}  // namespace

std::vector<GpuOfRank> gather_gpus(Communicator& host, const GpuOfRank& own) {
  Packed part{pack(own.host), pack(own.gpu), pack(own.name), own.library_version};
  std::vector<Packed> whole(static_cast<std::size_t>(host.size()));
  constexpr std::int64_t kWords = sizeof(Packed) / sizeof(std::int32_t);
  host.all_gather({whole.data(), {DType::int32, {kWords * host.size()}}}, {&part, {DType::int32, {kWords}}});
  std::vector<GpuOfRank> ranks;
  for (const Packed& packed : whole) {
    ranks.push_back({packed.host.data(), packed.gpu.data(), packed.name.data(), packed.library_version});
  }
  return ranks;
}

void require_usable_for_nccl(std::span<const GpuOfRank> ranks) {
  std::map<std::string, std::vector<std::size_t>> by_gpu;
  for (std::size_t rank = 0; rank < ranks.size(); ++rank) {
    by_gpu[ranks[rank].gpu].push_back(rank);
  }
  for (const auto& [gpu, sharing] : by_gpu) {
    const GpuOfRank& first = ranks[sharing.front()];
    require<UsageError>(sharing.size() == 1, "ranks ", list(sharing), " are on one GPU (", gpu, ", ", first.name, ", host ",
                        first.host, "), which NCCL cannot do: start one rank per GPU (mpirun -n, srun --ntasks-per-node, ",
                        "CUDA_VISIBLE_DEVICES), or let ranks share GPUs with train.transport = \"staged\"");
  }
  for (std::size_t rank = 1; rank < ranks.size(); ++rank) {
    require<UsageError>(ranks[rank].library_version == ranks[0].library_version, "rank 0 (host ", ranks[0].host, ") has NCCL ",
                        nccl_version_text(ranks[0].library_version), ", rank ", rank, " (host ", ranks[rank].host, ") has ",
                        nccl_version_text(ranks[rank].library_version), ": install one version everywhere");
  }
}

std::string nccl_version_text(int version) {
  // 2.8 and older: 2804; newer: 22809.
  const int major = version < 10000 ? version / 1000 : version / 10000;
  const int minor = version < 10000 ? version % 1000 / 100 : version % 10000 / 100;
  return concat(major, '.', minor, '.', version % 100);
}

std::string describe_gpus(std::span<const GpuOfRank> ranks) {
  std::set<std::string> hosts, names;
  for (const GpuOfRank& rank : ranks) {
    hosts.insert(rank.host);
    names.insert(rank.name);
  }
  std::string kinds;
  for (const std::string& name : names) {
    kinds += concat(kinds.empty() ? "" : ", ", name);
  }
  return concat(ranks.size(), ranks.size() == 1 ? " GPU on " : " GPUs on ", hosts.size(),
                hosts.size() == 1 ? " host (" : " hosts (", kinds, ")");
}

void* open_library(std::span<const std::string> places, const std::string& advice) {
  std::string tried, reason;
  for (const std::string& place : places) {
    if (void* library = dlopen(place.c_str(), RTLD_NOW | RTLD_LOCAL)) {
      return library;
    }
    const char* error = dlerror();
    reason = error == nullptr ? "no reason given" : error;
    tried += concat(tried.empty() ? "" : ", ", place);
  }
  throw UsageError(concat("none of these could be loaded: ", tried, " (", reason, "); ", advice));
}

std::size_t CollectiveLog::add(const CollectiveCall& call, bool recorded, double now) {
  const std::lock_guard lock(mutex_);
  if (!building_) {
    building_ = true;
    open_ = {.first = next_, .collectives = {}, .since = now};
  }
  running_ = !recorded;
  open_.collectives.push_back(call);
  return open_.collectives.size();
}

bool CollectiveLog::close_piece(int piece, double now) {
  const std::lock_guard lock(mutex_);
  Piece& closed = recorded_[piece];
  if (building_) {
    closed = std::move(open_);
  }
  building_ = running_ = false;
  if (closed.collectives.empty()) {
    return false;
  }
  closed.first = next_;
  closed.since = now;
  next_ += static_cast<std::int64_t>(closed.collectives.size());
  enqueued_.push_back(closed);
  return true;
}

void CollectiveLog::observe(std::size_t pieces_finished, std::size_t mark, double now) {
  const std::lock_guard lock(mutex_);
  if (pieces_finished != 0 || mark != mark_) {
    moved_ = now;
  }
  mark_ = mark;
  for (; pieces_finished > 0 && !enqueued_.empty(); --pieces_finished) {
    see(enqueued_.front(), mark_after(enqueued_.front().collectives.size()));
    enqueued_.pop_front();
  }
  if (const Piece* piece = oldest(); piece != nullptr && mark_ > 0) {
    see(*piece, mark_);
  }
}

/// A mark may be of a later piece than the one that is thought to run, and then tells too little: positions never go back.
void CollectiveLog::see(const Piece& piece, std::size_t mark) {
  const std::size_t entered = std::min((mark + 1) / 2, piece.collectives.size());
  const CollectiveProgress::Position seen{.number = piece.first + static_cast<std::int64_t>(entered) - 1,
                                          .signature = piece.collectives[entered - 1].signature(),
                                          .color = 0,
                                          .inside = mark % 2 != 0};
  if (seen.number > observed_.number || (seen.number == observed_.number && !seen.inside)) {
    observed_ = seen;
  }
}

CollectiveProgress::Position CollectiveLog::position() const {
  const std::lock_guard lock(mutex_);
  return observed_;
}

const CollectiveLog::Piece* CollectiveLog::oldest() const {
  if (!enqueued_.empty()) {
    return &enqueued_.front();
  }
  return running_ && done() < open_.collectives.size() ? &open_ : nullptr;
}

std::optional<CollectiveLog::Stuck> CollectiveLog::stuck(double now, double limit) const {
  const std::lock_guard lock(mutex_);
  const Piece* piece = oldest();
  if (limit == 0 || piece == nullptr) {
    return std::nullopt;
  }
  const double seconds = now - std::max(piece->since, moved_);
  if (seconds <= limit) {
    return std::nullopt;
  }
  // The device has 0 to report before the first, and after the last one while the piece's end is still to come.
  const std::size_t index = std::min(done(), piece->collectives.size() - 1);
  return Stuck{.call = piece->collectives[index],
               .number = piece->first + static_cast<std::int64_t>(index),
               .position = index + 1,
               .of = piece->collectives.size(),
               .seconds = seconds};
}

std::string describe_stuck(const CollectiveLog::Stuck& stuck, int rank, int size, const std::string& host) {
  return concat("rank ", rank, " of ", size, " on ", host, " waits for ", stuck.call.describe(), ", collective number ",
                stuck.number, " (", stuck.position, " of ", stuck.of, " in its step): nothing has moved for ",
                static_cast<std::int64_t>(stuck.seconds),
                " s. A rank that reports a smaller number, or nothing, is the one that ",
                "hangs. ATTAMBA_TIMEOUT sets how many seconds are waited, 0 for ever");
}

}  // namespace attamba
