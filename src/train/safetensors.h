// Files in the safetensors format: an 8-byte little-endian length, a JSON header of that length (name, type, shape and place of
// every tensor), and the tensors' values.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "src/core/tensor.h"

namespace attamba {

struct SafetensorsEntry {
  std::string name;
  TensorType type;
  std::uint64_t offset = 0;  ///< in the file
};

struct SafetensorsFile {
  std::filesystem::path path;
  std::vector<SafetensorsEntry> tensors = {};        ///< by their place in the file
  std::map<std::string, std::string> metadata = {};  ///< "__metadata__"
};

/// Writes a file, whole or not at all. `values_of` fills a tensor's bytes; tensors are asked for one after another, so that no
/// more than one is in memory. Offsets are chosen here.
void write_safetensors(const SafetensorsFile& file,
                       const std::function<void(const SafetensorsEntry&, std::span<std::byte>)>& values_of);

/// Reads the header. Throws an Error that names the file and what is wrong when it is not a whole file of this format.
SafetensorsFile open_safetensors(const std::filesystem::path& path);

/// The bytes of one tensor.
std::vector<std::byte> read_safetensor(const SafetensorsFile& file, const SafetensorsEntry& entry);

}  // namespace attamba
