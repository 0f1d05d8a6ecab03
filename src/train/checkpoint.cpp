#include "src/train/checkpoint.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <iostream>
#include <nlohmann/json.hpp>

#include "data/files.h"
#include "data/hdf5_handle.h"
#include "src/core/crc32c.h"
#include "src/core/error.h"
#include "src/core/version.h"

namespace attamba {

namespace {

namespace fs = std::filesystem;

constexpr int kFormatVersion = 1;
constexpr const char* kManifest = "manifest.json";
constexpr const char* kTensorFile = "tensors.h5";
constexpr const char* kPrefix = "step-";
constexpr const char* kUnfinished = ".unfinished";

hid_t hdf5_type(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return H5T_NATIVE_FLOAT;
    case DType::float64:
      return H5T_NATIVE_DOUBLE;
    default:
      throw Error(concat("checkpoint: cannot hold ", name_of(dtype)));
  }
}

void sync_folder(const fs::path& folder) {
  const FileDescriptor opened(::open(folder.c_str(), O_RDONLY | O_DIRECTORY));
  require(static_cast<bool>(opened) && ::fsync(opened.get()) == 0, "checkpoint: cannot sync ", folder.string(), ": ",
          std::strerror(errno));
}

struct FileSum {
  std::uint64_t bytes = 0;
  std::uint32_t crc = 0;
};

FileSum sum_file(const fs::path& path) {
  const FileDescriptor file = open_for_reading(path);
  FileSum sum{.bytes = file_size_of(file, path)};
  std::vector<std::byte> block(std::size_t{4} << 20);
  for (std::uint64_t offset = 0; offset < sum.bytes; offset += block.size()) {
    const std::size_t size = std::min<std::uint64_t>(block.size(), sum.bytes - offset);
    read_at(file, offset, std::span(block).first(size), path);
    sum.crc = crc32c(std::span<const std::byte>(block).first(size), sum.crc);
  }
  return sum;
}

/// Finds out that there is no room before HDF5 does, which cannot recover from a write that fails: allocates the space, and
/// gives it back.
void require_space(const fs::path& path, const std::vector<NamedTensor>& tensors) {
  std::uint64_t bytes = std::uint64_t{64} << 10;
  for (const NamedTensor& named : tensors) {
    bytes += named.tensor.bytes() + 4096;  // data, and its description in the file
  }
  const FileDescriptor probe(::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644));
  require(static_cast<bool>(probe), "cannot create ", path.string(), ": ", std::strerror(errno));
  const int error = posix_fallocate(probe.get(), 0, static_cast<off_t>(bytes));
  fs::remove(path);
  require(error == 0, path.string(), ": no room for ", bytes, " bytes: ", std::strerror(error),
          "; free some space or choose another run.folder");
}

void write_tensors(const fs::path& path, const std::vector<NamedTensor>& tensors) {
  require_space(path, tensors);
  const Hdf5Quiet quiet;
  {
    const Hdf5File file(H5Fcreate(path.c_str(), H5F_ACC_EXCL, H5P_DEFAULT, H5P_DEFAULT), "create ", path.string(), ": ",
                        std::strerror(errno));
    const Hdf5Properties groups(H5Pcreate(H5P_LINK_CREATE), "prepare ", path.string());
    H5Pset_create_intermediate_group(groups.get(), 1);
    const Hdf5Properties creation(H5Pcreate(H5P_DATASET_CREATE), "prepare ", path.string());
    H5Pset_obj_track_times(creation.get(), false);  // equal weights make equal files
    for (const NamedTensor& named : tensors) {
      const std::vector<hsize_t> extents(named.tensor.shape().begin(), named.tensor.shape().end());
      const Hdf5Space space(H5Screate_simple(static_cast<int>(extents.size()), extents.data(), nullptr), "describe ",
                            named.name);
      const hid_t type = hdf5_type(named.tensor.dtype());
      const Hdf5Dataset dataset(
          H5Dcreate2(file.get(), named.name.c_str(), type, space.get(), groups.get(), creation.get(), H5P_DEFAULT), "create ",
          named.name, " in ", path.string());
      require(H5Dwrite(dataset.get(), type, H5S_ALL, H5S_ALL, H5P_DEFAULT, HostCopy(named.tensor).tensor().data) >= 0,
              "checkpoint: cannot write ", named.name, " to ", path.string(), ": ", std::strerror(errno),
              "; free some space or choose another run.folder");
    }
    require(H5Fflush(file.get(), H5F_SCOPE_GLOBAL) >= 0, "checkpoint: cannot write ", path.string(), ": ", std::strerror(errno),
            "; free some space or choose another run.folder");
  }
  const FileDescriptor written(::open(path.c_str(), O_RDONLY));
  require(static_cast<bool>(written) && ::fsync(written.get()) == 0, "checkpoint: cannot sync ", path.string(), ": ",
          std::strerror(errno));
}

nlohmann::json read_manifest(const fs::path& checkpoint) {
  const fs::path path = checkpoint / kManifest;
  try {
    nlohmann::json manifest = nlohmann::json::parse(read_whole_file(path));
    require(manifest.at("format") == kFormatVersion, path.string(), ": format ", manifest.at("format").dump(),
            " is not one that this version reads (", kFormatVersion, ")");
    return manifest;
  } catch (const nlohmann::json::exception& error) {
    throw Error(concat(path.string(), ": not a checkpoint's manifest: ", error.what()));
  }
}

/// Throws naming the file when the checkpoint is not what its manifest says.
void check_files(const fs::path& checkpoint) {
  const nlohmann::json manifest = read_manifest(checkpoint);
  const fs::path path = checkpoint / kTensorFile;
  const FileSum found = sum_file(path);
  require(found.bytes == manifest.at("tensor_bytes").get<std::uint64_t>(), path.string(), ": ", found.bytes,
          " bytes, expected ", manifest.at("tensor_bytes").dump());
  require(found.crc == manifest.at("tensor_crc32c").get<std::uint32_t>(), path.string(),
          ": checksum does not match; the file is damaged");
}

std::optional<std::int64_t> step_of(const fs::path& path) {
  const std::string name = path.filename();
  if (!name.starts_with(kPrefix) || name.ends_with(kUnfinished)) {
    return std::nullopt;
  }
  const std::string digits = name.substr(std::strlen(kPrefix));
  const bool numeric = !digits.empty() && digits.size() < 19 && digits.find_first_not_of("0123456789") == std::string::npos;
  return numeric ? std::optional(std::stoll(digits)) : std::nullopt;
}

/// Checkpoints by step, newest first.
std::vector<std::pair<std::int64_t, fs::path>> list_checkpoints(const fs::path& folder) {
  std::vector<std::pair<std::int64_t, fs::path>> found;
  if (fs::exists(folder)) {
    for (const fs::directory_entry& entry : fs::directory_iterator(folder)) {
      if (const auto step = step_of(entry.path()); step && entry.is_directory()) {
        found.emplace_back(*step, entry.path());
      }
    }
  }
  std::sort(found.rbegin(), found.rend());
  return found;
}

}  // namespace

fs::path checkpoint_path(const fs::path& folder, std::int64_t step) {
  const std::string digits = std::to_string(step);
  return folder / (kPrefix + std::string(digits.size() < 9 ? 9 - digits.size() : 0, '0') + digits);
}

void save_checkpoint(const fs::path& folder, const TrainingState& state, const std::vector<NamedTensor>& tensors) {
  make_folder(folder);
  const fs::path whole = checkpoint_path(folder, state.step), unfinished = whole.string() + kUnfinished;
  try {
    fs::remove_all(unfinished);
    make_folder(unfinished);
    write_tensors(unfinished / kTensorFile, tensors);
    const FileSum sum = sum_file(unfinished / kTensorFile);
    const nlohmann::json manifest{{"format", kFormatVersion},
                                  {"step", state.step},
                                  {"updates", state.updates},
                                  {"seconds", state.seconds},
                                  {"passed_over", state.passed_over},
                                  {"norms", state.norms},
                                  {"data_fingerprint", state.data_fingerprint},
                                  {"configuration", state.configuration},
                                  {"written_by", version_line()},
                                  {"tensor_bytes", sum.bytes},
                                  {"tensor_crc32c", sum.crc}};
    write_file_atomically(unfinished / kManifest, manifest.dump(1));
    fs::remove_all(whole);  // the same step again: only after a damaged or repeated save
    fs::rename(unfinished, whole);
    sync_folder(folder);
  } catch (const std::exception& error) {
    std::error_code ignored;
    fs::remove_all(unfinished, ignored);
    throw Error(concat("checkpoint of step ", state.step, " was not saved (earlier ones are untouched): ", error.what()));
  }
}

std::optional<fs::path> newest_checkpoint(const fs::path& folder) {
  const auto found = list_checkpoints(folder);
  std::string reason;
  for (const auto& [step, path] : found) {
    try {
      check_files(path);
      return path;
    } catch (const std::exception& error) {
      std::cerr << "attamba: passing over a damaged checkpoint: " << error.what() << '\n';
      reason = error.what();
    }
  }
  require(found.empty(), folder.string(), ": holds ", found.size(), " checkpoints but none is whole (", reason,
          "); restore one, or start again in another run.folder");
  return std::nullopt;
}

TrainingState read_training_state(const fs::path& checkpoint) {
  const nlohmann::json manifest = read_manifest(checkpoint);
  return {.step = manifest.at("step"),
          .updates = manifest.at("updates"),
          .seconds = manifest.at("seconds"),
          .passed_over = manifest.value("passed_over", std::int64_t{0}),
          .data_fingerprint = manifest.at("data_fingerprint"),
          .configuration = manifest.at("configuration"),
          .norms = manifest.value("norms", std::vector<double>{})};
}

void load_tensors(const fs::path& checkpoint, const std::vector<NamedTensor>& tensors) {
  const Hdf5Quiet quiet;
  const fs::path path = checkpoint / kTensorFile;
  const Hdf5File file(H5Fopen(path.c_str(), H5F_ACC_RDONLY, H5P_DEFAULT), "open ", path.string());
  for (const NamedTensor& named : tensors) {
    const Hdf5Dataset dataset(H5Dopen2(file.get(), named.name.c_str(), H5P_DEFAULT), "find ", named.name, " in ",
                              path.string());
    const Hdf5Space space(H5Dget_space(dataset.get()), "describe ", named.name);
    hsize_t extents[Shape::kMaxRank] = {};
    const int rank = H5Sget_simple_extent_ndims(space.get());
    require(rank >= 0 && rank <= static_cast<int>(Shape::kMaxRank), path.string(), ": ", named.name, " has ", rank,
            " dimensions");
    H5Sget_simple_extent_dims(space.get(), extents, nullptr);
    const std::vector<std::int64_t> found(extents, extents + rank);
    require(Shape(found) == named.tensor.shape(), path.string(), ": ", named.name, " is ", Shape(found), ", the model has ",
            named.tensor.shape());
    const hid_t type = hdf5_type(named.tensor.dtype());
    std::vector<std::byte> staged(named.tensor.device == Device::cpu ? 0 : named.tensor.bytes());
    const Tensor target = staged.empty() ? named.tensor : Tensor{staged.data(), named.tensor.type};
    require(H5Dread(dataset.get(), type, H5S_ALL, H5S_ALL, H5P_DEFAULT, target.data) >= 0, path.string(), ": cannot read ",
            named.name);
    if (!staged.empty()) {
      copy_from_host(named.tensor, target);
    }
  }
}

void remove_old_checkpoints(const fs::path& folder, std::int64_t keep) {
  const auto found = list_checkpoints(folder);
  for (std::size_t i = 0; keep > 0 && i < found.size(); ++i) {
    if (i >= static_cast<std::size_t>(keep)) {
      fs::remove_all(found[i].second);
    }
  }
  for (const fs::directory_entry& entry : fs::directory_iterator(folder)) {
    if (entry.path().filename().string().ends_with(kUnfinished)) {
      fs::remove_all(entry.path());
    }
  }
}

}  // namespace attamba
