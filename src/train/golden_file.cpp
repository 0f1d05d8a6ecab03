#include <nlohmann/json.hpp>

#include "data/hdf5_handle.h"
#include "src/core/error.h"
#include "src/train/config.h"
#include "src/train/golden.h"

namespace attamba {

namespace {

class Reader {
 public:
  explicit Reader(const std::filesystem::path& path)
      : path_(path),
        file_(open(path), "read ", path.string(),
              ": not an HDF5 file, or it cannot be read; golden files are made by the oracle") {}

  std::string text_attribute(const std::string& name) const {
    require(H5Aexists(file_.get(), name.c_str()) > 0, path_.string(), ": attribute ", name,
            " is missing; is this a golden file?");
    const Hdf5Attribute attribute(H5Aopen(file_.get(), name.c_str(), H5P_DEFAULT), "read attribute ", name, " of ",
                                  path_.string());
    const Hdf5Type type(H5Aget_type(attribute.get()), "read attribute ", name, " of ", path_.string());
    require(H5Tget_class(type.get()) == H5T_STRING, path_.string(), ": attribute ", name, " is not text");
    if (H5Tis_variable_str(type.get()) > 0) {
      const Hdf5Type memory(H5Tcopy(H5T_C_S1), "describe text");
      H5Tset_size(memory.get(), H5T_VARIABLE);
      H5Tset_cset(memory.get(), H5Tget_cset(type.get()));
      char* text = nullptr;
      require(H5Aread(attribute.get(), memory.get(), &text) >= 0 && text != nullptr, path_.string(), ": cannot read attribute ",
              name);
      std::string result(text);
      H5free_memory(text);
      return result;
    }
    std::string result(H5Tget_size(type.get()), '\0');
    require(H5Aread(attribute.get(), type.get(), result.data()) >= 0, path_.string(), ": cannot read attribute ", name);
    return result;
  }

  bool has(const std::string& name) const { return H5Lexists(file_.get(), name.c_str(), H5P_DEFAULT) > 0; }

  GoldenTensor tensor(const std::string& name) const {
    require(has_path(name), path_.string(), ": dataset ", name, " is missing");
    const Hdf5Dataset dataset(H5Dopen2(file_.get(), name.c_str(), H5P_DEFAULT), "open ", name, " in ", path_.string());
    const Hdf5Space space(H5Dget_space(dataset.get()), "describe ", name, " in ", path_.string());
    const int rank = H5Sget_simple_extent_ndims(space.get());
    require(rank >= 0 && rank <= static_cast<int>(Shape::kMaxRank), path_.string(), ": ", name, " has ", rank, " dimensions");
    std::vector<hsize_t> extents(static_cast<std::size_t>(rank));
    H5Sget_simple_extent_dims(space.get(), extents.data(), nullptr);
    const std::vector<std::int64_t> signed_extents(extents.begin(), extents.end());
    GoldenTensor result{.shape = Shape(signed_extents), .values = {}};
    result.values.resize(static_cast<std::size_t>(result.shape.elements()));
    require(H5Dread(dataset.get(), H5T_NATIVE_DOUBLE, H5S_ALL, H5S_ALL, H5P_DEFAULT, result.values.data()) >= 0, path_.string(),
            ": cannot read ", name, "; the file is damaged");
    result.float32_error = number_attribute(dataset.get(), "float32_error");
    result.bfloat16_error = number_attribute(dataset.get(), "bfloat16_error");
    return result;
  }

  std::vector<std::string> names_in(const std::string& group) const {
    require(has(group), path_.string(), ": group ", group, " is missing");
    std::vector<std::string> names;
    const Hdf5Handle<H5Gclose> opened(H5Gopen2(file_.get(), group.c_str(), H5P_DEFAULT), "open ", group, " in ",
                                      path_.string());
    H5Literate(
        opened.get(), H5_INDEX_NAME, H5_ITER_INC, nullptr,
        [](hid_t, const char* name, const H5L_info_t*, void* out) -> herr_t {
          static_cast<std::vector<std::string>*>(out)->emplace_back(name);
          return 0;
        },
        &names);
    return names;
  }

 private:
  static hid_t open(const std::filesystem::path& path) {
    return H5Fis_hdf5(path.c_str()) > 0 ? H5Fopen(path.c_str(), H5F_ACC_RDONLY, H5P_DEFAULT) : hid_t{-1};
  }
  /// H5Lexists wants every group on the way to exist.
  bool has_path(const std::string& name) const {
    for (std::size_t slash = name.find('/'); slash != std::string::npos; slash = name.find('/', slash + 1)) {
      if (!has(name.substr(0, slash))) {
        return false;
      }
    }
    return has(name);
  }
  static double number_attribute(hid_t object, const char* name) {
    double value = 0;
    if (H5Aexists(object, name) > 0) {
      const Hdf5Attribute attribute(H5Aopen(object, name, H5P_DEFAULT), "read attribute ", name);
      H5Aread(attribute.get(), H5T_NATIVE_DOUBLE, &value);
    }
    return value;
  }

  std::filesystem::path path_;
  Hdf5Quiet quiet_;  ///< first: it outlives the file
  Hdf5File file_;
};

std::map<std::string, GoldenTensor> read_group(const Reader& reader, const std::string& group) {
  std::map<std::string, GoldenTensor> tensors;
  for (const std::string& name : reader.names_in(group)) {
    tensors[name] = reader.tensor(group + "/" + name);
  }
  return tensors;
}

std::map<std::string, double> read_errors(const Reader& reader, const std::string& name) {
  return nlohmann::json::parse(reader.text_attribute(name)).get<std::map<std::string, double>>();
}

void read_optimizer(const nlohmann::json& json, GoldenFile& golden) {
  golden.optimizer = {.beta1 = json.at("beta1"),
                      .beta2 = json.at("beta2"),
                      .epsilon = json.at("eps"),
                      .weight_decay = json.at("weight_decay"),
                      .clip = json.at("clip")};
  golden.schedule = {.name = "cosine",
                     .peak = json.at("lr"),
                     .warmup = json.at("warmup"),
                     .steps = json.at("steps"),
                     .min_ratio = json.at("lr_min_ratio")};
}

void read_batches(const Reader& reader, GoldenFile& golden) {
  const GoldenTensor tokens = reader.tensor("tokens");
  require(tokens.shape.rank() == 3 && tokens.shape[2] >= 2 && tokens.shape.elements() > 0, golden.path.string(),
          ": tokens are ", tokens.shape, ", expected [steps, B, n+1]");
  golden.steps = tokens.shape[0];
  golden.sequences = tokens.shape[1];
  golden.length = tokens.shape[2] - 1;
  for (const double token : tokens.values) {
    require(token >= 0 && token < static_cast<double>(golden.model.vocab_size), golden.path.string(), ": token ", token,
            " lies outside the vocabulary of ", golden.model.vocab_size);
    golden.tokens.push_back(static_cast<std::int32_t>(token));
  }
  for (std::int64_t layer = 0; golden.model.chunking.strategy == "explicit" && layer < golden.model.n_layers; ++layer) {
    const GoldenTensor ends = reader.tensor(concat("chunk_ends/", layer));
    golden.chunk_ends.emplace_back(ends.values.begin(), ends.values.end());
  }
}

}  // namespace

GoldenFile read_golden(const std::filesystem::path& path) {
  require(std::filesystem::exists(path), path.string(), ": no such file");
  const Reader reader(path);
  GoldenFile golden;
  golden.path = path;
  try {
    golden.model = model_config_from_json(nlohmann::json::parse(reader.text_attribute("model")), path.string());
    validate(golden.model);
    read_optimizer(nlohmann::json::parse(reader.text_attribute("optim")), golden);
    golden.float32_error = read_errors(reader, "float32_error");
    golden.bfloat16_error = read_errors(reader, "bfloat16_error");
  } catch (const nlohmann::json::exception& error) {
    throw Error(concat(path.string(), ": malformed attribute: ", error.what()));
  } catch (const UsageError& error) {
    throw Error(concat(path.string(), ": attribute model: ", error.what()));
  }
  read_batches(reader, golden);
  golden.parameters = read_group(reader, "params");
  golden.gradients = read_group(reader, "grads");
  golden.parameters_after = read_group(reader, "params_after");
  golden.logits = reader.tensor("logits");
  golden.losses = reader.tensor("losses").values;
  golden.gradient_norms = reader.tensor("grad_norms").values;
  const auto steps = static_cast<std::size_t>(golden.steps);
  require(golden.losses.size() == steps && golden.gradient_norms.size() == steps, path.string(), ": ", golden.losses.size(),
          " losses and ", golden.gradient_norms.size(), " gradient norms for ", steps, " batches");
  return golden;
}

}  // namespace attamba
