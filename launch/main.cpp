// The `attamba` program: subcommands, help, and exit codes. 0: done; 1: something failed; 2: the user asked for the
// impossible; 75: training was stopped by a signal and has saved.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <csignal>
#include <exception>
#include <iostream>
#include <string>
#include <string_view>
#include <vector>

#include "launch/commands.h"
#include "src/core/error.h"
#include "src/core/names.h"
#include "src/core/version.h"

namespace attamba {

namespace {

constexpr int kFailed = 1;
constexpr int kUsage = 2;

constexpr std::string_view kFlows = R"(
Common flows:
  attamba verify tests/golden/*.h5             check this machine's results against golden files
  attamba plan configs/attamba_62m.toml --ranks 8 --gpu H200
                                               memory, time and traffic of a run, predicted before it is started
  attamba train configs/attamba_small.toml     train; `attamba train --help` lists every key with its default
      --optim.lr 1e-3 --model.chunking.size 4  ... with some keys changed
      --run.folder runs/first                  ... into a folder of its own; run the same line again to resume
  mpirun -n 4 attamba train CONFIG ...         the same on four processes
  attamba submit CONFIG --nodes 2 --gpus 8     the same as a SLURM job
  attamba COMMAND --help                       everything about one command

Exit codes: 0 done; 1 failed; 2 mistaken configuration or command line; 75 training was stopped and saved, run the same
command to go on.)";

void report(std::string_view message) {
  std::string line(message);
  while (!line.empty() && line.back() == '\n') {
    line.pop_back();
  }
  for (char& c : line) {
    c = c == '\n' ? ' ' : c;  // one line, whatever a library puts into its messages
  }
  std::cerr << "attamba: error: " << line << '\n';
}

/// The subcommand that was being parsed, innermost.
const CLI::App& parsed_command(const CLI::App& program) {
  const CLI::App* command = &program;
  while (!command->get_subcommands().empty()) {
    command = command->get_subcommands().back();
  }
  return *command;
}

std::string name_of_command(const CLI::App& command) {
  return command.get_parent() == nullptr ? command.get_name()
                                         : concat(name_of_command(*command.get_parent()), " ", command.get_name());
}

/// What is wrong with arguments that nothing takes: the first flag among them, else the first word.
std::string explain_extras(const CLI::App& program) {
  const CLI::App& command = parsed_command(program);
  const std::vector<std::string> extras = program.remaining(true);
  const auto flag = std::find_if(extras.begin(), extras.end(), [](const std::string& extra) { return extra.starts_with("-"); });
  const bool is_flag = flag != extras.end();
  const std::string word = is_flag ? flag->substr(0, flag->find('=')) : extras.front();
  std::vector<std::string> names;
  if (is_flag) {
    for (const CLI::Option* option : command.get_options()) {
      names.insert(names.end(), option->get_lnames().begin(), option->get_lnames().end());
    }
  } else {
    for (const CLI::App* sub : command.get_subcommands([](const CLI::App*) { return true; })) {
      names.push_back(sub->get_name());
    }
  }
  const std::vector<std::string_view> views(names.begin(), names.end());
  const std::string_view nearest = nearest_name(is_flag ? word.substr(word.find_first_not_of('-')) : word, views);
  const std::string question = nearest.empty() ? std::string() : concat("did you mean ", is_flag ? "--" : "", nearest, "? ");
  const std::string_view what = is_flag ? "option" : names.empty() ? "argument" : "command";
  const std::string full_name = name_of_command(command);
  return concat(full_name, ": unknown ", what, " \"", word, "\"; ", question, "`", full_name, " --help` lists all");
}

int run(int argc, char** argv) {
  CLI::App program("Attamba: language models that attend to compressed multi-token states.", "attamba");
  program.set_version_flag("--version", version_line(), "print version, commit and build type");
  program.require_subcommand(1);
  add_data_commands(program);
  add_train_command(program);
  add_eval_command(program);
  add_checkpoint_command(program);
  add_verify_command(program);
  add_bench_command(program);
  add_plan_command(program);
  add_plot_command(program);
  add_submit_command(program);
  program.footer(std::string(kFlows));  // last, because subcommands inherit a footer that is there before them
  try {
    program.parse(argc, argv);
    return 0;
  } catch (const CLI::RuntimeError& error) {
    return error.get_exit_code();
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == static_cast<int>(CLI::ExitCodes::Success)) {
      return program.exit(error);  // --help and --version arrive here
    }
    if (!program.remaining(true).empty()) {  // also when the library complains first of what is missing
      report(explain_extras(program));
      return kUsage;
    }
    const std::string name = name_of_command(parsed_command(program));
    report(concat(name, ": ", error.what(), "; see `", name, " --help`"));
  } catch (const UsageError& error) {
    report(error.what());
  } catch (const std::exception& error) {
    report(error.what());
    return kFailed;
  }
  return kUsage;
}

}  // namespace

}  // namespace attamba

int main(int argc, char** argv) {
  std::signal(SIGXFSZ, SIG_IGN);  // a file that may not grow further is an error of the write, not the end
  return attamba::run(argc, argv);
}
