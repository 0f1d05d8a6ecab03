// Configurations as JSON: attributes of golden files, manifests of checkpoints.
#include <nlohmann/json.hpp>

#include "src/train/config.h"
#include "src/train/config_reader.h"

namespace attamba {

namespace {

class JsonNode {
 public:
  JsonNode(const nlohmann::json& node, std::string_view source) : node_(&node), source_(source) {}

  bool is_table() const { return node_->is_object(); }
  bool is_array() const { return node_->is_array(); }

  std::vector<std::pair<std::string, JsonNode>> entries() const {
    std::vector<std::pair<std::string, JsonNode>> all;
    for (const auto& [name, value] : node_->items()) {
      all.emplace_back(name, JsonNode(value, source_));
    }
    return all;
  }

  std::optional<JsonNode> get(std::string_view name) const {
    const auto child = node_->find(std::string(name));
    return child == node_->end() ? std::nullopt : std::optional<JsonNode>(JsonNode(*child, source_));
  }

  std::vector<JsonNode> elements() const {
    std::vector<JsonNode> all;
    for (const auto& element : *node_) {
      all.emplace_back(element, source_);
    }
    return all;
  }

  template <class Value>
  std::optional<Value> as() const {
    const bool fits = std::is_same_v<Value, bool>           ? node_->is_boolean()
                      : std::is_same_v<Value, std::int64_t> ? node_->is_number_integer()
                      : std::is_same_v<Value, double>       ? node_->is_number()
                                                            : node_->is_string();
    return fits ? std::optional<Value>(node_->get<Value>()) : std::nullopt;
  }

  std::string found() const { return concat(node_->type_name(), " ", node_->dump()); }
  std::string position() const { return std::string(source_); }

 private:
  const nlohmann::json* node_;
  std::string_view source_;
};

struct JsonWriter {
  nlohmann::json object = nlohmann::json::object();

  template <class Value>
  void field(std::string_view name, const Value& value, const Field&) {
    object[std::string(name)] = value;
  }
  template <class Section>
  void section(std::string_view name, const Section& section, std::string_view) {
    JsonWriter inner;
    Section::describe(section, inner);
    object[std::string(name)] = std::move(inner.object);
  }
};

template <class Struct>
nlohmann::json write(const Struct& config) {
  JsonWriter writer;
  Struct::describe(config, writer);
  return std::move(writer.object);
}

template <class Struct>
Struct read(const nlohmann::json& json, std::string_view source, std::string path) {
  const JsonNode node(json, source);
  require<UsageError>(node.is_table(), source, ": expected a JSON object, found ", node.found());
  Struct config;
  detail::Reader(node, std::move(path)).read(config);
  return config;
}

}  // namespace

nlohmann::json to_json(const ModelConfig& config) {
  return write(config);
}

nlohmann::json to_json(const Config& config) {
  return write(config);
}

ModelConfig model_config_from_json(const nlohmann::json& json, std::string_view source) {
  return read<ModelConfig>(json, source, "model");
}

Config config_from_json(const nlohmann::json& json, std::string_view source) {
  return read<Config>(json, source, "");
}

}  // namespace attamba
