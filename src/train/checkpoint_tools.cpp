#include "src/train/checkpoint_tools.h"

#include <algorithm>
#include <map>
#include <set>

#include "comm/single_process.h"
#include "src/train/programs.h"
#include "src/train/run_folder.h"
#include "src/train/safetensors.h"

namespace attamba {

namespace {

namespace fs = std::filesystem;

constexpr std::string_view kParameters = "parameters/";

/// `count` elements of one floating-point type from another one's bytes.
void convert(std::span<const std::byte> from, DType from_type, std::span<std::byte> to, DType to_type) {
  dispatch_floating(from_type, "weights", [&]<class From>() {
    dispatch_floating(to_type, "weights", [&]<class To>() {
      const std::span values(reinterpret_cast<const From*>(from.data()), from.size() / sizeof(From));
      auto* const out = reinterpret_cast<To*>(to.data());
      std::transform(values.begin(), values.end(), out, [](From value) {
        const auto wide = static_cast<Accumulator<From>>(value);
        return static_cast<To>(static_cast<Accumulator<To>>(wide));
      });
    });
  });
}

/// The model's parameters, and the tensors that its optimizer keeps of each.
struct ModelState {
  std::vector<ParameterInfo> parameters;
  std::vector<std::string> state_names;
};

ModelState state_of_model(const Config& config) {
  const auto chunking = make_model_chunking(config.model, config.data.sequence_length);
  Tape tape;
  const DeclaredModel model = declare_model(tape, {.config = config.model,
                                                   .chunking = chunking.get(),
                                                   .batch = {1, config.data.sequence_length},
                                                   .dtype = config.train.compute_dtype()});
  ModelState state{.parameters = model.parameters, .state_names = {}};
  const OptimConfig& o = config.optim;
  const auto optimizer = make_optimizer(o.name, {o.beta1, o.beta2, o.eps, o.weight_decay, o.clip});
  for (const std::string_view name : optimizer->state_names()) {
    state.state_names.emplace_back(name);
  }
  return state;
}

/// Throws naming the first parameter that the file lacks or has in another shape, or the first tensor that the model lacks.
std::map<std::string, const SafetensorsEntry*> match(const SafetensorsFile& file,
                                                     const std::vector<ParameterInfo>& parameters) {
  std::map<std::string, const SafetensorsEntry*> entries;
  for (const SafetensorsEntry& entry : file.tensors) {
    entries.emplace(entry.name, &entry);
  }
  std::set<std::string> wanted;
  for (const ParameterInfo& parameter : parameters) {
    const auto found = entries.find(parameter.name);
    require(found != entries.end(), file.path.string(), ": has no ", parameter.name, ", which the model needs");
    require(found->second->type.shape == parameter.shape, file.path.string(), ": ", parameter.name, " is ",
            found->second->type.shape, ", the model has ", parameter.shape);
    wanted.insert(parameter.name);
  }
  for (const SafetensorsEntry& entry : file.tensors) {
    require(wanted.count(entry.name) != 0, file.path.string(), ": holds ", entry.name, ", which the model does not have");
  }
  return entries;
}

}  // namespace

void reshard(const Checkpoint& checkpoint, int files, const fs::path& folder) {
  std::vector<NamedTensor> tensors;
  for (const SavedTensor& saved : checkpoint.manifest.tensors) {
    tensors.push_back({saved.name, {nullptr, saved.type}});
  }
  const TrainingState& state = checkpoint.manifest.state;
  SingleProcess alone;
  const SaveAttempt attempt = begin_save(folder, state.step, whole_slices(tensors), alone);
  std::vector<std::string> reports;
  for (int rank = 0; rank < files; ++rank) {  // one file's share in memory at a time
    std::vector<StateSlice> slices = even_share(tensors, rank, files);
    std::vector<std::vector<std::byte>> values;
    for (StateSlice& slice : slices) {
      slice.values.data = values.emplace_back(slice.bytes()).data();
    }
    load_slices(checkpoint, slices);
    reports.push_back(write_share(attempt, rank, slices));
  }
  publish_save(attempt, state, reports);
}

void export_weights(const Checkpoint& checkpoint, const fs::path& path, std::optional<DType> dtype) {
  const TrainingState& state = checkpoint.manifest.state;
  SafetensorsFile file{.path = path,
                       .tensors = {},
                       .metadata = {{"step", std::to_string(state.step)},
                                    {"written_by", checkpoint.manifest.written_by},
                                    {"configuration", state.configuration}}};
  std::map<std::string, TensorType> types;
  for (const SavedTensor& saved : checkpoint.manifest.tensors) {
    if (saved.name.starts_with(kParameters)) {
      const std::string name = saved.name.substr(kParameters.size());
      types.emplace(name, saved.type);
      file.tensors.push_back({.name = name, .type = {dtype.value_or(saved.type.dtype), saved.type.shape}});
    }
  }
  write_safetensors(file, [&](const SafetensorsEntry& entry, std::span<std::byte> bytes) {
    const TensorType& stored = types.at(entry.name);
    std::vector<std::byte> values(stored.bytes());
    load_slices(checkpoint, whole_slices({{std::string(kParameters) + entry.name, {values.data(), stored}}}));
    convert(values, stored.dtype, bytes, entry.type.dtype);
  });
}

fs::path import_weights(const Config& config, const fs::path& path) {
  const SafetensorsFile file = open_safetensors(path);
  const ModelState model = state_of_model(config);
  const auto entries = match(file, model.parameters);
  const SampleSource samples(open_training_data(config));
  std::optional<Dataset> valid;
  if (!config.data.valid.empty()) {
    valid.emplace(Dataset::open(config.data.valid));
  }
  const fs::path checkpoints = fs::path(config.run.folder) / kCheckpointFolder;
  require<UsageError>(list_checkpoints(checkpoints).empty(), checkpoints.string(),
                      ": holds checkpoints already; choose another run.folder");
  claim_run_folder(config, samples.config().sources, valid ? &*valid : nullptr);

  const DType dtype = accumulator_of(config.train.compute_dtype());
  std::vector<NamedTensor> tensors;
  std::vector<std::vector<std::byte>> weights;
  std::size_t largest = 0;
  for (const ParameterInfo& parameter : model.parameters) {
    const TensorType type{dtype, parameter.shape};
    const SafetensorsEntry& entry = *entries.at(parameter.name);
    std::byte* const memory = weights.emplace_back(type.bytes()).data();
    convert(read_safetensor(file, entry), entry.type.dtype, weights.back(), dtype);
    tensors.push_back({std::string(kParameters) + parameter.name, {memory, type}});
    largest = std::max(largest, type.bytes());
  }
  std::vector<std::byte> zeros(largest);  // what every optimizer starts with
  for (const std::string& name : model.state_names) {
    for (const ParameterInfo& parameter : model.parameters) {
      tensors.push_back({concat(name, '/', parameter.name), {zeros.data(), {dtype, parameter.shape}}});
    }
  }
  SingleProcess alone;
  save_checkpoint(checkpoints, {.data_fingerprint = samples.fingerprint(), .configuration = to_toml(config)},
                  whole_slices(tensors), alone);
  return checkpoint_path(checkpoints, 0);
}

}  // namespace attamba
