// Which rank saves what, and where the elements that a rank wants lie.
#include <algorithm>
#include <map>

#include "data/files.h"
#include "src/core/error.h"
#include "src/core/storage.h"
#include "src/train/checkpoint.h"
#include "src/train/programs.h"

namespace attamba {

namespace {

/// Elements that pass through host memory at a time on their way to a device.
constexpr std::int64_t kStagedElements = std::int64_t{1} << 22;

StateSlice slice_of(const NamedTensor& named, std::int64_t begin, std::int64_t end) {
  Tensor values = named.tensor;
  if (values.data != nullptr) {  // a tensor may be no more than its type
    values.data = static_cast<std::byte*>(values.data) + static_cast<std::size_t>(begin) * size_of(values.dtype());
  }
  values.type.shape = {end - begin};
  return {.name = named.name, .whole = named.tensor.type, .begin = begin, .end = end, .values = values};
}

/// A saved slice and its file's number.
struct Place {
  std::size_t file;
  const SavedSlice* saved;
};

class OpenFiles {
 public:
  explicit OpenFiles(const Checkpoint& checkpoint) : checkpoint_(checkpoint) {}

  void read(std::size_t index, std::uint64_t offset, std::span<std::byte> bytes) {
    const std::filesystem::path path = checkpoint_.folder / checkpoint_.manifest.files[index].name;
    auto found = files_.find(index);
    if (found == files_.end()) {
      found = files_.emplace(index, open_for_reading(path)).first;
    }
    read_at(found->second, offset, bytes, path);
  }

 private:
  const Checkpoint& checkpoint_;
  std::map<std::size_t, FileDescriptor> files_;
};

/// Elements [begin, end) of the whole tensor, which both the wanted slice and the place hold.
void read_part(OpenFiles& files, const Place& place, const StateSlice& wanted, std::int64_t begin, std::int64_t end) {
  const std::size_t element = size_of(wanted.whole.dtype);
  const bool staged = wanted.values.device != Device::cpu;
  std::vector<std::byte> staging;
  for (const std::int64_t step = staged ? kStagedElements : end - begin; begin < end; begin += step) {
    const std::int64_t count = std::min(step, end - begin);
    const std::size_t bytes = static_cast<std::size_t>(count) * element;
    Tensor to = wanted.values;
    to.data = static_cast<std::byte*>(to.data) + static_cast<std::size_t>(begin - wanted.begin) * element;
    to.type.shape = {count};
    staging.resize(staged ? bytes : 0);
    std::byte* const memory = staged ? staging.data() : static_cast<std::byte*>(to.data);
    const std::uint64_t offset = place.saved->offset + static_cast<std::uint64_t>(begin - place.saved->slice.begin) * element;
    files.read(place.file, offset, {memory, bytes});
    if (staged) {
      copy_from_host(to, {memory, to.type});
    }
  }
}

}  // namespace

std::vector<StateSlice> whole_slices(const std::vector<NamedTensor>& tensors) {
  return even_share(tensors, 0, 1);
}

std::vector<StateSlice> even_share(const std::vector<NamedTensor>& tensors, int rank, int ranks) {
  std::int64_t total = 0;
  for (const NamedTensor& named : tensors) {
    total += static_cast<std::int64_t>(named.tensor.bytes());
  }
  // The rank's range of all tensors' bytes one after another; an element belongs to the rank in whose range it begins.
  const std::int64_t first = total * rank / ranks, last = total * (rank + 1) / ranks;
  std::vector<StateSlice> slices;
  std::int64_t at = 0;
  for (const NamedTensor& named : tensors) {
    const auto element = static_cast<std::int64_t>(size_of(named.tensor.dtype()));
    const auto clamped = [&](std::int64_t byte) {
      return std::clamp<std::int64_t>((byte - at + element - 1) / element, 0, named.tensor.elements());
    };
    const std::int64_t begin = first <= at ? 0 : clamped(first), end = last <= at ? 0 : clamped(last);
    if (begin < end) {
      slices.push_back(slice_of(named, begin, end));
    }
    at += static_cast<std::int64_t>(named.tensor.bytes());
  }
  return slices;
}

void load_slices(const Checkpoint& checkpoint, const std::vector<StateSlice>& slices) {
  std::map<std::string, std::vector<Place>> places;
  for (std::size_t file = 0; file < checkpoint.manifest.files.size(); ++file) {
    for (const SavedSlice& saved : checkpoint.manifest.files[file].slices) {
      places[saved.slice.name].push_back({file, &saved});
    }
  }
  for (const StateSlice& wanted : slices) {
    const auto found = places.find(wanted.name);
    require(found != places.end(), checkpoint.folder.string(), ": has no ", wanted.name);
    const TensorType& type = found->second.front().saved->slice.whole;
    require(type == wanted.whole, checkpoint.folder.string(), ": ", wanted.name, " is ", type, ", the model has ",
            wanted.whole);
  }
  OpenFiles files(checkpoint);
  for (const StateSlice& wanted : slices) {
    for (const Place& place : places.at(wanted.name)) {
      const std::int64_t begin = std::max(wanted.begin, place.saved->slice.begin);
      const std::int64_t end = std::min(wanted.end, place.saved->slice.end);
      if (begin < end) {
        read_part(files, place, wanted, begin, end);
      }
    }
  }
}

}  // namespace attamba
