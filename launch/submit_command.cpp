// attamba submit: a training run as a SLURM job, from its configuration and launch/slurm/train.sbatch.
#include <sys/wait.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <iostream>
#include <memory>
#include <sstream>

#include "data/files.h"
#include "launch/commands.h"
#include "launch/config_options.h"
#include "src/core/error.h"

namespace attamba {

namespace {

namespace fs = std::filesystem;

constexpr const char* kTemplate =
#include "train_sbatch.inc"
    ;
constexpr std::string_view kCommandLine = "# attamba submit writes the command here.\n";

struct SubmitArguments {
  ConfigOptions options;
  std::int64_t nodes = 1, gpus = 0, tasks = 0, cpus = 0, warning = 120;
  std::string time = "24:00:00", partition, account, qos, launcher = "auto", container, bundle;
  std::vector<std::string> more;
  bool dry_run = false;
};

/// One word of a shell.
std::string quoted(const std::string& text) {
  if (!text.empty() &&
      text.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-+=./,:@%") == std::string::npos) {
    return text;
  }
  std::string result = "'";
  for (const char c : text) {
    result += c == '\'' ? std::string("'\\''") : std::string(1, c);
  }
  return result + "'";
}

/// Files beside the run's folder: training would take a folder that has something else in it for somebody else's.
fs::path job_folder(const Config& config) {
  fs::path folder = fs::absolute(config.run.folder).lexically_normal();
  if (!folder.has_filename()) {
    folder = folder.parent_path();
  }
  return folder.string() + ".slurm";
}

std::string directives(const SubmitArguments& arguments, const Config& config) {
  const fs::path jobs = job_folder(config);
  const std::int64_t tasks = arguments.tasks > 0 ? arguments.tasks : std::max<std::int64_t>(arguments.gpus, 1);
  const std::int64_t cpus = arguments.cpus > 0 ? arguments.cpus : config.train.threads;
  std::ostringstream out;
  const auto line = [&out](const auto&... parts) { out << "#SBATCH " << concat(parts...) << '\n'; };
  line("--job-name=", quoted(jobs.stem().string()));
  line("--nodes=", arguments.nodes);
  line("--ntasks-per-node=", tasks);
  if (arguments.gpus > 0) {
    line("--gpus-per-node=", arguments.gpus);
  }
  if (cpus > 0) {
    line("--cpus-per-task=", cpus);
  }
  line("--time=", arguments.time);
  for (const auto& [name, value] :
       {std::pair("partition", &arguments.partition), {"account", &arguments.account}, {"qos", &arguments.qos}}) {
    if (!value->empty()) {
      line("--", name, '=', quoted(*value));
    }
  }
  line("--signal=B:USR1@", arguments.warning);
  line("--requeue");
  line("--open-mode=append");
  line("--output=", quoted((jobs / "%j.out").string()));
  for (const std::string& more : arguments.more) {
    line(more);
  }
  return out.str();
}

std::string command_lines(const SubmitArguments& arguments) {
  std::ostringstream out;
  const auto variable = [&out](const char* name, const std::string& value) {
    if (!value.empty()) {
      out << "export " << name << '=' << quoted(value) << '\n';
    }
  };
  variable("ATTAMBA_LAUNCHER", arguments.launcher == "auto" ? "" : arguments.launcher);
  variable("ATTAMBA_CONTAINER", arguments.container);
  variable("ATTAMBA_BUNDLE", arguments.bundle.empty() ? "" : fs::canonical(arguments.bundle).string());
  // The container has a program of its own.
  out << "set -- " << (arguments.container.empty() ? quoted(fs::read_symlink("/proc/self/exe")) : "attamba") << " train";
  if (!arguments.options.file.empty()) {
    out << ' ' << quoted(fs::canonical(arguments.options.file));
  }
  for (const auto& [key, value] : arguments.options.overrides) {
    out << " \\\n  " << quoted(concat("--", key, '=', value));
  }
  out << '\n';
  return out.str();
}

/// The template with this job's directives in the place of its own, and with the command.
std::string filled_template(const SubmitArguments& arguments, const Config& config) {
  std::istringstream lines(kTemplate);
  std::string result;
  bool directed = false;
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with("#SBATCH ")) {
      result += directed ? "" : directives(arguments, config);
      directed = true;
    } else if (line + '\n' == kCommandLine) {
      result += command_lines(arguments);
    } else {
      result += line + '\n';
    }
  }
  return result;
}

void run_sbatch(const fs::path& script) {
  std::cout.flush();
  const pid_t child = fork();
  require(child >= 0, "submit: cannot start sbatch: ", std::strerror(errno));
  if (child == 0) {
    execlp("sbatch", "sbatch", script.c_str(), nullptr);
    _exit(errno == ENOENT ? 127 : 126);
  }
  int status = 0;
  waitpid(child, &status, 0);
  const int code = WIFEXITED(status) ? WEXITSTATUS(status) : 1;
  require<UsageError>(code != 127,
                      "submit: there is no sbatch here; run this on a login node of the cluster, or take the script ",
                      script.string(), " there and `sbatch` it");
  require(code == 0, "submit: sbatch ended with exit code ", code, "; what it said is above, the script is ", script.string());
}

void submit(const SubmitArguments& arguments) {
  const Config config = arguments.options.load();
  validate(config);
  require<UsageError>(!config.run.folder.empty(), "run.folder is not set; name a folder for this run's results");
  require<UsageError>(arguments.bundle.empty() || fs::is_regular_file(arguments.bundle), "submit: --bundle ", arguments.bundle,
                      ": no such archive; launch/package.sh makes one");
  require<UsageError>(arguments.bundle.empty() || arguments.container.empty(),
                      "submit: --bundle and --container are two ways to bring the program; give one");
  const std::string script = filled_template(arguments, config);
  if (arguments.dry_run) {
    std::cout << script;
    return;
  }
  const fs::path jobs = job_folder(config), file = jobs / "train.sbatch";
  make_folder(jobs);
  write_file_atomically(file, script);
  run_sbatch(file);
  std::cout << "output goes to " << (jobs / "JOB.out").string() << ", results to " << config.run.folder << '\n';
}

}  // namespace

void add_submit_command(CLI::App& program) {
  auto arguments = std::make_shared<SubmitArguments>();
  CLI::App* command = program.add_subcommand("submit", "train as a SLURM job that queues itself again until the run has ended");
  add_config_options(*command, arguments->options);
  const auto number = [&](const char* name, std::int64_t& value, const char* help) {
    command->add_option(name, value, help)->check(CLI::NonNegativeNumber)->capture_default_str()->group("Job");
  };
  const auto text = [&](const char* name, std::string& value, const char* help) {
    return command->add_option(name, value, help)->group("Job");
  };
  number("--nodes", arguments->nodes, "machines");
  number("--gpus", arguments->gpus, "GPUs per node, a rank for each; 0 = ranks on CPUs");
  number("--tasks", arguments->tasks, "ranks per node; 0 = as many as GPUs, at least one");
  number("--cpus", arguments->cpus, "cores per rank; 0 = train.threads, or what the cluster gives");
  text("--time", arguments->time, "limit of one job; the next one goes on")->capture_default_str();
  number("--warning", arguments->warning, "seconds before the limit at which training is told to save and stop");
  text("--partition", arguments->partition, "as for sbatch");
  text("--account", arguments->account, "as for sbatch");
  text("--qos", arguments->qos, "as for sbatch");
  text("--launcher", arguments->launcher, "how ranks are started; auto = pmix, else mpirun, else tcp")
      ->check(CLI::IsMember({"auto", "pmix", "mpirun", "tcp"}))
      ->capture_default_str();
  text("--container", arguments->container, "image for apptainer or singularity to run `attamba` in");
  text("--bundle", arguments->bundle, "archive of launch/package.sh to unpack on every node");
  command->add_option("--sbatch", arguments->more, "one more option for sbatch, such as --sbatch=--exclude=node7; repeatable")
      ->allow_extra_args(false)
      ->group("Job");
  command->add_flag("--dry-run", arguments->dry_run, "print the script, submit nothing")->group("Job");
  command->callback([arguments] { submit(*arguments); });
}

}  // namespace attamba
