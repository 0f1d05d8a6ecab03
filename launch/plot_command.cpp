// attamba plot: the curves of runs as one SVG.
#include <CLI/CLI.hpp>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>

#include "launch/commands.h"
#include "src/core/error.h"
#include "src/train/plot.h"

namespace attamba {

namespace {

struct PlotArguments {
  std::vector<std::string> runs;
  std::string out = "runs.svg";
  PlotOptions options;
};

/// Runs whose folders have the same name are told apart by what the user typed.
void make_names_unique(std::vector<PlotRun>& runs, const std::vector<std::string>& typed) {
  std::map<std::string, int> uses;
  for (const PlotRun& run : runs) {
    ++uses[run.name];
  }
  for (std::size_t i = 0; i < runs.size(); ++i) {
    if (uses[runs[i].name] > 1) {
      runs[i].name = typed[i];
    }
  }
}

void plot(const PlotArguments& arguments) {
  std::vector<PlotRun> runs;
  for (const std::string& run : arguments.runs) {
    runs.push_back(read_plot_run(run));
  }
  make_names_unique(runs, arguments.runs);
  const std::string svg = plot_svg(runs, arguments.options);
  std::ofstream out(arguments.out, std::ios::binary | std::ios::trunc);
  out << svg;
  out.close();
  require(out.good(), "plot: cannot write ", arguments.out, ": ", std::strerror(errno));
  std::printf("%s\n", arguments.out.c_str());
}

}  // namespace

void add_plot_command(CLI::App& program) {
  auto arguments = std::make_shared<PlotArguments>();
  CLI::App* command = program.add_subcommand("plot", "draw the loss and throughput of runs as one SVG picture");
  command->add_option("run", arguments->runs, "run folders, or their metrics.jsonl files")->required();
  command->add_option("--out,-o", arguments->out, "the picture to write")->capture_default_str();
  const std::map<std::string, PlotAxis> axes = {
      {"tokens", PlotAxis::tokens}, {"steps", PlotAxis::steps}, {"time", PlotAxis::seconds}};
  command->add_option("--x", arguments->options.x, "horizontal axis: tokens, steps or time; default tokens")
      ->transform(CLI::CheckedTransformer(axes).description(""));
  command->add_flag("--log-x", arguments->options.log_x, "logarithmic horizontal axis");
  command->add_option("--loss-max", arguments->options.loss_max, "top of the loss axis; default chosen from the curves")
      ->check(CLI::PositiveNumber);
  command->callback([arguments] { plot(*arguments); });
}

}  // namespace attamba
