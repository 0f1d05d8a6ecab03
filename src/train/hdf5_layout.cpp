#include "src/train/hdf5_layout.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "data/hdf5_handle.h"

namespace attamba {

namespace {

/// What the driver below writes into, and how long the file became.
struct Target {
  SparseBytes bytes;
  haddr_t end = 0;
};

/// The library's view of a file that is open through the driver; the first member is how C inherits.
struct OpenFile {
  H5FD_t base;
  Target* target;
  haddr_t allocated, written;
};

OpenFile* as_open(H5FD_t* file) {
  return reinterpret_cast<OpenFile*>(file);
}

const OpenFile* as_open(const H5FD_t* file) {
  return reinterpret_cast<const OpenFile*>(file);
}

H5FD_t* open_target(const char*, unsigned, hid_t access, haddr_t) {
  const auto* target = static_cast<Target* const*>(H5Pget_driver_info(access));
  return target == nullptr ? nullptr : &(new OpenFile{.base = {}, .target = *target, .allocated = 0, .written = 0})->base;
}

herr_t close_target(H5FD_t* file) {
  OpenFile* const open = as_open(file);
  open->target->end = std::max(open->allocated, open->written);
  delete open;
  return 0;
}

herr_t read_target(H5FD_t* file, H5FD_mem_t, hid_t, haddr_t offset, std::size_t size, void* to) {
  as_open(file)->target->bytes.read(offset, {static_cast<std::byte*>(to), size});
  return 0;
}

herr_t write_target(H5FD_t* file, H5FD_mem_t, hid_t, haddr_t offset, std::size_t size, const void* from) {
  OpenFile* const open = as_open(file);
  open->target->bytes.write(offset, {static_cast<const std::byte*>(from), size});
  open->written = std::max<haddr_t>(open->written, offset + size);
  return 0;
}

/// A file driver that keeps what the library writes in a Target.
hid_t driver() {
  static const hid_t registered = [] {
    H5FD_class_t kind{};
    kind.name = "attamba layout";
    kind.maxaddr = HADDR_MAX;
    kind.fc_degree = H5F_CLOSE_STRONG;
    kind.fapl_size = sizeof(Target*);
    kind.open = open_target;
    kind.close = close_target;
    kind.query = [](const H5FD_t*, unsigned long* flags) -> herr_t {
      *flags = H5FD_FEAT_AGGREGATE_METADATA;  // headers next to each other
      return 0;
    };
    kind.get_eoa = [](const H5FD_t* file, H5FD_mem_t) { return as_open(file)->allocated; };
    kind.set_eoa = [](H5FD_t* file, H5FD_mem_t, haddr_t end) -> herr_t {
      as_open(file)->allocated = end;
      return 0;
    };
    kind.get_eof = [](const H5FD_t* file, H5FD_mem_t) { return as_open(file)->written; };
    kind.read = read_target;
    kind.write = write_target;
    return H5FDregister(&kind);
  }();
  return registered;
}

hid_t hdf5_type(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return H5T_IEEE_F32LE;
    case DType::float64:
      return H5T_IEEE_F64LE;
    case DType::int32:
      return H5T_STD_I32LE;
    case DType::int64:
      return H5T_STD_I64LE;
    case DType::bfloat16:
      break;
  }
  throw Error(concat("checkpoint: cannot hold ", name_of(dtype)));
}

void put_attribute(hid_t dataset, const char* name, std::span<const std::int64_t> values) {
  const hsize_t count = values.size();
  const Hdf5Space space(values.empty() ? H5Screate(H5S_NULL) : H5Screate_simple(1, &count, nullptr), "describe ", name);
  const Hdf5Attribute attribute(H5Acreate2(dataset, name, H5T_STD_I64LE, space.get(), H5P_DEFAULT, H5P_DEFAULT), "create ",
                                name);
  require(values.empty() || H5Awrite(attribute.get(), H5T_NATIVE_INT64, values.data()) >= 0, "HDF5: cannot write ", name);
}

std::uint64_t put_dataset(hid_t file, hid_t links, hid_t creation, const StateSlice& slice) {
  const Shape& shape = slice.whole.shape;
  const bool whole = slice.elements() == shape.elements();
  const std::string name = whole ? slice.name : concat(slice.name, '[', slice.begin, ':', slice.end, ']');
  std::vector<hsize_t> extents{static_cast<hsize_t>(slice.elements())};
  if (whole) {
    extents.assign(shape.begin(), shape.end());
  }
  const Hdf5Space space(H5Screate_simple(static_cast<int>(extents.size()), extents.data(), nullptr), "describe ", name);
  const Hdf5Dataset dataset(
      H5Dcreate2(file, name.c_str(), hdf5_type(slice.whole.dtype), space.get(), links, creation, H5P_DEFAULT), "create ", name);
  put_attribute(dataset.get(), "shape", {shape.begin(), shape.end()});
  put_attribute(dataset.get(), "begin", {&slice.begin, 1});
  const haddr_t offset = H5Dget_offset(dataset.get());
  require(offset != HADDR_UNDEF, "HDF5: ", name, " has no place in its file");
  return offset;
}

}  // namespace

void SparseBytes::write(std::uint64_t offset, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const std::uint64_t within = offset % kPage;
    const std::size_t size = std::min<std::uint64_t>(kPage - within, bytes.size());
    std::memcpy(pages_[offset / kPage].data() + within, bytes.data(), size);
    offset += size;
    bytes = bytes.subspan(size);
  }
}

void SparseBytes::read(std::uint64_t offset, std::span<std::byte> bytes) const {
  while (!bytes.empty()) {
    const std::uint64_t within = offset % kPage;
    const std::size_t size = std::min<std::uint64_t>(kPage - within, bytes.size());
    const auto page = pages_.find(offset / kPage);
    if (page == pages_.end()) {
      std::memset(bytes.data(), 0, size);
    } else {
      std::memcpy(bytes.data(), page->second.data() + within, size);
    }
    offset += size;
    bytes = bytes.subspan(size);
  }
}

Hdf5Layout::Hdf5Layout(std::span<const StateSlice> slices) {
  const Hdf5Quiet quiet;
  Target target;
  Target* const pointer = &target;
  {
    const Hdf5Properties access(H5Pcreate(H5P_FILE_ACCESS), "prepare a file");
    require(H5Pset_driver(access.get(), driver(), &pointer) >= 0, "HDF5: cannot use a driver of our own");
    const Hdf5Properties links(H5Pcreate(H5P_LINK_CREATE), "prepare links");
    H5Pset_create_intermediate_group(links.get(), 1);
    const Hdf5Properties creation(H5Pcreate(H5P_DATASET_CREATE), "prepare datasets");
    H5Pset_obj_track_times(creation.get(), false);
    H5Pset_alloc_time(creation.get(), H5D_ALLOC_TIME_EARLY);
    H5Pset_fill_time(creation.get(), H5D_FILL_TIME_NEVER);
    const Hdf5File file(H5Fcreate("layout", H5F_ACC_TRUNC, H5P_DEFAULT, access.get()), "lay out a file");
    for (const StateSlice& slice : slices) {
      offsets_.push_back(put_dataset(file.get(), links.get(), creation.get(), slice));
    }
    require(H5Fflush(file.get(), H5F_SCOPE_GLOBAL) >= 0, "HDF5: cannot lay out a file");
  }
  between_ = std::move(target.bytes);
  bytes_ = target.end;
}

}  // namespace attamba
