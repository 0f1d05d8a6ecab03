#include "data/manifest.h"

#include <cstdio>
#include <nlohmann/json.hpp>
#include <span>

#include "data/files.h"
#include "data/sha256.h"
#include "src/core/crc32c.h"
#include "src/core/error.h"

namespace attamba {
namespace {

using Json = nlohmann::ordered_json;

void put_counts(Json& json, const TextCounts& counts) {
  json["tokens"] = counts.tokens;
  json["documents"] = counts.documents;
  json["empty_documents"] = counts.empty_documents;
  json["text_bytes"] = counts.text_bytes;
  json["text_words"] = counts.text_words;
}

TextCounts get_counts(const Json& json) {
  return {.tokens = json.at("tokens"),
          .documents = json.at("documents"),
          .empty_documents = json.at("empty_documents"),
          .text_bytes = json.at("text_bytes"),
          .text_words = json.at("text_words")};
}

std::uint32_t checksum_of(const Json& json) {
  // Paths need not be UTF-8; what is not is replaced, here and in the file.
  const std::string text = json.dump(-1, ' ', false, Json::error_handler_t::replace);
  return crc32c(std::as_bytes(std::span(text)));
}

Manifest from_json(const Json& json) {
  Manifest manifest;
  manifest.fingerprint = json.at("fingerprint");
  const Json& tokenizer = json.at("tokenizer");
  manifest.vocabulary = {.tokenizer_sha256 = tokenizer.at("sha256"),
                         .vocabulary_size = tokenizer.at("vocabulary_size"),
                         .bos = tokenizer.at("bos"),
                         .eos = tokenizer.at("eos"),
                         .unknown = tokenizer.at("unknown")};
  for (const Json& shard : json.at("shards")) {
    manifest.shards.push_back({.file = shard.at("file"),
                               .bytes = shard.at("bytes"),
                               .token_offset = shard.at("token_offset"),
                               .header_crc32c = shard.at("header_crc32c"),
                               .counts = get_counts(shard)});
  }
  manifest.plan = json.at("plan");
  manifest.sources = json.at("sources").get<std::vector<std::string>>();
  const Json& resume = json.at("resume");
  manifest.resume = {.file = resume.at("file"), .offset = resume.at("offset"), .document = resume.at("document")};
  manifest.counts = get_counts(json);
  return manifest;
}

}  // namespace

TextCounts& TextCounts::operator+=(const TextCounts& other) {
  tokens += other.tokens;
  documents += other.documents;
  empty_documents += other.empty_documents;
  text_bytes += other.text_bytes;
  text_words += other.text_words;
  return *this;
}

void Manifest::finish() {
  counts = {};
  std::string content = concat("attamba data ", kDataFormatVersion, '\n', vocabulary.tokenizer_sha256, '\n');
  for (const ShardEntry& shard : shards) {
    counts += shard.counts;
    content += concat(shard.bytes, ' ', shard.counts.tokens, ' ', shard.token_offset, ' ', shard.header_crc32c, '\n');
  }
  fingerprint = sha256(content).substr(0, 32);
}

std::string to_json(const Manifest& manifest) {
  Json json;
  json["format"] = "attamba-data";
  json["format_version"] = kDataFormatVersion;
  json["fingerprint"] = manifest.fingerprint;
  put_counts(json, manifest.counts);
  json["token_type"] = manifest.vocabulary.token_bytes() == 2 ? "uint16" : "uint32";
  json["tokenizer"] = {{"file", kTokenizerName},
                       {"sha256", manifest.vocabulary.tokenizer_sha256},
                       {"vocabulary_size", manifest.vocabulary.vocabulary_size},
                       {"bos", manifest.vocabulary.bos},
                       {"eos", manifest.vocabulary.eos},
                       {"unknown", manifest.vocabulary.unknown}};
  json["plan"] = manifest.plan;
  json["sources"] = manifest.sources;
  json["resume"] = {{"file", manifest.resume.file}, {"offset", manifest.resume.offset}, {"document", manifest.resume.document}};
  json["shards"] = Json::array();
  for (const ShardEntry& shard : manifest.shards) {
    Json entry;
    entry["file"] = shard.file;
    entry["bytes"] = shard.bytes;
    entry["token_offset"] = shard.token_offset;
    entry["header_crc32c"] = shard.header_crc32c;
    put_counts(entry, shard.counts);
    json["shards"].push_back(std::move(entry));
  }
  json["crc32c"] = checksum_of(json);
  return json.dump(1, ' ', false, Json::error_handler_t::replace) + "\n";
}

Manifest read_manifest(const std::filesystem::path& folder) {
  const std::filesystem::path path = folder / kManifestName;
  std::error_code error;
  require(std::filesystem::exists(path, error), "'", folder.string(), "' is not a whole data set: it has no ", kManifestName,
          " (write one with 'attamba data prepare'; if that was interrupted, run the same command again)");
  return read_manifest_file(path);
}

Manifest read_manifest_file(const std::filesystem::path& path) {
  const std::string text = read_whole_file(path);
  const auto fail = [&](const auto&... why) { throw Error(concat("manifest '", path.string(), "': ", why...)); };
  Json json = Json::parse(text, nullptr, false);
  if (json.is_discarded() || !json.is_object() || json.value("format", "") != "attamba-data") {
    fail("this is not the manifest of a data set, or it is damaged; prepare the data set again");
  }
  Manifest manifest;
  try {
    const int version = json.at("format_version");
    if (version != kDataFormatVersion) {
      fail("format version ", version, ", this program reads version ", kDataFormatVersion, "; prepare the data set again");
    }
    const std::uint32_t stored = json.at("crc32c");
    json.erase("crc32c");
    if (checksum_of(json) != stored) {
      fail("its checksum does not fit its content; restore it or prepare the data set again");
    }
    manifest = from_json(json);
  } catch (const Json::exception&) {
    fail("a field is missing or has the wrong type; restore it or prepare the data set again");
  }
  Manifest recomputed = manifest;
  recomputed.finish();
  if (recomputed.fingerprint != manifest.fingerprint || recomputed.counts != manifest.counts) {
    fail("its shards do not add up to its totals; restore it or prepare the data set again");
  }
  return manifest;
}

std::string shard_name(std::size_t index) {
  char name[32];
  std::snprintf(name, sizeof(name), "shard-%05zu.h5", index);
  return name;
}

}  // namespace attamba
