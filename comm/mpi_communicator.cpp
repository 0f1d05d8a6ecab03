#include "comm/mpi_communicator.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <iostream>
#include <thread>
#include <vector>

#include "comm/checks.h"

namespace attamba {

namespace {

/// Integers are added as unsigned ones: the sum wraps, by definition.
MPI_Datatype sum_type(DType dtype) {
  switch (dtype) {
    case DType::float64:
      return MPI_DOUBLE;
    case DType::int32:
      return MPI_UINT32_T;
    case DType::int64:
      return MPI_UINT64_T;
    default:
      return MPI_FLOAT;
  }
}

MPI_Datatype value_type(DType dtype) {
  switch (dtype) {
    case DType::int32:
      return MPI_INT32_T;
    case DType::int64:
      return MPI_INT64_T;
    default:
      return sum_type(dtype);
  }
}

template <class T>
void keep_larger(const void* in, void* in_out, int count) {
  const T* from = static_cast<const T*>(in);
  T* to = static_cast<T*>(in_out);
  for (int i = 0; i < count; ++i) {
    if (std::isnan(from[i]) || from[i] > to[i]) {
      to[i] = from[i];
    }
  }
}

/// MPI_MAX lets the order of the operands decide about a NaN, so ranks might disagree.
void nan_keeping_max(void* in, void* in_out, int* count, MPI_Datatype* type) {
  if (*type == MPI_FLOAT) {
    keep_larger<float>(in, in_out, *count);
  } else {
    keep_larger<double>(in, in_out, *count);
  }
}

/// Polls until done. The core is offered to others from the start; after 100 us the thread sleeps between two looks, for 1/16
/// of the time it has waited so far and at most 1 ms, so sleeping prolongs no wait by more than that.
int wait_politely(MPI_Request& request) {
  using Clock = std::chrono::steady_clock;
  constexpr auto kYielding = std::chrono::microseconds(100);
  constexpr auto kLongestSleep = std::chrono::nanoseconds(std::chrono::milliseconds(1));
  const auto start = Clock::now();
  for (;;) {
    int done = 0;
    const int code = MPI_Test(&request, &done, MPI_STATUS_IGNORE);
    if (code != MPI_SUCCESS || done != 0) {
      return code;
    }
    const auto waited = Clock::now() - start;
    if (waited < kYielding) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(std::min<std::chrono::nanoseconds>(waited / 16, kLongestSleep));
    }
  }
}

/// body(offset, length) over consecutive pieces; lengths fit MPI's int counts.
template <class Body>
void for_pieces(std::size_t count, std::size_t piece, const Body& body) {
  for (std::size_t offset = 0; offset < count; offset += piece) {
    body(offset, static_cast<int>(std::min(piece, count - offset)));
  }
}

std::string library_version() {
  std::array<char, MPI_MAX_LIBRARY_VERSION_STRING> text{};
  int length = 0;
  MPI_Get_library_version(text.data(), &length);
  std::string version(text.data(), static_cast<std::size_t>(length));
  version.resize(std::min(version.find_first_of(",\n"), version.size()));
  std::replace(version.begin(), version.end(), '\t', ' ');
  return version;
}

}  // namespace

MpiCommunicator::Session::Session() {
  int initialized = 0;
  int finalized = 0;
  MPI_Initialized(&initialized);
  MPI_Finalized(&finalized);
  require(finalized == 0, "mpi: already finalised; a process can have only one communicator in its life");
  int provided = MPI_THREAD_SINGLE;
  if (initialized != 0) {
    MPI_Query_thread(&provided);
  } else {
    // A rank has more threads than one, so its cores are always wanted: what blocks inside Open MPI shall yield. An existing
    // setting wins.
    setenv("OMPI_MCA_mpi_yield_when_idle", "1", 0);
    const int code = MPI_Init_thread(nullptr, nullptr, MPI_THREAD_MULTIPLE, &provided);
    require(code == MPI_SUCCESS, "mpi: MPI_Init_thread failed with code ", code);
    owned = true;
  }
  if (provided < MPI_THREAD_MULTIPLE) {
    const std::string version = library_version();
    if (owned) {
      MPI_Finalize();
    }
    throw UsageError(concat("mpi: ", version, " offers thread level ", provided, ", MPI_THREAD_MULTIPLE (", MPI_THREAD_MULTIPLE,
                            ") is needed: use an MPI library built with thread support (ompi_info | grep THREAD_MULTIPLE)"));
  }
}

MpiCommunicator::Session::~Session() {
  int finalized = 0;
  MPI_Finalized(&finalized);
  if (owned && finalized == 0) {
    MPI_Finalize();
  }
}

MpiCommunicator::MpiCommunicator(const LaunchEnvironment& launch) : exceptions_at_start_(std::uncaught_exceptions()) {
  MPI_Comm_size(MPI_COMM_WORLD, &size_);
  require<UsageError>(launch.size == 0 || launch.size == size_, "mpi: the launcher (", launch.launcher, ") started ",
                      launch.size, " processes, but ", library_version(), " sees ", size_,
                      ": start the program with the launcher of that library (its mpirun, or srun --mpi=pmix)");
  join(MPI_COMM_WORLD);
}

MpiCommunicator::MpiCommunicator(MPI_Comm ranks) : exceptions_at_start_(std::uncaught_exceptions()) {
  join(ranks);
}

void MpiCommunicator::join(MPI_Comm ranks) {
  MPI_Comm_rank(ranks, &rank_);
  MPI_Comm_size(ranks, &size_);
  MPI_Comm_dup(ranks, &foreground_);
  MPI_Comm_dup(ranks, &background_);
  MPI_Comm_set_errhandler(foreground_, MPI_ERRORS_RETURN);
  MPI_Comm_set_errhandler(background_, MPI_ERRORS_RETURN);
  MPI_Op_create(nan_keeping_max, 1, &nan_keeping_max_);

  MPI_Comm host = MPI_COMM_NULL;
  MPI_Comm_split_type(ranks, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &host);
  MPI_Comm_rank(host, &local_rank_);
  MPI_Comm_size(host, &local_size_);
  first_local_rank_ = rank_;
  MPI_Bcast(&first_local_rank_, 1, MPI_INT, 0, host);
  MPI_Comm_free(&host);
  hosts_ = local_rank_ == 0 ? 1 : 0;
  MPI_Allreduce(MPI_IN_PLACE, &hosts_, 1, MPI_INT, MPI_SUM, foreground_);

  worker_ = std::make_unique<OrderedWorker>(&progress());
}

std::unique_ptr<Communicator> MpiCommunicator::split(int color) {
  MPI_Comm group = MPI_COMM_NULL;
  MPI_Comm_split(foreground_, color, rank_, &group);
  auto ranks = std::make_unique<MpiCommunicator>(group);
  ranks->progress().join(progress(), color);
  MPI_Comm_free(&group);
  return ranks;
}

MpiCommunicator::~MpiCommunicator() {
  if (std::uncaught_exceptions() > exceptions_at_start_) {
    std::cerr << "mpi: rank " << rank_ << " of " << size_ << " leaves because of an exception; ending the job\n";
    abort(1);
  }
  worker_.reset();
  MPI_Op_free(&nan_keeping_max_);
  MPI_Comm_free(&background_);
  MPI_Comm_free(&foreground_);
}

std::string MpiCommunicator::description() const {
  return concat(library_version(), ", ", size_, size_ == 1 ? " rank" : " ranks", " on ", hosts_,
                hosts_ == 1 ? " host" : " hosts", " (", local_size_, " on this one)");
}

void MpiCommunicator::check(int code, const Call& call) const {
  if (code == MPI_SUCCESS) {
    return;
  }
  std::array<char, MPI_MAX_ERROR_STRING> text{};
  int length = 0;
  MPI_Error_string(code, text.data(), &length);
  throw Error(concat(call.describe(), " failed on rank ", rank_, " of ", size_, ": ", text.data()));
}

void MpiCommunicator::meet(Lane lane, const Call& call) {
  const MPI_Comm group = group_of(lane);
  // The largest and (negated) the smallest signature: they differ as soon as two ranks do.
  const std::int64_t own = call.signature();
  std::array<std::int64_t, 2> extremes = {own, -own};
  MPI_Request request = MPI_REQUEST_NULL;
  check(MPI_Iallreduce(MPI_IN_PLACE, extremes.data(), 2, MPI_INT64_T, MPI_MAX, group, &request), call);
  check(wait_politely(request), call);
  if (extremes[0] != -extremes[1]) {  // as all ranks know now, so all come to the next collective
    std::vector<std::int64_t> all(static_cast<std::size_t>(size_));
    check(MPI_Allgather(&own, 1, MPI_INT64_T, all.data(), 1, MPI_INT64_T, group), call);
    std::array<char, 64> host{};
    host_name().copy(host.data(), host.size() - 1);
    std::vector<char> names(host.size() * all.size());
    check(MPI_Allgather(host.data(), static_cast<int>(host.size()), MPI_CHAR, names.data(), static_cast<int>(host.size()),
                        MPI_CHAR, group),
          call);
    std::vector<std::string> hosts;
    for (std::size_t rank = 0; rank < all.size(); ++rank) {
      hosts.emplace_back(&names[rank * host.size()]);
    }
    throw RanksDisagree(CollectiveCall::describe_disagreement(all, hosts, rank_, progress().position(lane).number));
  }
}

void MpiCommunicator::sum_in_pieces(Lane lane, const Tensor& data, const Call& call) {
  const CollectiveProgress::Inside inside(progress(), lane, call);
  const MPI_Comm group = group_of(lane);
  meet(lane, call);
  const std::size_t width = size_of(data.dtype());
  auto* begin = static_cast<std::byte*>(data.data);
  for_pieces(data.bytes() / width, kPieceBytes / width, [&](std::size_t offset, int length) {
    check(MPI_Allreduce(MPI_IN_PLACE, begin + offset * width, length, sum_type(data.dtype()), MPI_SUM, group), call);
  });
}

void MpiCommunicator::all_reduce_sum(const Tensor& data) {
  comm_checks::in_host_memory("all_reduce_sum", data);
  comm_checks::reducible("all_reduce_sum", data);
  sum_in_pieces(Lane::foreground, data, {Call::Kind::all_reduce_sum, data.dtype(), 0, data.bytes()});
}

std::unique_ptr<Request> MpiCommunicator::start_all_reduce_sum(const Tensor& data) {
  comm_checks::in_host_memory("start_all_reduce_sum", data);
  comm_checks::reducible("start_all_reduce_sum", data);
  const Call call{Call::Kind::start_all_reduce_sum, data.dtype(), 0, data.bytes()};
  return worker_->post([this, data, call] { sum_in_pieces(Lane::background, data, call); });
}

/// MPI wants the parts of a piece next to each other, and what it reads apart from what it writes, so pieces are copied first.
void MpiCommunicator::scatter_in_pieces(const Tensor& whole, const Tensor& part, const Call& call) {
  const CollectiveProgress::Inside inside(progress(), Lane::background, call);
  meet(Lane::background, call);
  const std::size_t width = size_of(part.dtype()), ranks = static_cast<std::size_t>(size_);
  const std::size_t piece = std::max<std::size_t>(1, kPieceBytes / width / ranks);
  const auto* from = static_cast<const std::byte*>(whole.data);
  auto* to = static_cast<std::byte*>(part.data);
  std::vector<std::byte> packed(std::min(whole.bytes(), piece * width * ranks));
  for_pieces(part.bytes() / width, piece, [&](std::size_t offset, int length) {
    const std::size_t bytes = static_cast<std::size_t>(length) * width;
    for (std::size_t r = 0; r < ranks; ++r) {
      std::memcpy(packed.data() + r * bytes, from + r * part.bytes() + offset * width, bytes);
    }
    check(MPI_Reduce_scatter_block(packed.data(), to + offset * width, length, sum_type(part.dtype()), MPI_SUM, background_),
          call);
  });
}

std::unique_ptr<Request> MpiCommunicator::start_reduce_scatter_sum(const Tensor& whole, const Tensor& part) {
  comm_checks::in_host_memory("start_reduce_scatter_sum", whole);
  comm_checks::scatterable("start_reduce_scatter_sum", whole, part, rank_, size_);
  const Call call{Call::Kind::start_reduce_scatter_sum, whole.dtype(), 0, whole.bytes()};
  return worker_->post([this, whole, part, call] { scatter_in_pieces(whole, part, call); });
}

void MpiCommunicator::all_reduce_max(const Tensor& data) {
  comm_checks::in_host_memory("all_reduce_max", data);
  comm_checks::reducible("all_reduce_max", data);
  const Call call{Call::Kind::all_reduce_max, data.dtype(), 0, data.bytes()};
  const CollectiveProgress::Inside inside(progress(), Lane::foreground, call);
  meet(Lane::foreground, call);
  const bool floating = data.dtype() == DType::float32 || data.dtype() == DType::float64;
  const std::size_t width = size_of(data.dtype());
  auto* begin = static_cast<std::byte*>(data.data);
  for_pieces(data.bytes() / width, kPieceBytes / width, [&](std::size_t offset, int length) {
    check(MPI_Allreduce(MPI_IN_PLACE, begin + offset * width, length, value_type(data.dtype()),
                        floating ? nan_keeping_max_ : MPI_MAX, foreground_),
          call);
  });
}

void MpiCommunicator::broadcast(const Tensor& data, int root) {
  comm_checks::in_host_memory("broadcast", data);
  comm_checks::broadcastable(data, root, size_);
  const Call call{Call::Kind::broadcast, data.dtype(), root, data.bytes()};
  const CollectiveProgress::Inside inside(progress(), Lane::foreground, call);
  meet(Lane::foreground, call);
  auto* begin = static_cast<std::byte*>(data.data);
  for_pieces(data.bytes(), kPieceBytes, [&](std::size_t offset, int length) {
    check(MPI_Bcast(begin + offset, length, MPI_BYTE, root, foreground_), call);
  });
}

void MpiCommunicator::gather_in_pieces(Lane lane, const Tensor& whole, const Tensor& part, const Call& call) {
  const CollectiveProgress::Inside inside(progress(), lane, call);
  const MPI_Comm group = group_of(lane);
  meet(lane, call);
  auto* to = static_cast<std::byte*>(whole.data);
  const auto* from = static_cast<const std::byte*>(part.data);
  const bool in_place = from == to + part.bytes() * static_cast<std::size_t>(rank_);
  for_pieces(part.bytes(), kPieceBytes, [&](std::size_t offset, int length) {
    // A piece of each part, `part.bytes()` apart in `whole`.
    MPI_Datatype bytes = MPI_DATATYPE_NULL;
    MPI_Datatype spaced = MPI_DATATYPE_NULL;
    check(MPI_Type_contiguous(length, MPI_BYTE, &bytes), call);
    check(MPI_Type_create_resized(bytes, 0, static_cast<MPI_Aint>(part.bytes()), &spaced), call);
    check(MPI_Type_commit(&spaced), call);
    const int code = MPI_Allgather(in_place ? MPI_IN_PLACE : from + offset, length, MPI_BYTE, to + offset, 1, spaced, group);
    MPI_Type_free(&spaced);
    MPI_Type_free(&bytes);
    check(code, call);
  });
}

void MpiCommunicator::all_gather(const Tensor& whole, const Tensor& part) {
  comm_checks::in_host_memory("all_gather", whole);
  comm_checks::is_part("all_gather", whole, part, rank_, size_);
  gather_in_pieces(Lane::foreground, whole, part, {Call::Kind::all_gather, part.dtype(), 0, part.bytes()});
}

std::unique_ptr<Request> MpiCommunicator::start_all_gather(const Tensor& whole, const Tensor& part) {
  comm_checks::in_host_memory("start_all_gather", whole);
  comm_checks::is_part("start_all_gather", whole, part, rank_, size_);
  const Call call{Call::Kind::start_all_gather, part.dtype(), 0, part.bytes()};
  return worker_->post([this, whole, part, call] { gather_in_pieces(Lane::background, whole, part, call); });
}

void MpiCommunicator::barrier() {
  const CollectiveProgress::Inside inside(progress(), Lane::foreground, {});
  meet(Lane::foreground, {});
}

void MpiCommunicator::abort(int exit_code) {
  std::cout.flush();
  std::fflush(nullptr);
  MPI_Abort(MPI_COMM_WORLD, exit_code);
  std::_Exit(exit_code);
}

}  // namespace attamba
