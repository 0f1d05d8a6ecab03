#include "comm/nccl/nccl_communicator.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <exception>
#include <iostream>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "comm/checks.h"
#include "comm/gpu_ranks.h"
#include "comm/launch_environment.h"
#include "comm/nccl/nccl_library.h"
#include "comm/staged_communicator.h"
#include "comm/time_limit.h"

namespace attamba {

namespace {

/// The device can report marks up to this one; it goes on reporting it for collectives behind it.
constexpr std::size_t kLargestMark = 131072;
/// Stands for a collective that is a piece of work by itself.
constexpr int kAlone = -1;
constexpr auto kPollInterval = std::chrono::milliseconds(200);

template <class... Parts>
void check(cudaError_t status, const Parts&... operation) {
  require(status == cudaSuccess, operation..., ": ", cudaGetErrorName(status), ", ", cudaGetErrorString(status));
}

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

cudaEvent_t make_event() {
  cudaEvent_t event = nullptr;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "CUDA event");
  return event;
}

std::string hexadecimal(const cudaUUID_t& uuid) {
  std::string text = "GPU-";
  for (std::size_t i = 0; i < sizeof uuid.bytes; ++i) {
    std::array<char, 3> digits{};
    std::snprintf(digits.data(), digits.size(), "%02x", static_cast<unsigned>(static_cast<unsigned char>(uuid.bytes[i])));
    text += concat(i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "", digits.data());
  }
  return text;
}

ncclDataType_t nccl_type(DType dtype) {
  switch (dtype) {
    case DType::float64:
      return ncclFloat64;
    case DType::int32:
      return ncclInt32;
    case DType::int64:
      return ncclInt64;
    default:
      return ncclFloat32;
  }
}

/// Of this GPU and the others that this process sees.
std::string describe_peers(int gpu) {
  int count = 0, reachable = 0;
  check(cudaGetDeviceCount(&count), "GPUs");
  for (int other = 0; other < count; ++other) {
    int can = 0;
    if (other != gpu && cudaDeviceCanAccessPeer(&can, gpu, other) == cudaSuccess) {
      reachable += can;
    }
  }
  return count < 2 ? "each rank sees its own GPU alone"
                   : concat("peer access to ", reachable, " of ", count - 1, " GPUs of this host");
}

class NcclCommunicator final : public Communicator {
 public:
  /// `stream`: for collectives; null: one of its own is made.
  NcclCommunicator(Communicator& host, int gpu, cudaStream_t compute_stream, cudaStream_t stream);
  /// A group, which owns its host side.
  NcclCommunicator(std::unique_ptr<Communicator> host, int gpu, cudaStream_t compute_stream, cudaStream_t stream)
      : NcclCommunicator(*host, gpu, compute_stream, stream) {
    owned_ = std::move(host);
  }
  ~NcclCommunicator() override;
  NcclCommunicator(const NcclCommunicator&) = delete;
  NcclCommunicator& operator=(const NcclCommunicator&) = delete;

  int rank() const override { return host_.rank(); }
  int size() const override { return host_.size(); }
  int local_rank() const override { return host_.local_rank(); }
  int local_size() const override { return host_.local_size(); }
  std::string description() const override { return concat(description_, "; ", host_.description()); }
  int first_local_rank() const override { return host_.first_local_rank(); }
  std::unique_ptr<Communicator> split(int color) override {
    // On the same stream: NCCL wants one order for collectives of several groups, the same on all ranks.
    return std::make_unique<NcclCommunicator>(host_.split(color), gpu_, compute_, stream_);
  }

  void all_reduce_sum(const Tensor& data) override;
  std::unique_ptr<Request> start_all_reduce_sum(const Tensor& data) override;
  std::unique_ptr<Request> start_reduce_scatter_sum(const Tensor& whole, const Tensor& part) override;
  std::unique_ptr<Request> start_all_gather(const Tensor& whole, const Tensor& part) override;
  void all_reduce_max(const Tensor& data) override { staged_.all_reduce_max(data); }
  void broadcast(const Tensor& data, int root) override { staged_.broadcast(data, root); }
  void all_gather(const Tensor& whole, const Tensor& part) override;
  void barrier() override { host_.barrier(); }
  void work_enqueued(int piece) override;
  CollectiveProgress& progress() override { return host_.progress(); }
  [[noreturn]] void abort(int exit_code) override;

 private:
  class Pending;

  template <class Enqueue>
  std::unique_ptr<Request> start(const CollectiveCall& call, const Enqueue& enqueue);
  void report_mark(std::size_t mark, cudaStream_t stream, const char* operation);
  void connect();
  void check_nccl(ncclResult_t result, const char* operation) const;
  void watch();
  std::size_t count_finished_pieces();
  [[noreturn]] void give_up(const std::string& reason);

  std::unique_ptr<Communicator> owned_;
  Communicator& host_;
  StagedCommunicator staged_;
  const NcclLibrary& nccl_;
  const int gpu_;
  const std::string host_name_ = attamba::host_name();
  const double limit_ = seconds_from_environment("ATTAMBA_TIMEOUT", kDefaultTimeout);
  const int exceptions_at_start_ = std::uncaught_exceptions();
  cudaStream_t compute_ = nullptr;  ///< the runtime's
  cudaStream_t stream_ = nullptr;   ///< for collectives
  cudaEvent_t ready_ = nullptr;
  std::vector<cudaEvent_t> free_events_;  ///< of requests
  ncclComm_t nccl_comm_ = nullptr;
  std::uint32_t* numbers_ = nullptr;        ///< GPU memory: 0, 1, 2, ...
  volatile std::uint32_t* mark_ = nullptr;  ///< host memory that the GPU copies its mark to
  std::string description_;

  CollectiveLog log_;
  std::mutex mutex_;  ///< of all below
  std::condition_variable stopped_;
  bool stopping_ = false;
  std::deque<cudaEvent_t> piece_ends_;  ///< one per piece of work that has not been seen finished
  std::vector<cudaEvent_t> free_piece_ends_;
  std::thread watchdog_;
};

/// In flight from the event that says its result is there until the compute stream has been told to wait for it.
class NcclCommunicator::Pending final : public Request {
 public:
  Pending(NcclCommunicator& owner, cudaEvent_t done) : owner_(owner), done_(done) {}
  ~Pending() override {
    try {
      wait();
    } catch (const std::exception&) {  // whoever did not wait did not want to know
    }
  }
  void wait() override {
    if (done_ != nullptr) {
      const cudaEvent_t done = std::exchange(done_, nullptr);
      owner_.free_events_.push_back(done);  // free to be recorded again: waiting refers to what was recorded last
      check(cudaStreamWaitEvent(owner_.compute_, done, 0), "wait for a collective");
    }
  }

 private:
  NcclCommunicator& owner_;
  cudaEvent_t done_;
};

NcclCommunicator::NcclCommunicator(Communicator& host, int gpu, cudaStream_t compute_stream, cudaStream_t stream)
    : host_(host), staged_(host), nccl_(nccl_library()), gpu_(gpu), compute_(compute_stream), stream_(stream) {
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, gpu), "GPU ", gpu);
  int version = 0;
  check_nccl(nccl_.get_version(&version), "ncclGetVersion");
  const std::vector<GpuOfRank> ranks = gather_gpus(host_, {host_name_, hexadecimal(properties.uuid), properties.name, version});
  require_usable_for_nccl(ranks);
  description_ = concat("NCCL ", nccl_version_text(version), ", ", describe_gpus(ranks), ", ", describe_peers(gpu));

  if (stream_ == nullptr) {
    int lowest = 0, highest = 0;
    check(cudaDeviceGetStreamPriorityRange(&lowest, &highest), "CUDA stream");
    check(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, highest), "CUDA stream");
  }
  ready_ = make_event();
  std::vector<std::uint32_t> numbers(kLargestMark + 1);
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    numbers[i] = static_cast<std::uint32_t>(i);
  }
  const std::size_t bytes = numbers.size() * sizeof numbers[0];
  check(cudaMalloc(reinterpret_cast<void**>(&numbers_), bytes), "GPU memory of ", bytes, " bytes");
  check(cudaMemcpy(numbers_, numbers.data(), bytes, cudaMemcpyHostToDevice), "copy to the GPU");
  void* mark = nullptr;
  check(cudaMallocHost(&mark, sizeof(std::uint32_t)), "page-locked memory");
  mark_ = static_cast<volatile std::uint32_t*>(mark);
  *mark_ = 0;
  connect();
  watchdog_ = std::thread([this] { watch(); });
}

/// NCCL's set-up blocks for as long as a rank is missing, so it runs on a thread that can be given up.
void NcclCommunicator::connect() {
  ncclUniqueId id{};
  if (rank() == 0) {
    check_nccl(nccl_.get_unique_id(&id), "ncclGetUniqueId");
  }
  static_assert(sizeof id % sizeof(std::int32_t) == 0);
  host_.broadcast({&id, {DType::int32, {sizeof id / sizeof(std::int32_t)}}}, 0);
  struct Result {
    ncclComm_t comm = nullptr;
    ncclResult_t code = ncclSuccess;
  };
  const std::optional<Result> result = within(limit_, [&nccl = nccl_, id, size = size(), rank = rank(), gpu = gpu_] {
    Result made;
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 1;
    made.code =
        cudaSetDevice(gpu) == cudaSuccess ? nccl.init_rank(&made.comm, size, id, rank, &config) : ncclUnhandledCudaError;
    return made;
  });
  require(result.has_value(), "rank ", rank(), " of ", size(), " on ", host_name_, ": NCCL was not set up within ", limit_,
          " s: a rank is missing, or hosts cannot reach each other (NCCL_SOCKET_IFNAME chooses the network, NCCL_DEBUG=INFO "
          "says more)");
  check_nccl(result->code, "ncclCommInitRankConfig");
  nccl_comm_ = result->comm;
}

NcclCommunicator::~NcclCommunicator() {
  // When an exception ends this rank, the job ends next, and the other ranks may be anywhere: nothing is waited for. CUDA's
  // objects are left to the end of the process.
  const bool clean = std::uncaught_exceptions() == exceptions_at_start_;
  if (clean) {
    cudaStreamSynchronize(stream_);
  }
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  stopped_.notify_one();
  watchdog_.join();
  // It waits for the other ranks, and nobody watches any more.
  const auto destroy = [&nccl = nccl_, comm = nccl_comm_, gpu = gpu_] {
    return cudaSetDevice(gpu) == cudaSuccess ? nccl.destroy(comm) : ncclUnhandledCudaError;
  };
  if (clean && !within(limit_, destroy)) {
    std::cerr << "attamba: rank " << rank() << " of " << size() << " on " << host_name_
              << ": NCCL did not close its connections within " << limit_ << " s, another rank is gone; they are left open"
              << std::endl;
  }
}

void NcclCommunicator::check_nccl(ncclResult_t result, const char* operation) const {
  if (result != ncclSuccess) {
    throw Error(concat(operation, " failed on rank ", rank(), " of ", size(), " on ", host_name_, ": ",
                       nccl_.error_string(result), " (", nccl_.last_error(nccl_comm_), "); NCCL_DEBUG=INFO says more"));
  }
}

void NcclCommunicator::all_reduce_sum(const Tensor& data) {
  if (data.device == Device::cpu) {
    host_.all_reduce_sum(data);
    return;
  }
  start_all_reduce_sum(data)->wait();
  work_enqueued(kAlone);
}

void NcclCommunicator::all_gather(const Tensor& whole, const Tensor& part) {
  if (whole.device == Device::cpu) {
    host_.all_gather(whole, part);
    return;
  }
  start_all_gather(whole, part)->wait();
  work_enqueued(kAlone);
}

/// What the stream has come to when it gets here.
void NcclCommunicator::report_mark(std::size_t mark, cudaStream_t stream, const char* operation) {
  check(cudaMemcpyAsync(const_cast<std::uint32_t*>(mark_), numbers_ + std::min(mark, kLargestMark), sizeof(std::uint32_t),
                        cudaMemcpyDeviceToHost, stream),
        operation);
}

/// `enqueue` hands the collective to NCCL.
template <class Enqueue>
std::unique_ptr<Request> NcclCommunicator::start(const CollectiveCall& call, const Enqueue& enqueue) {
  const char* operation = call.name().data();  // of a literal
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(compute_, &capture), "CUDA stream");
  const std::size_t position = log_.add(call, capture != cudaStreamCaptureStatusNone, seconds_now());
  if (free_events_.empty()) {
    free_events_.push_back(make_event());
  }
  const cudaEvent_t done = free_events_.back();
  free_events_.pop_back();
  // It begins when the kernels enqueued so far are done, and says when it begins and how far it has come.
  check(cudaEventRecord(ready_, compute_), operation);
  check(cudaStreamWaitEvent(stream_, ready_, 0), operation);
  report_mark(CollectiveLog::mark_before(position), stream_, operation);
  check_nccl(enqueue(), operation);
  report_mark(CollectiveLog::mark_after(position), stream_, operation);
  check(cudaEventRecord(done, stream_), operation);
  return std::make_unique<Pending>(*this, done);
}

std::unique_ptr<Request> NcclCommunicator::start_all_reduce_sum(const Tensor& data) {
  comm_checks::reducible("start_all_reduce_sum", data);
  if (data.device == Device::cpu) {
    return host_.start_all_reduce_sum(data);
  }
  return start({CollectiveCall::Kind::start_all_reduce_sum, data.dtype(), 0, data.bytes()}, [&] {
    return nccl_.all_reduce(data.data, data.data, static_cast<std::size_t>(data.elements()), nccl_type(data.dtype()), ncclSum,
                            nccl_comm_, stream_);
  });
}

std::unique_ptr<Request> NcclCommunicator::start_reduce_scatter_sum(const Tensor& whole, const Tensor& part) {
  comm_checks::scatterable("start_reduce_scatter_sum", whole, part, rank(), size());
  if (whole.device == Device::cpu) {
    return host_.start_reduce_scatter_sum(whole, part);
  }
  return start({CollectiveCall::Kind::start_reduce_scatter_sum, whole.dtype(), 0, whole.bytes()}, [&] {
    return nccl_.reduce_scatter(whole.data, part.data, static_cast<std::size_t>(part.elements()), nccl_type(part.dtype()),
                                ncclSum, nccl_comm_, stream_);
  });
}

std::unique_ptr<Request> NcclCommunicator::start_all_gather(const Tensor& whole, const Tensor& part) {
  comm_checks::is_part("start_all_gather", whole, part, rank(), size());
  if (whole.device == Device::cpu) {
    return host_.start_all_gather(whole, part);
  }
  return start({CollectiveCall::Kind::start_all_gather, part.dtype(), 0, part.bytes()},
               [&] { return nccl_.all_gather(part.data, whole.data, part.bytes(), ncclUint8, nccl_comm_, stream_); });
}

/// The compute stream has been told to wait for all of the piece's collectives, so its position may be set back, and an event
/// there is the piece's end.
void NcclCommunicator::work_enqueued(int piece) {
  report_mark(0, compute_, "collectives");
  const std::lock_guard lock(mutex_);
  if (!log_.close_piece(piece, seconds_now())) {
    return;
  }
  if (free_piece_ends_.empty()) {
    free_piece_ends_.push_back(make_event());
  }
  check(cudaEventRecord(free_piece_ends_.back(), compute_), "collectives");
  piece_ends_.push_back(free_piece_ends_.back());
  free_piece_ends_.pop_back();
}

/// With the lock held, as between an event and its entry in the log a piece must not be counted.
std::size_t NcclCommunicator::count_finished_pieces() {
  std::size_t finished = 0;
  while (!piece_ends_.empty() && cudaEventQuery(piece_ends_.front()) == cudaSuccess) {
    free_piece_ends_.push_back(piece_ends_.front());
    piece_ends_.pop_front();
    ++finished;
  }
  return finished;
}

void NcclCommunicator::watch() {
  cudaSetDevice(gpu_);
  std::unique_lock lock(mutex_);
  while (!stopped_.wait_for(lock, kPollInterval, [this] { return stopping_; })) {
    const std::size_t finished = count_finished_pieces();
    log_.observe(finished, *mark_, seconds_now());
    lock.unlock();
    progress().report(log_.position());
    ncclResult_t error = ncclSuccess;
    const ncclResult_t asked = nccl_.async_error(nccl_comm_, &error);
    error = asked == ncclSuccess ? error : asked;
    const auto stuck = log_.stuck(seconds_now(), limit_);
    if (error != ncclSuccess && error != ncclInProgress) {
      // Where it stands: the limit is one that anything outstanding exceeds.
      const auto at = log_.stuck(seconds_now() + 1e9, 1);
      give_up(concat("rank ", rank(), " of ", size(), " on ", host_name_, ": NCCL reports ", nccl_.error_string(error), " (",
                     nccl_.last_error(nccl_comm_), ")",
                     at ? concat(" at ", at->call.describe(), ", collective number ", at->number) : std::string()));
    }
    if (stuck) {
      give_up(describe_stuck(*stuck, rank(), size(), host_name_));
    }
    lock.lock();
  }
}

/// Without ncclCommAbort: it can hang itself, and it would let the other threads go on with sums that never were.
void NcclCommunicator::give_up(const std::string& reason) {
  std::cerr << "attamba: error: " << reason << std::endl;
  abort(1);
}

void NcclCommunicator::abort(int exit_code) {
  host_.abort(exit_code);
  std::_Exit(exit_code);
}

}  // namespace

std::unique_ptr<Communicator> make_nccl_communicator(Communicator& host, int gpu, void* compute_stream) {
  return std::make_unique<NcclCommunicator>(host, gpu, static_cast<cudaStream_t>(compute_stream), nullptr);
}

}  // namespace attamba
