#include "src/train/metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <fstream>
#include <limits>
#include <sstream>

#include "src/core/error.h"

namespace attamba {
namespace {

using testing::HasSubstr;
using testing::Not;
using testing::StartsWith;

class MetricsTest : public testing::Test {
 protected:
  MetricsTest() {
    const auto* test = testing::UnitTest::GetInstance()->current_test_info();
    folder_ = std::filesystem::temp_directory_path() / concat("attamba_", test->name(), "_", ::getpid());
    std::filesystem::create_directories(folder_);
    file_ = folder_ / "metrics.jsonl";
  }
  ~MetricsTest() override { std::filesystem::remove_all(folder_); }

  void write(std::string_view text) const { std::ofstream(file_, std::ios::binary) << text; }
  std::string text() const {
    std::ifstream in(file_, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  std::vector<std::int64_t> steps() const {
    std::vector<std::int64_t> result;
    for (const MetricsRecord& record : read_metrics(file_)) {
      result.push_back(record.step);
    }
    return result;
  }

  std::filesystem::path folder_, file_;
};

MetricsRecord at(std::int64_t step) {
  return {.step = step, .tokens = step * 1024, .loss = 5.0};
}

TEST_F(MetricsTest, EveryQuantityComesBackBitForBit) {
  MetricsRecord record = {.step = 7, .tokens = 7168, .loss = 0.1 + 0.2, .lr = 3e-3 / 7, .grad_norm = 1e-300};
  record.share_of_peak = 0.5;
  record.eval_loss = std::numeric_limits<double>::quiet_NaN();
  record.more = {{"eval_loss_swa", 4.25}};
  MetricsLog(file_, 0).append(record);

  const auto back = read_metrics(file_);
  ASSERT_EQ(back.size(), 1u);
  EXPECT_EQ(back[0].step, 7);
  EXPECT_EQ(back[0].tokens, 7168);
  EXPECT_EQ(back[0].loss, record.loss);
  EXPECT_EQ(back[0].lr, record.lr);
  EXPECT_EQ(back[0].grad_norm, record.grad_norm);
  EXPECT_EQ(back[0].share_of_peak, record.share_of_peak);
  ASSERT_TRUE(back[0].eval_loss.has_value());
  EXPECT_TRUE(std::isnan(*back[0].eval_loss));
  EXPECT_FALSE(back[0].seconds.has_value());
  EXPECT_EQ(back[0].more, record.more);
}

TEST_F(MetricsTest, ATornLastLineIsRemovedBeforeTheNextIsWritten) {
  write(to_json_line(at(1)) + "\n" + to_json_line(at(2)).substr(0, 11));
  EXPECT_EQ(steps(), (std::vector<std::int64_t>{1}));  // a reader of the running file
  MetricsLog(file_, 1).append(at(2));
  EXPECT_EQ(text(), to_json_line(at(1)) + "\n" + to_json_line(at(2)) + "\n");
}

TEST_F(MetricsTest, ResumingDropsTheStepsThatWillBeComputedAgain) {
  {
    MetricsLog log(file_, 0);
    for (const std::int64_t step : {10, 20, 30, 40}) {
      log.append(at(step));
    }
  }
  MetricsLog log(file_, 20);
  EXPECT_EQ(steps(), (std::vector<std::int64_t>{10, 20}));
  log.append(at(30));
  EXPECT_EQ(steps(), (std::vector<std::int64_t>{10, 20, 30}));
  MetricsLog(file_, 0);
  EXPECT_EQ(text(), "");
}

TEST_F(MetricsTest, GarbageAtTheEndIsACrashGarbageInTheMiddleIsAnError) {
  write(to_json_line(at(1)) + "\n" + std::string(8, '\0') + "\n" + std::string(4, '\0'));
  { MetricsLog log(file_, 5); }
  EXPECT_EQ(text(), to_json_line(at(1)) + "\n");

  const std::string damaged = to_json_line(at(1)) + "\nhello\n" + to_json_line(at(2)) + "\n";
  write(damaged);
  try {
    MetricsLog log(file_, 5);
    FAIL() << "a damaged file was accepted";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr(file_.string() + ":2: not JSON: \"hello\""));
  }
  EXPECT_EQ(text(), damaged);
}

TEST_F(MetricsTest, AMalformedLineIsNamed) {
  const auto message = [this](const std::string& line) {
    write(to_json_line(at(1)) + "\n" + line + "\n");
    try {
      read_metrics(file_);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  EXPECT_THAT(message("[1]"), HasSubstr("metrics.jsonl:2: expected an object"));
  EXPECT_THAT(message("{\"tokens\": 1}"), HasSubstr(":2: \"step\" is missing"));
  EXPECT_THAT(message("{\"step\": 1.5, \"tokens\": 1}"), HasSubstr(":2: \"step\" is not an integer: 1.5"));
  EXPECT_THAT(message("{\"step\": 1, \"tokens\": 1, \"loss\": [2]}"), HasSubstr(":2: \"loss\" is not a number: [2]"));
}

TEST_F(MetricsTest, AFileThatCannotBeWrittenIsNamed) {
  try {
    MetricsLog log(folder_ / "absent" / "metrics.jsonl", 0);
    FAIL() << "opened a file in an absent folder";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr((folder_ / "absent" / "metrics.jsonl").string()));
  }
}

TEST_F(MetricsTest, WhatAFullDiskDoesNotTakeIsWrittenLaterAndTearsNoLine) {
  MetricsLog log(file_, 0);
  EXPECT_FALSE(log.append(at(1)));
  const std::string before = text();
  rlimit limit{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &limit), 0);
  const rlimit small = {.rlim_cur = before.size() + 10, .rlim_max = limit.rlim_max};
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  const auto reason = log.append(at(2));
  EXPECT_TRUE(log.append(at(3)));
  EXPECT_THROW(log.finish(), Error);
  ::setrlimit(RLIMIT_FSIZE, &limit);
  std::signal(SIGXFSZ, handler);
  ASSERT_TRUE(reason);
  EXPECT_THAT(*reason, HasSubstr("cannot write to " + file_.string()));
  EXPECT_EQ(text(), before);
  EXPECT_FALSE(log.append(at(4)));
  EXPECT_EQ(steps(), (std::vector<std::int64_t>{1, 2, 3, 4}));
  EXPECT_NO_THROW(log.finish());
}

class Progress : public testing::Test {
 protected:
  ProgressLine::Options options(bool terminal) {
    return {.terminal = terminal, .columns = 60, .now = [this] { return now_; }};
  }
  static MetricsRecord full(std::int64_t step) {
    return {.step = step,
            .tokens = step * 1024,
            .loss = 4.38125,
            .lr = 3e-3,
            .grad_norm = 0.8312,
            .tokens_per_s = 57300,
            .model_flops_per_s = 16.2e12,
            .share_of_peak = 0.414};
  }

  double now_ = 100;
  std::ostringstream out_;
};

TEST_F(Progress, PlainLinesSayEverythingAtABoundedRate) {
  ProgressLine progress(out_, 1000, 0, options(false));
  for (int step = 1; step <= 25; ++step) {
    now_ += 1;
    progress.update(full(step));
  }
  // At steps 1, 11 and 21: ten seconds apart.
  EXPECT_EQ(std::count(out_.view().begin(), out_.view().end(), '\n'), 3);
  EXPECT_THAT(out_.str(),
              StartsWith("step 1/1,000  loss 4.3812  lr 3.00e-03  grad 0.831  57.3 ktok/s  16.2 TFLOP/s (41% of peak)  "
                         "ETA 16 min 39 s\n"));
  EXPECT_THAT(out_.str(), Not(HasSubstr("\r")));
  progress.update(full(1000));
  EXPECT_THAT(out_.str(), HasSubstr("step 1,000/1,000"));  // the last step is shown however soon it comes
}

TEST_F(Progress, EtaCountsFromTheResumedStep) {
  ProgressLine progress(out_, 1000, 900, options(false));
  now_ += 20;
  progress.update(full(910));
  EXPECT_THAT(out_.str(), HasSubstr("ETA 3 min\n"));
}

TEST_F(Progress, ATerminalShowsOneLineThatFitsAndMessagesSurvive) {
  {
    ProgressLine progress(out_, 1000, 0, options(true));
    now_ += 1;
    progress.update(full(1));
    EXPECT_EQ(out_.str(), "\rstep 1/1,000  loss 4.3812  lr 3.00e-03  grad 0.831  57.3 kt\x1b[K");  // 59 of 60 columns
    out_.str("");
    progress.message("saved");
    EXPECT_THAT(out_.str(), StartsWith("\r\x1b[Ksaved\nstep 1/1,000"));
    out_.str("");
    now_ += 0.01;
    progress.update(full(2));
    EXPECT_EQ(out_.str(), "");
  }
  EXPECT_THAT(out_.str(), StartsWith("\rstep 2/1,000"));  // what was pending is shown at the end
  EXPECT_EQ(out_.str().back(), '\n');
}

TEST(Format, Durations) {
  EXPECT_EQ(format_duration(0.85), "850 ms");
  EXPECT_EQ(format_duration(0.0012), "1.2 ms");
  EXPECT_EQ(format_duration(0.9999), "1 s");
  EXPECT_EQ(format_duration(3.25), "3.2 s");
  EXPECT_EQ(format_duration(59.6), "1 min");
  EXPECT_EQ(format_duration(200), "3 min 20 s");
  EXPECT_EQ(format_duration(5 * 3600 + 7 * 60 + 59), "5 h 7 min");
  EXPECT_EQ(format_duration(12 * 86400 + 3 * 3600), "12 d 3 h");
  EXPECT_EQ(format_duration(std::nan("")), "?");
}

TEST(Format, NumbersRoundIntoTheNextPrefix) {
  EXPECT_EQ(format_count(62751488), "62.75 M");
  EXPECT_EQ(format_count(1.3e9), "1.3 G");
  EXPECT_EQ(format_count(950), "950");
  EXPECT_EQ(format_count(999999), "1 M");
  EXPECT_EQ(format_quantity(1.3e9, "FLOP/s"), "1.3 GFLOP/s");
  EXPECT_EQ(format_quantity(340.4, "tok/s"), "340 tok/s");
  EXPECT_EQ(format_quantity(999.6, "tok/s"), "1 ktok/s");
  EXPECT_EQ(format_quantity(0, "tok/s"), "0 tok/s");
  EXPECT_EQ(format_integer(0), "0");
  EXPECT_EQ(format_integer(60000), "60,000");
  EXPECT_EQ(format_integer(-1234567), "-1,234,567");
}

}  // namespace
}  // namespace attamba
