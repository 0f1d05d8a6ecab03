#include "src/train/safetensors.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <optional>

#include "data/files.h"
#include "src/core/error.h"

namespace attamba {

namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr std::uint64_t kLengthBytes = 8;
constexpr std::uint64_t kLargestHeader = 100'000'000;  // as other readers of the format have it
constexpr const char* kMetadata = "__metadata__";

struct TypeName {
  DType type;
  std::string_view name;
};
constexpr std::array kTypes{TypeName{DType::float32, "F32"}, TypeName{DType::bfloat16, "BF16"}, TypeName{DType::float64, "F64"},
                            TypeName{DType::int32, "I32"}, TypeName{DType::int64, "I64"}};

std::string_view safetensors_name(DType type) {
  return std::find_if(kTypes.begin(), kTypes.end(), [&](const TypeName& known) { return known.type == type; })->name;
}

std::array<std::byte, kLengthBytes> little_endian(std::uint64_t value) {
  std::array<std::byte, kLengthBytes> bytes{};
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    bytes[i] = static_cast<std::byte>(value >> (8 * i));
  }
  return bytes;
}

std::uint64_t from_little_endian(std::span<const std::byte, kLengthBytes> bytes) {
  std::uint64_t value = 0;
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    value |= static_cast<std::uint64_t>(bytes[i]) << (8 * i);
  }
  return value;
}

/// An entry of the header whose values begin at `data`; `end` is where the file ends.
SafetensorsEntry entry_from(const std::string& name, const Json& json, std::uint64_t data, std::uint64_t end) {
  const std::string type = json.at("dtype");
  const auto* const known =
      std::find_if(kTypes.begin(), kTypes.end(), [&](const TypeName& candidate) { return candidate.name == type; });
  require(known != kTypes.end(), name, " has type ", type, "; F32, BF16, F64, I32 and I64 can be read");
  SafetensorsEntry entry{.name = name, .type = {known->type, Shape(json.at("shape").get<std::vector<std::int64_t>>())}};
  const std::uint64_t first = json.at("data_offsets").at(0), last = json.at("data_offsets").at(1);
  require(first <= last && last <= end - data && last - first == entry.type.bytes(), name, " lies at bytes ", first, " to ",
          last, " of ", end - data, ", which does not fit ", entry.type);
  entry.offset = data + first;
  return entry;
}

}  // namespace

void write_safetensors(const SafetensorsFile& file,
                       const std::function<void(const SafetensorsEntry&, std::span<std::byte>)>& values_of) {
  Json header = Json::object();
  if (!file.metadata.empty()) {
    header[kMetadata] = file.metadata;
  }
  std::uint64_t end = 0;
  for (const SafetensorsEntry& entry : file.tensors) {
    const Shape& shape = entry.type.shape;
    header[entry.name] = {{"dtype", safetensors_name(entry.type.dtype)},
                          {"shape", std::vector<std::int64_t>(shape.begin(), shape.end())},
                          {"data_offsets", {end, end + entry.type.bytes()}}};
    end += entry.type.bytes();
  }
  std::string text = header.dump(-1, ' ', false, Json::error_handler_t::replace);
  text.resize((text.size() + kLengthBytes - 1) / kLengthBytes * kLengthBytes, ' ');  // values begin aligned
  write_file_atomically(file.path, [&](const FileDescriptor& to, const fs::path& path) {
    write_all(to, little_endian(text.size()), path);
    write_all(to, std::as_bytes(std::span(text)), path);
    std::vector<std::byte> values;
    for (const SafetensorsEntry& entry : file.tensors) {
      values.resize(entry.type.bytes());
      values_of(entry, values);
      write_all(to, values, path);
    }
  });
}

SafetensorsFile open_safetensors(const fs::path& path) {
  const FileDescriptor opened = open_for_reading(path);
  const std::uint64_t size = file_size_of(opened, path);
  const auto fail = [&](const auto&... why) { throw Error(concat(path.string(), ": not a whole safetensors file: ", why...)); };
  std::array<std::byte, kLengthBytes> length_bytes{};
  if (size < kLengthBytes) {
    fail("it has ", size, " bytes");
  }
  read_at(opened, 0, length_bytes, path);
  const std::uint64_t length = from_little_endian(length_bytes);
  if (length > size - kLengthBytes || length > kLargestHeader) {
    fail("its header would have ", length, " bytes, the file has ", size);
  }
  std::string text(length, ' ');
  read_at(opened, kLengthBytes, std::as_writable_bytes(std::span(text)), path);
  SafetensorsFile file{.path = path};
  const std::uint64_t data = kLengthBytes + length;
  try {
    const Json header = Json::parse(text);
    for (const auto& [name, value] : header.items()) {
      if (name == kMetadata) {
        file.metadata = value.get<std::map<std::string, std::string>>();
      } else {
        file.tensors.push_back(entry_from(name, value, data, size));
      }
    }
  } catch (const std::exception& error) {
    fail(error.what());
  }
  std::sort(file.tensors.begin(), file.tensors.end(), [](const auto& a, const auto& b) { return a.offset < b.offset; });
  std::uint64_t end = data;
  for (const SafetensorsEntry& entry : file.tensors) {
    if (entry.offset != end) {
      fail(entry.name, " begins at byte ", entry.offset, ", the one before it ends at ", end);
    }
    end += entry.type.bytes();
  }
  if (end != size) {
    fail("its tensors end at byte ", end, ", the file at ", size);
  }
  return file;
}

std::vector<std::byte> read_safetensor(const SafetensorsFile& file, const SafetensorsEntry& entry) {
  std::vector<std::byte> values(entry.type.bytes());
  read_at(open_for_reading(file.path), entry.offset, values, file.path);
  return values;
}

}  // namespace attamba
