#include "src/train/checkpoint_manifest.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>
#include <span>

#include "src/core/crc32c.h"
#include "src/core/error.h"
#include "src/core/version.h"

namespace attamba {

namespace {

using Json = nlohmann::ordered_json;

constexpr std::string_view kChecksumBegin = " \"crc32c\": \"", kChecksumEnd = "\"\n}\n", kNoChecksum = "00000000";

std::uint32_t crc_of(std::string_view text) {
  return crc32c(std::as_bytes(std::span(text)));
}

std::uint32_t from_hexadecimal(const Json& json) {
  const std::string text = json;
  std::size_t read = 0;
  const unsigned long value = std::stoul(text, &read, 16);
  require(text.size() == kNoChecksum.size() && read == text.size(), "\"", text, "\" is not a checksum");
  return static_cast<std::uint32_t>(value);
}

DType dtype_from(const std::string& name) {
  for (const DType type : {DType::float32, DType::bfloat16, DType::float64, DType::int32, DType::int64}) {
    if (name == name_of(type)) {
      return type;
    }
  }
  throw Error(concat("unknown type ", name));
}

Json to_json(const TensorType& type) {
  return {name_of(type.dtype), std::vector<std::int64_t>(type.shape.begin(), type.shape.end())};
}

TensorType type_from(const Json& dtype, const Json& shape) {
  return {dtype_from(dtype), Shape(shape.get<std::vector<std::int64_t>>())};
}

/// Where each tensor's slices are, by tensor and then by place.
using SlicesByTensor = std::map<std::string, std::vector<const SavedSlice*>>;

SavedTensor join(const std::string& name, std::vector<const SavedSlice*>& slices) {
  std::sort(slices.begin(), slices.end(), [](const auto* a, const auto* b) { return a->slice.begin < b->slice.begin; });
  SavedTensor tensor{.name = name, .type = slices.front()->slice.whole};
  std::int64_t covered = 0;
  for (const SavedSlice* saved : slices) {
    const StateSlice& slice = saved->slice;
    require(slice.whole == tensor.type, "checkpoint: ", name, " is ", tensor.type, " on one rank and ", slice.whole,
            " on another");
    require(slice.begin == covered, "checkpoint: elements from ", std::min(slice.begin, covered), " of ", name, " are written ",
            slice.begin > covered ? "by no rank" : "twice");
    tensor.crc = crc32c_combine(tensor.crc, saved->crc, slice.bytes());
    covered = slice.end;
  }
  require(covered == tensor.type.shape.elements(), "checkpoint: elements from ", covered, " of ", name,
          " are written by no rank");
  return tensor;
}

/// One key a line, and lists one item a line: lines of a bounded length for people and their tools.
std::string lines_of(const Json& json) {
  constexpr auto kReplace = Json::error_handler_t::replace;  // a configuration may hold paths that are not UTF-8
  std::string text = "{\n";
  for (const auto& [key, value] : json.items()) {
    text += concat(" \"", key, "\": ");
    if (value.is_array()) {
      text += '[';
      for (std::size_t i = 0; i < value.size(); ++i) {
        text += concat(i == 0 ? "\n  " : ",\n  ", value[i].dump(-1, ' ', false, kReplace));
      }
      text += ']';
    } else {
      text += value.dump(-1, ' ', false, kReplace);
    }
    text += ",\n";
  }
  return text;
}

Json to_json(const SavedFile& file, const std::map<std::string, std::size_t>& indices) {
  Json slices = Json::array();
  for (const SavedSlice& saved : file.slices) {
    slices.push_back({indices.at(saved.slice.name), saved.slice.begin, saved.slice.end, saved.offset, hexadecimal(saved.crc)});
  }
  return {{"file", file.name}, {"bytes", file.bytes}, {"crc32c", hexadecimal(file.crc)}, {"slices", std::move(slices)}};
}

SavedFile file_from(const Json& json, const std::vector<SavedTensor>& tensors) {
  SavedFile file{.name = json.at("file"), .bytes = json.at("bytes"), .crc = from_hexadecimal(json.at("crc32c"))};
  for (const Json& entry : json.at("slices")) {
    const SavedTensor& tensor = tensors.at(entry.at(0).get<std::size_t>());
    file.slices.push_back(
        {.slice = {.name = tensor.name, .whole = tensor.type, .begin = entry.at(1), .end = entry.at(2), .values = {}},
         .offset = entry.at(3),
         .crc = from_hexadecimal(entry.at(4))});
  }
  return file;
}

CheckpointManifest manifest_from(const Json& json) {
  CheckpointManifest manifest;
  manifest.state = {.step = json.at("step"),
                    .updates = json.at("updates"),
                    .seconds = json.at("seconds"),
                    .passed_over = json.at("passed_over"),
                    .data_fingerprint = json.at("data_fingerprint"),
                    .configuration = json.at("configuration"),
                    .norms = json.at("norms"),
                    .skipped_in_a_row = json.value("skipped_in_a_row", std::int64_t{0}),
                    .rollbacks = json.value("rollbacks", std::int64_t{0})};
  if (const auto loss = json.find("validation_loss"); loss != json.end() && loss->is_number()) {
    manifest.state.validation_loss = loss->get<double>();
  }
  manifest.written_by = json.at("written_by");
  for (const Json& tensor : json.at("tensors")) {
    manifest.tensors.push_back({.name = tensor.at("name"),
                                .type = type_from(tensor.at("dtype"), tensor.at("shape")),
                                .crc = from_hexadecimal(tensor.at("crc32c"))});
  }
  for (const Json& file : json.at("files")) {
    manifest.files.push_back(file_from(file, manifest.tensors));
  }
  return manifest;
}

}  // namespace

std::string hexadecimal(std::uint32_t value) {
  char text[9];
  std::snprintf(text, sizeof text, "%08x", value);
  return text;
}

std::uint64_t CheckpointManifest::bytes() const {
  std::uint64_t sum = 0;
  for (const SavedFile& file : files) {
    sum += file.bytes;
  }
  return sum;
}

std::uint32_t CheckpointManifest::state_crc() const {
  std::string content;
  for (const SavedTensor& tensor : tensors) {
    content += concat(tensor.name, ' ', tensor.type, ' ', tensor.crc, '\n');
  }
  return crc_of(content);
}

CheckpointManifest make_manifest(const TrainingState& state, std::vector<SavedFile> files) {
  CheckpointManifest manifest{.state = state, .written_by = version_line(), .files = std::move(files)};
  SlicesByTensor tensors;
  for (const SavedFile& file : manifest.files) {
    for (const SavedSlice& saved : file.slices) {
      tensors[saved.slice.name].push_back(&saved);
    }
  }
  for (auto& [name, slices] : tensors) {
    manifest.tensors.push_back(join(name, slices));
  }
  return manifest;
}

std::string to_text(const CheckpointManifest& manifest) {
  const TrainingState& state = manifest.state;
  Json json{{"format", kCheckpointFormat},
            {"step", state.step},
            {"updates", state.updates},
            {"seconds", state.seconds},
            {"passed_over", state.passed_over},
            {"norms", state.norms},
            {"skipped_in_a_row", state.skipped_in_a_row},
            {"rollbacks", state.rollbacks},
            {"data_fingerprint", state.data_fingerprint}};
  if (state.validation_loss &&
      std::isfinite(*state.validation_loss)) {  // JSON has no other numbers, and such a loss is no best
    json["validation_loss"] = *state.validation_loss;
  }
  json["written_by"] = manifest.written_by;
  json["state_crc32c"] = hexadecimal(manifest.state_crc());
  json["configuration"] = state.configuration;
  json["tensors"] = Json::array();
  std::map<std::string, std::size_t> indices;
  for (const SavedTensor& tensor : manifest.tensors) {
    indices.emplace(tensor.name, indices.size());
    json["tensors"].push_back({{"name", tensor.name},
                               {"dtype", name_of(tensor.type.dtype)},
                               {"shape", to_json(tensor.type).at(1)},
                               {"crc32c", hexadecimal(tensor.crc)}});
  }
  json["files"] = Json::array();
  for (const SavedFile& file : manifest.files) {
    json["files"].push_back(to_json(file, indices));
  }
  const std::string content = lines_of(json);
  const std::string sum = hexadecimal(crc_of(concat(content, kChecksumBegin, kNoChecksum, kChecksumEnd)));
  return concat(content, kChecksumBegin, sum, kChecksumEnd);
}

CheckpointManifest manifest_from_text(std::string_view text, std::string_view source) {
  const Json json = Json::parse(text, nullptr, false);
  require(!json.is_discarded() && json.is_object() && json.contains("format"), source,
          ": not a checkpoint's manifest, or a damaged one");
  require(json.at("format") == kCheckpointFormat, source, ": format ", json.at("format").dump(), ", this program reads format ",
          kCheckpointFormat, "; go on with the version that wrote it, or start another run");
  // The sum is over every byte of the file, its own eight digits counted as zeros.
  const std::size_t behind = kNoChecksum.size() + kChecksumEnd.size();
  std::string unsigned_text(text);
  std::string stored;
  if (text.size() > behind) {
    stored = unsigned_text.substr(text.size() - behind, kNoChecksum.size());
    unsigned_text.replace(text.size() - behind, kNoChecksum.size(), kNoChecksum);
  }
  require(stored == hexadecimal(crc_of(unsigned_text)), source, ": damaged, its checksum does not fit its content");
  try {
    return manifest_from(json);
  } catch (const std::exception& error) {
    throw Error(concat(source, ": not a checkpoint's manifest: ", error.what()));
  }
}

std::string to_text(const SavedFile& file) {
  Json json{{"file", file.name}, {"bytes", file.bytes}, {"crc32c", hexadecimal(file.crc)}, {"slices", Json::array()}};
  for (const SavedSlice& saved : file.slices) {
    const StateSlice& slice = saved.slice;
    const Json type = to_json(slice.whole);
    json["slices"].push_back(
        {slice.name, type.at(0), type.at(1), slice.begin, slice.end, saved.offset, hexadecimal(saved.crc)});
  }
  return json.dump();
}

SavedFile saved_file_from_text(std::string_view text) {
  const Json json = Json::parse(text);
  SavedFile file{.name = json.at("file"), .bytes = json.at("bytes"), .crc = from_hexadecimal(json.at("crc32c"))};
  for (const Json& entry : json.at("slices")) {
    file.slices.push_back({.slice = {.name = entry.at(0),
                                     .whole = type_from(entry.at(1), entry.at(2)),
                                     .begin = entry.at(3),
                                     .end = entry.at(4),
                                     .values = {}},
                           .offset = entry.at(5),
                           .crc = from_hexadecimal(entry.at(6))});
  }
  return file;
}

}  // namespace attamba
