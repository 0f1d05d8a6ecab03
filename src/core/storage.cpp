#include "src/core/storage.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>

#include "src/core/error.h"

namespace attamba {

namespace {
constexpr std::size_t kHugePage = std::size_t{2} << 20;
}  // namespace

HostBuffer::HostBuffer(std::size_t bytes, const std::string& purpose) : size_(bytes) {
  const std::size_t alignment = bytes >= kHugePage ? kHugePage : kAlignment;
  const std::size_t rounded = (bytes + alignment - 1) / alignment * alignment;
  memory_.reset(static_cast<std::byte*>(std::aligned_alloc(alignment, rounded == 0 ? alignment : rounded)));
  require(memory_ != nullptr, "out of memory: ", bytes, " bytes for ", purpose,
          "; use a smaller micro_batch or recompute = true");
  if (alignment == kHugePage) {
    madvise(memory_.get(), rounded, MADV_HUGEPAGE);  // a hint: failing changes nothing but speed
  }
  std::memset(memory_.get(), 0, bytes);
}

void HostBuffer::Free::operator()(std::byte* memory) const {
  std::free(memory);
}

Tensor Storage::get(const std::string& name, const TensorType& type) {
  if (const auto found = tensors_.find(name); found != tensors_.end()) {
    require(found->second.type == type, "storage: ", name, " is ", found->second.type, ", asked for as ", type);
    return found->second;
  }
  const Entry entry{name, type};
  make_contiguous({&entry, 1}, name);
  return tensors_.at(name);
}

Tensor Storage::find(const std::string& name) const {
  const auto found = tensors_.find(name);
  require(found != tensors_.end(), "storage: no tensor named ", name);
  return found->second;
}

void Storage::make_contiguous(std::span<const Entry> entries, const std::string& purpose) {
  std::size_t bytes = 0;
  for (const Entry& entry : entries) {
    require(!contains(entry.name), "storage: ", entry.name, " exists already");
    bytes += align_up(entry.type.bytes());
  }
  std::byte* next = buffers_.emplace_back(bytes, purpose).data();
  for (const Entry& entry : entries) {
    tensors_[entry.name] = Tensor{next, entry.type};
    next += align_up(entry.type.bytes());
  }
}

}  // namespace attamba
