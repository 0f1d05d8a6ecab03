// attamba checkpoint: what a run has saved, whether it is whole, and what else can be done with it.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <filesystem>
#include <iostream>
#include <memory>

#include "comm/single_process.h"
#include "launch/commands.h"
#include "launch/config_options.h"
#include "src/core/clock.h"
#include "src/core/error.h"
#include "src/train/checkpoint.h"
#include "src/train/checkpoint_tools.h"
#include "src/train/metrics.h"
#include "src/train/run_folder.h"

namespace attamba {

namespace {

namespace fs = std::filesystem;

/// A checkpoint as a user names it: its own folder, or the folder of a run or of checkpoints and perhaps a step.
struct Place {
  std::string path;
  std::int64_t step = -1;
};

void add_place(CLI::App& command, Place& place) {
  command.add_option("path", place.path, "folder of a run, or of one checkpoint")->required();
  command.add_option("--step", place.step, "the run's checkpoint of this step; by default the newest");
}

bool is_checkpoint(const fs::path& path) {
  return fs::exists(path / kCheckpointManifest);
}

/// The folder in which a place's checkpoints lie.
fs::path folder_of(const Place& place) {
  const fs::path path = place.path;
  require<UsageError>(fs::is_directory(path), path.string(), ": is not a folder");
  const fs::path inside = path / kCheckpointFolder;
  return is_checkpoint(path) ? fs::absolute(path).lexically_normal().parent_path() : fs::exists(inside) ? inside : path;
}

/// All that a place names, newest first.
std::vector<fs::path> checkpoints_at(const Place& place) {
  if (is_checkpoint(place.path)) {
    return {place.path};
  }
  std::vector<fs::path> found;
  for (const auto& [step, path] : list_checkpoints(folder_of(place))) {
    if (place.step < 0 || place.step == step) {
      found.push_back(path);
    }
  }
  require<UsageError>(!found.empty(), place.path, ": holds no checkpoint",
                      place.step < 0 ? std::string() : concat(" of step ", place.step));
  return found;
}

/// The one that a place names, checked.
Checkpoint checked(const Place& place) {
  SingleProcess alone;
  return checked_checkpoint(checkpoints_at(place).front(), alone);
}

void print_info(const Place& place) {
  const std::vector<fs::path> found = checkpoints_at(place);
  const auto [folder, manifest] = open_checkpoint(found.front());
  const TrainingState& state = manifest.state;
  std::int64_t values = 0;
  for (const SavedTensor& tensor : manifest.tensors) {
    values += tensor.type.shape.elements();
  }
  std::cout << folder.string() << '\n'
            << "  after step   " << format_integer(state.step) << " (" << format_integer(state.updates) << " updates, "
            << format_duration(state.seconds) << " of training)\n";
  if (state.validation_loss) {
    std::printf("  validation   loss %.4f\n", *state.validation_loss);
    std::fflush(stdout);
  }
  std::cout << "  written by   " << manifest.written_by << ", " << manifest.files.size()
            << (manifest.files.size() == 1 ? " rank" : " ranks") << '\n'
            << "  data         " << state.data_fingerprint << '\n'
            << "  state        " << hexadecimal(manifest.state_crc()) << ", " << manifest.tensors.size() << " tensors, "
            << format_integer(values) << " values, " << format_integer(static_cast<std::int64_t>(manifest.bytes()))
            << " bytes\n";
  for (const SavedFile& file : manifest.files) {
    std::cout << "  " << file.name << "  " << format_integer(static_cast<std::int64_t>(file.bytes)) << " bytes, crc32c "
              << hexadecimal(file.crc) << ", " << file.slices.size() << " pieces\n";
  }
  for (const SavedTensor& tensor : manifest.tensors) {
    std::cout << "  " << tensor.name << "  " << tensor.type << "  crc32c " << hexadecimal(tensor.crc) << '\n';
  }
  for (std::size_t i = 1; i < found.size(); ++i) {
    std::cout << (i == 1 ? "older ones: " : ", ") << found[i].filename().string() << (i + 1 == found.size() ? "\n" : "");
  }
}

void verify(const Place& place) {
  SingleProcess alone;
  std::size_t damaged = 0;
  const std::vector<fs::path> found = checkpoints_at(place);
  for (const fs::path& path : found) {
    try {
      const double began = monotonic_seconds();
      const Checkpoint checkpoint = checked_checkpoint(path, alone);
      const double seconds = monotonic_seconds() - began;
      const auto bytes = static_cast<double>(checkpoint.manifest.bytes());
      std::cout << path.string() << ": whole, " << format_quantity(bytes, "B") << " in " << format_duration(seconds) << " ("
                << format_quantity(bytes / seconds, "B/s") << ")\n";
    } catch (const Error& error) {
      ++damaged;
      std::cout << path.string() << ": DAMAGED\n";
      std::cerr << error.what() << '\n';
    }
  }
  require(damaged == 0, "checkpoint verify: ", damaged, " of ", found.size(), " checkpoints cannot be used");
}

struct ReshardOptions {
  Place place;
  int files = 1;
  std::string output;
};

void run_reshard(const ReshardOptions& options) {
  const Checkpoint checkpoint = checked(options.place);
  const fs::path folder = options.output.empty() ? folder_of(options.place) : fs::path(options.output);
  reshard(checkpoint, options.files, folder);
  std::cout << checkpoint_path(folder, checkpoint.manifest.state.step).string() << ": " << options.files
            << (options.files == 1 ? " file\n" : " files\n");
}

struct ExportOptions {
  Place place;
  std::string file, dtype;
};

void run_export(const ExportOptions& options) {
  std::optional<DType> dtype;
  if (!options.dtype.empty()) {
    dtype = options.dtype == "bfloat16" ? DType::bfloat16 : DType::float32;
  }
  export_weights(checked(options.place), options.file, dtype);
  std::cout << options.file << ": " << format_integer(static_cast<std::int64_t>(fs::file_size(options.file))) << " bytes\n";
}

struct ImportOptions {
  std::string file;
  ConfigOptions config;
};

void run_import(const ImportOptions& options) {
  const Config config = options.config.load();
  validate(config);
  require<UsageError>(!config.run.folder.empty(), "run.folder is not set; name a folder for the run that starts from ",
                      options.file);
  const fs::path made = import_weights(config, options.file);
  std::cout << made.string() << ": the weights of " << options.file
            << "; `attamba train` with the same configuration starts from them\n";
}

void add_export(CLI::App& checkpoint) {
  auto options = std::make_shared<ExportOptions>();
  CLI::App* command = checkpoint.add_subcommand("export", "write the weights as a safetensors file");
  add_place(*command, options->place);
  command->add_option("-o,--output", options->file, "the file to write")->required();
  command->add_option("--dtype", options->dtype, "type of the weights; by default as they are saved")
      ->check(CLI::IsMember({"float32", "bfloat16"}));
  command->callback([options] { run_export(*options); });
}

void add_import(CLI::App& checkpoint) {
  auto options = std::make_shared<ImportOptions>();
  CLI::App* command =
      checkpoint.add_subcommand("import", "make a run that starts from a safetensors file; takes what `attamba train` takes");
  command->add_option("file", options->file, "safetensors file with the model's parameters")->required();
  add_config_options(*command, options->config);
  command->callback([options] { run_import(*options); });
}

}  // namespace

void add_checkpoint_command(CLI::App& program) {
  CLI::App* checkpoint = program.add_subcommand("checkpoint", "inspect, check, reshard and convert what a run has saved");
  checkpoint->require_subcommand(1);

  auto info = std::make_shared<Place>();
  CLI::App* command = checkpoint->add_subcommand("info", "step, files and tensors of a checkpoint");
  add_place(*command, *info);
  command->callback([info] { print_info(*info); });

  auto verified = std::make_shared<Place>();
  command = checkpoint->add_subcommand("verify", "read every byte of a run's checkpoints and compare every checksum");
  command->add_option("path", verified->path, "folder of a run, or of one checkpoint")->required();
  command->add_option("--step", verified->step, "only the run's checkpoint of this step");
  command->callback([verified] { verify(*verified); });

  auto options = std::make_shared<ReshardOptions>();
  command = checkpoint->add_subcommand("reshard", "spread a checkpoint over another number of files; training needs it not");
  add_place(*command, options->place);
  command->add_option("--files", options->files, "files to write")->required()->check(CLI::Range(1, 1 << 16));
  command->add_option("-o,--output", options->output, "folder to write step-N into; by default the checkpoint is replaced");
  command->callback([options] { run_reshard(*options); });

  add_export(*checkpoint);
  add_import(*checkpoint);
}

}  // namespace attamba
