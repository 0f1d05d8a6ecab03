#include "src/train/plot.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <fstream>
#include <limits>

#include "src/core/error.h"

namespace attamba {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::Not;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

/// Is `xml` well-formed? Knows what the picture uses: a declaration, elements, quoted attributes, text, five entities.
class XmlCheck {
 public:
  explicit XmlCheck(std::string_view xml) : rest_(xml) {}

  /// Empty, or what is wrong.
  std::string verdict() {
    if (rest_.starts_with("<?xml ")) {
      rest_.remove_prefix(rest_.find("?>") + 2);
    }
    std::vector<std::string> open;
    int roots = 0;
    while (!rest_.empty()) {
      if (rest_[0] != '<') {
        const std::string_view words = take(std::min(rest_.find('<'), rest_.size()));
        if (!sound_text(words) || (open.empty() && words.find_first_not_of(" \n") != std::string_view::npos)) {
          return concat("bad text \"", words, '"');
        }
        continue;
      }
      const std::size_t end = rest_.find('>');
      if (end == std::string_view::npos) {
        return "unfinished tag";
      }
      std::string_view tag = take(end + 1);
      tag = tag.substr(1, tag.size() - 2);
      if (tag.starts_with('/')) {
        if (open.empty() || open.back() != tag.substr(1)) {
          return concat("unexpected </", tag.substr(1), ">");
        }
        open.pop_back();
        continue;
      }
      const bool closed = tag.ends_with('/');
      const std::string name(tag.substr(0, tag.find_first_of(" /\n")));
      if (!sound_attributes(tag.substr(name.size(), tag.size() - name.size() - closed))) {
        return concat("bad attributes <", tag, ">");
      }
      roots += open.empty();
      if (!closed) {
        open.push_back(name);
      }
    }
    return !open.empty() ? concat("<", open.back(), "> is not closed") : roots != 1 ? "not one root" : "";
  }

 private:
  std::string_view take(std::size_t count) {
    const std::string_view head = rest_.substr(0, count);
    rest_.remove_prefix(count);
    return head;
  }
  static bool sound_text(std::string_view words) {
    for (std::size_t i = 0; i < words.size(); ++i) {
      const auto byte = static_cast<unsigned char>(words[i]);
      const std::string_view here = words.substr(i);
      const bool entity = here.starts_with("&amp;") || here.starts_with("&lt;") || here.starts_with("&gt;") ||
                          here.starts_with("&quot;") || here.starts_with("&apos;");
      if ((byte < 0x20 && byte != '\n' && byte != '\t') || byte == '<' || (byte == '&' && !entity)) {
        return false;
      }
    }
    return true;
  }
  static bool sound_attributes(std::string_view text) {
    std::vector<std::string_view> names;
    while (!text.empty()) {
      const std::size_t equals = text.find("=\"");
      const std::size_t end = equals == std::string_view::npos ? equals : text.find('"', equals + 2);
      if (end == std::string_view::npos || text[0] != ' ' || !sound_text(text.substr(equals + 2, end - equals - 2))) {
        return false;
      }
      const std::string_view name = text.substr(1, equals - 1);
      if (std::find(names.begin(), names.end(), name) != names.end()) {
        return false;
      }
      names.push_back(name);
      text.remove_prefix(end + 1);
    }
    return true;
  }

  std::string_view rest_;
};

PlotRun run_of(std::string name, const std::vector<double>& losses) {
  PlotRun run = {.name = std::move(name), .records = {}};
  for (const double loss : losses) {
    const auto step = static_cast<std::int64_t>(run.records.size()) + 1;
    run.records.push_back(
        {.step = step, .tokens = step * 1000, .loss = loss, .tokens_per_s = 340.0, .seconds = 3.0 * static_cast<double>(step)});
  }
  return run;
}

/// The drawn text of each element of class `kind`.
std::vector<std::string> paths_of(const std::string& svg, const std::string& kind) {
  std::vector<std::string> result;
  for (std::size_t at = 0; (at = svg.find("class=\"" + kind + '"', at)) != std::string::npos; ++at) {
    const std::size_t begin = svg.find(" d=\"", at) + 4;
    result.push_back(svg.substr(begin, svg.find('"', begin) - begin));
  }
  return result;
}

TEST(Plot, XmlIsWellFormedWhateverTheNames) {
  const std::string hostile = "a<b>&\"'\x01\xff\xc3\xa4 ]]> <script>";
  for (const bool log_x : {false, true}) {
    for (const PlotAxis axis : {PlotAxis::tokens, PlotAxis::steps, PlotAxis::seconds}) {
      const std::string svg = plot_svg({run_of(hostile, {5, 4, 3}), run_of("b", {6, 4})}, {.x = axis, .log_x = log_x});
      EXPECT_EQ(XmlCheck(svg).verdict(), "");
      EXPECT_THAT(svg, HasSubstr("a&lt;b&gt;&amp;&quot;'\xef\xbf\xbd\xef\xbf\xbd\xc3\xa4 ]]&gt; &lt;script&gt;"));
      EXPECT_THAT(svg, Not(HasSubstr("nan")));
      EXPECT_THAT(svg, Not(HasSubstr("inf\"")));
    }
  }
}

TEST(Plot, TheXmlCheckFindsWhatItIsThereFor) {
  EXPECT_EQ(XmlCheck("<a b=\"c\"><d/>x &amp; y</a>").verdict(), "");
  for (const char* broken : {"<a>", "<a></b>", "<a>&</a>", "<a b=\"<\"/>", "<a b=\"1\" b=\"2\"/>", "<a/><b/>", "x<a/>"}) {
    EXPECT_NE(XmlCheck(broken).verdict(), "") << broken;
  }
}

TEST(Plot, ARunWithoutRecordsIsNamedAndOneWithoutAnyIsRefused) {
  const std::string svg = plot_svg({run_of("empty", {}), run_of("full", {5, 4})}, {});
  EXPECT_EQ(XmlCheck(svg).verdict(), "");
  EXPECT_THAT(svg, HasSubstr(">empty<"));
  EXPECT_THAT(svg, HasSubstr(">no records<"));
  EXPECT_THROW(plot_svg({run_of("empty", {})}, {}), UsageError);
}

TEST(Plot, OnePointIsADotInsideThePicture) {
  for (const bool log_x : {false, true}) {
    const std::string svg = plot_svg({run_of("one", {5})}, {.log_x = log_x});
    EXPECT_EQ(XmlCheck(svg).verdict(), "");
    EXPECT_THAT(svg, Not(HasSubstr("nan")));
    const auto curves = paths_of(svg, "curve");  // the legend's, the loss, the throughput
    ASSERT_EQ(curves.size(), 3u);
    EXPECT_TRUE(curves[1].ends_with("h0")) << curves[1];  // with round caps: a dot
  }
}

TEST(Plot, ValuesThatAreNotFiniteCutTheLine) {
  const std::string svg = plot_svg({run_of("cut", {5, 4, kNaN, 3, std::numeric_limits<double>::infinity(), 2})}, {});
  EXPECT_EQ(XmlCheck(svg).verdict(), "");
  const std::string loss = paths_of(svg, "curve").at(1);
  EXPECT_EQ(std::count(loss.begin(), loss.end(), 'M'), 3);
  EXPECT_THAT(loss, Not(HasSubstr("nan")));
  EXPECT_THAT(plot_svg({run_of("diverged", {5, kNaN})}, {}), HasSubstr(">not finite<"));
  EXPECT_EQ(XmlCheck(plot_svg({run_of("never finite", {kNaN, kNaN})}, {})).verdict(), "");
}

TEST(Plot, FinalValuesAndValidationAreShown) {
  PlotRun run = run_of("run", {5, 4, 3.25});
  run.records.back().eval_loss = 3.5;
  const std::string svg = plot_svg({run}, {});
  EXPECT_THAT(svg, HasSubstr(">3.2500<"));
  EXPECT_THAT(svg, HasSubstr(">3.5000<"));
  EXPECT_THAT(svg, HasSubstr(">340 tokens/s<"));
  EXPECT_THAT(svg, HasSubstr("<circle class=\"marker\""));
}

TEST(Plot, ALongRunStaysASmallFileAndKeepsItsLastPoint) {
  std::vector<double> losses;
  for (int i = 0; i < 60001; ++i) {
    losses.push_back(3 + 7 * std::exp(-i / 2000.0));
  }
  const std::string svg = plot_svg({run_of("long", losses)}, {});
  EXPECT_LT(svg.size(), 200'000u);
  EXPECT_THAT(paths_of(svg, "curve").at(1), HasSubstr("L936.0 "));  // the right edge
}

TEST(Plot, FilesAreFoundAndTheirErrorsNameTheLine) {
  const auto folder = std::filesystem::temp_directory_path() / concat("attamba_plot_", ::getpid());
  std::filesystem::create_directories(folder / "my run");
  const auto file = folder / "my run" / "metrics.jsonl";
  std::ofstream(file) << "{\"step\": 1, \"tokens\": 1024, \"loss\": null}\n{\"step\": 2, \"tok";
  for (const auto& path : {folder / "my run", folder / "my run" / "", file}) {
    const PlotRun run = read_plot_run(path);
    EXPECT_EQ(run.name, "my run");
    ASSERT_EQ(run.records.size(), 1u);
    EXPECT_TRUE(std::isnan(*run.records[0].loss));
  }
  std::ofstream(file) << "{\"step\": 1, \"tokens\": 1024}\n{\"step\": 2,\n";
  try {
    read_plot_run(folder / "my run");
    FAIL() << "a malformed line was accepted";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr(file.string() + ":2: not JSON"));
  }
  EXPECT_THROW(read_plot_run(folder / "absent"), UsageError);
  std::filesystem::remove_all(folder);
}

TEST(PlotScale, TicksAreRound) {
  EXPECT_THAT(PlotScale(2.9, 5.1, 0, 1, false).ticks(6), ElementsAre(3, 3.5, 4, 4.5, 5));
  EXPECT_THAT(PlotScale(0, 98e7, 0, 1, false).ticks(6), ElementsAre(0, 2e8, 4e8, 6e8, 8e8));
  EXPECT_THAT(PlotScale(5e3, 2e6, 0, 1, true).ticks(9), ElementsAre(5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6, 2e6));
  EXPECT_THAT(PlotScale(500, 2e9, 0, 1, true).ticks(9), ElementsAre(1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9));
  EXPECT_DOUBLE_EQ(PlotScale(10, 1000, 0, 2, true)(100), 1);
  EXPECT_TRUE(std::isfinite(PlotScale(0, 0, 0, 1, false)(0)));
}

TEST(Smooth, KeepsTrendsAndEndsAndRemovesNoise) {
  std::vector<double> values(1000);
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<double>(i);
  }
  const auto line = smooth(values);
  for (std::size_t i = 0; i < values.size(); ++i) {
    ASSERT_NEAR(line[i], values[i], 1e-9);  // a straight line is not bent, nor are its ends
  }
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = i % 2 == 0 ? 1 : -1;
  }
  const auto flat = smooth(values);
  EXPECT_NEAR(flat[500], 0, 1.0 / 20);  // the mean of 21 values
  // A line's end is four times as uncertain as the mean of its 11 values at most.
  EXPECT_LT(std::abs(flat.back()), 4.0 / 11);
}

TEST(Plot, TimeHasUnitsThatPeopleRead) {
  PlotRun run = run_of("run", {5, 4, 3});
  EXPECT_THAT(plot_svg({run}, {.x = PlotAxis::seconds}), HasSubstr("training time (seconds)"));
  run.records.back().seconds = 20.0 * 3600;
  const std::string svg = plot_svg({run}, {.x = PlotAxis::seconds});
  EXPECT_THAT(svg, HasSubstr("training time (hours)"));
  EXPECT_THAT(svg, HasSubstr(">20<"));
}

}  // namespace
}  // namespace attamba
