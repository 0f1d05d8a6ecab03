#include "comm/staged_communicator.h"

#include <cstdlib>
#include <optional>
#include <utility>

#include "comm/checks.h"

namespace attamba {

/// Host memory that stands for a tensor during one collective; the tensor itself where the host can reach it.
class StagedCommunicator::Stage {
 public:
  Stage(StagedCommunicator& owner, const Tensor& tensor) : owner_(owner), tensor_(tensor), host_(tensor) {
    if (!elsewhere()) {
      return;
    }
    owner_.device_ = tensor.device;
    const auto found = owner_.free_.lower_bound(tensor.bytes());
    if (found != owner_.free_.end()) {
      buffer_ = owner_.free_.extract(found);
    } else {
      Buffers fresh;
      const auto made = fresh.emplace(tensor.bytes(), PinnedMemory(tensor.device, tensor.bytes(), "sums over ranks"));
      buffer_ = fresh.extract(made);
    }
    host_ = {buffer_.mapped().data(), tensor.type, Device::cpu};
  }
  /// The device may still be copying from the memory: whoever takes it next has the device write to it first, and devices do
  /// one thing after the other.
  ~Stage() {
    if (!buffer_.empty()) {
      owner_.free_.insert(std::move(buffer_));
    }
  }
  Stage(const Stage&) = delete;
  Stage& operator=(const Stage&) = delete;

  const Tensor& host() const { return host_; }
  /// Returns when host() holds what the tensor holds.
  void fetch() const {
    if (elsewhere()) {
      runtime(tensor_.device).copy_to_host(host_.data, tensor_.data, tensor_.bytes());
      runtime(tensor_.device).synchronize();
    }
  }
  /// Enqueues the way back.
  void put_back() const {
    if (elsewhere()) {
      runtime(tensor_.device).copy_to_device(tensor_.data, host_.data, tensor_.bytes());
    }
  }
  /// Host memory may be written by the host before the device has read the last thing put there.
  void settle() const {
    if (elsewhere()) {
      runtime(tensor_.device).wait_for_copies();
    }
  }

 private:
  bool elsewhere() const { return tensor_.device != Device::cpu; }

  StagedCommunicator& owner_;
  Tensor tensor_, host_;
  Buffers::node_type buffer_;
};

/// `given` is fetched, then `start(given, result)` begins the host's collective, whose result is put back. A collective in
/// place gives and gets the same tensor.
class StagedCommunicator::StagedRequest final : public Request {
 public:
  template <class Start>
  StagedRequest(StagedCommunicator& owner, const Tensor& given, const Tensor& result, const Start& start)
      : given_(owner, given) {
    if (result.data != given.data || result.bytes() != given.bytes()) {
      result_.emplace(owner, result);
    }
    given_.fetch();  // everything that the device was to read from page-locked memory it has read then
    pending_ = start(given_.host(), stage_of_result().host());
  }
  ~StagedRequest() override {
    try {
      wait();
    } catch (const std::exception&) {  // whoever did not wait did not want to know
    }
  }
  void wait() override {
    if (pending_) {
      const std::unique_ptr<Request> pending = std::move(pending_);
      pending->wait();
      stage_of_result().put_back();
    }
  }

 private:
  const Stage& stage_of_result() const { return result_ ? *result_ : given_; }

  Stage given_;
  std::optional<Stage> result_;
  std::unique_ptr<Request> pending_;
};

StagedCommunicator::StagedCommunicator(Communicator& host) : host_(host) {}

StagedCommunicator::StagedCommunicator(std::unique_ptr<Communicator> host) : owned_(std::move(host)), host_(*owned_) {}

std::unique_ptr<Communicator> StagedCommunicator::split(int color) {
  return std::make_unique<StagedCommunicator>(host_.split(color));
}

StagedCommunicator::~StagedCommunicator() {
  if (free_.empty()) {
    return;
  }
  try {
    runtime(device_).synchronize();  // the device may still be reading the buffers
  } catch (const std::exception&) {  // a device that has failed reads nothing any more
  }
}

std::string StagedCommunicator::description() const {
  return concat(host_.description(), "; device memory goes through host memory");
}

void StagedCommunicator::all_reduce_sum(const Tensor& data) {
  comm_checks::reducible("all_reduce_sum", data);
  const Stage stage(*this, data);
  stage.fetch();
  host_.all_reduce_sum(stage.host());
  stage.put_back();
}

std::unique_ptr<Request> StagedCommunicator::start_all_reduce_sum(const Tensor& data) {
  comm_checks::reducible("start_all_reduce_sum", data);
  if (data.device == Device::cpu) {
    return host_.start_all_reduce_sum(data);
  }
  return std::make_unique<StagedRequest>(
      *this, data, data, [this](const Tensor& given, const Tensor&) { return host_.start_all_reduce_sum(given); });
}

std::unique_ptr<Request> StagedCommunicator::start_reduce_scatter_sum(const Tensor& whole, const Tensor& part) {
  comm_checks::scatterable("start_reduce_scatter_sum", whole, part, rank(), size());
  if (whole.device == Device::cpu) {
    return host_.start_reduce_scatter_sum(whole, part);
  }
  return std::make_unique<StagedRequest>(*this, whole, part, [this](const Tensor& given, const Tensor& result) {
    return host_.start_reduce_scatter_sum(given, result);
  });
}

std::unique_ptr<Request> StagedCommunicator::start_all_gather(const Tensor& whole, const Tensor& part) {
  comm_checks::is_part("start_all_gather", whole, part, rank(), size());
  if (whole.device == Device::cpu) {
    return host_.start_all_gather(whole, part);
  }
  return std::make_unique<StagedRequest>(
      *this, part, whole, [this](const Tensor& given, const Tensor& result) { return host_.start_all_gather(result, given); });
}

void StagedCommunicator::all_reduce_max(const Tensor& data) {
  comm_checks::reducible("all_reduce_max", data);
  const Stage stage(*this, data);
  stage.fetch();
  host_.all_reduce_max(stage.host());
  stage.put_back();
}

void StagedCommunicator::broadcast(const Tensor& data, int root) {
  comm_checks::broadcastable(data, root, size());
  const Stage stage(*this, data);
  if (rank() == root) {
    stage.fetch();
  } else {
    stage.settle();
  }
  host_.broadcast(stage.host(), root);
  if (rank() != root) {
    stage.put_back();
  }
}

void StagedCommunicator::all_gather(const Tensor& whole, const Tensor& part) {
  comm_checks::is_part("all_gather", whole, part, rank(), size());
  const Stage all(*this, whole);
  const Stage own(*this, part);
  own.fetch();
  all.settle();
  host_.all_gather(all.host(), own.host());
  all.put_back();
}

void StagedCommunicator::abort(int exit_code) {
  host_.abort(exit_code);
  std::_Exit(exit_code);
}

}  // namespace attamba
