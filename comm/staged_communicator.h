// Ranks whose tensors lie in a device's memory, through host memory: for several ranks on one GPU, and where the devices'
// own library does not work.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "comm/communicator.h"

namespace attamba {

/// Hands host memory to `host` as it is. What lies in a device's memory is copied to page-locked memory, goes through `host`,
/// and is copied back: a `start_*` waits until the device has made its copy, goes on in the background, and wait() enqueues the
/// copy back. So values are `host`'s, bit for bit. All calls come from one thread; `host` outlives this. Requests must not
/// outlive this object.
class StagedCommunicator final : public Communicator {
 public:
  explicit StagedCommunicator(Communicator& host);
  explicit StagedCommunicator(std::unique_ptr<Communicator> host);
  ~StagedCommunicator() override;
  StagedCommunicator(const StagedCommunicator&) = delete;
  StagedCommunicator& operator=(const StagedCommunicator&) = delete;

  int rank() const override { return host_.rank(); }
  int size() const override { return host_.size(); }
  int local_rank() const override { return host_.local_rank(); }
  int local_size() const override { return host_.local_size(); }
  std::string description() const override;
  int first_local_rank() const override { return host_.first_local_rank(); }
  std::unique_ptr<Communicator> split(int color) override;

  void all_reduce_sum(const Tensor& data) override;
  std::unique_ptr<Request> start_all_reduce_sum(const Tensor& data) override;
  std::unique_ptr<Request> start_reduce_scatter_sum(const Tensor& whole, const Tensor& part) override;
  void all_reduce_max(const Tensor& data) override;
  void broadcast(const Tensor& data, int root) override;
  void all_gather(const Tensor& whole, const Tensor& part) override;
  std::unique_ptr<Request> start_all_gather(const Tensor& whole, const Tensor& part) override;
  void barrier() override { host_.barrier(); }
  bool recordable() const override { return false; }
  CollectiveProgress& progress() override { return host_.progress(); }
  [[noreturn]] void abort(int exit_code) override;

 private:
  class Stage;
  class StagedRequest;
  using Buffers = std::multimap<std::size_t, PinnedMemory>;

  std::unique_ptr<Communicator> owned_;  ///< a group's host side
  Communicator& host_;
  /// Those not in use, by size. Steps ask for the same sizes again and again, so after the first one nothing is allocated.
  Buffers free_;
  Device device_ = Device::cpu;  ///< the one they were made for
};

}  // namespace attamba
