// HDF5 identifiers that close themselves, without the library's own error printing.
#pragma once

#include <hdf5.h>

#include <utility>

#include "src/core/error.h"

namespace attamba {

/// Owns an HDF5 identifier. `Close` is the function that releases its kind.
template <herr_t (*Close)(hid_t)>
class Hdf5Handle {
 public:
  /// Throws when the library returned no identifier; `what` names the operation.
  template <class... Parts>
  explicit Hdf5Handle(hid_t id, const Parts&... what) : id_(id) {
    require(id_ >= 0, "HDF5: cannot ", what...);
  }
  Hdf5Handle(Hdf5Handle&& other) noexcept : id_(std::exchange(other.id_, -1)) {}
  Hdf5Handle(const Hdf5Handle&) = delete;
  Hdf5Handle& operator=(const Hdf5Handle&) = delete;
  ~Hdf5Handle() {
    if (id_ >= 0) {
      Close(id_);
    }
  }
  hid_t get() const { return id_; }

 private:
  hid_t id_;
};

using Hdf5File = Hdf5Handle<H5Fclose>;
using Hdf5Dataset = Hdf5Handle<H5Dclose>;
using Hdf5Space = Hdf5Handle<H5Sclose>;
using Hdf5Attribute = Hdf5Handle<H5Aclose>;
using Hdf5Type = Hdf5Handle<H5Tclose>;
using Hdf5Properties = Hdf5Handle<H5Pclose>;

/// Turns off the library's error printing for this thread while it lives.
class Hdf5Quiet {
 public:
  Hdf5Quiet() {
    H5Eget_auto2(H5E_DEFAULT, &function_, &data_);
    H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
  }
  Hdf5Quiet(const Hdf5Quiet&) = delete;
  Hdf5Quiet& operator=(const Hdf5Quiet&) = delete;
  ~Hdf5Quiet() { H5Eset_auto2(H5E_DEFAULT, function_, data_); }

 private:
  H5E_auto2_t function_ = nullptr;
  void* data_ = nullptr;
};

}  // namespace attamba
