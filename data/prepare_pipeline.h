// The parallel part of preparing: units of text in, tokens out, in the order of the text.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "data/manifest.h"
#include "data/text_source.h"
#include "data/tokenizer.h"

namespace attamba {

/// A unit of text with where it comes from, and later its tokens.
struct TokenJob {
  TextUnit unit;
  std::size_t file = 0;  ///< index into the plan's files
  std::size_t output = 0;
  InputPosition after;              ///< where the input goes on behind this job
  std::uint64_t disk_position = 0;  ///< input consumed once this job was read, over all files

  struct Piece {
    std::string_view text;  ///< a part of `text`, at most kPieceText bytes
    bool begins_document = true;
    std::vector<std::int32_t> tokens;  ///< without BOS and EOS
    std::uint64_t words = 0;
  };
  std::string text;
  std::vector<Piece> pieces;
  std::exception_ptr error;
};

/// Runs the workers. The reader thread calls `read` for one job after the other; the calling thread gets them back, done, from
/// next(), in that order. At most `memory` bytes of text are on the way, or one job.
class TokenPipeline {
 public:
  /// Fills a job and returns true, or false at the end. Called from the reader's thread.
  using Read = std::function<bool(TokenJob&)>;

  TokenPipeline(const Tokenizer& tokenizer, std::vector<InputFile> files, std::string text_field, int threads, Read read);
  ~TokenPipeline();

  /// The next job in order, or nothing at the end. Rethrows what went wrong in the reader or in the job's workers, so that the
  /// first error of the input is the one that is reported, whichever thread met it first.
  std::unique_ptr<TokenJob> next();

 private:
  struct Entry {
    std::unique_ptr<TokenJob> job;
    std::size_t size = 0;         ///< bytes counted against the limit
    std::size_t open_pieces = 0;  ///< not tokenised yet
    bool parsed = false;
  };
  struct Task {
    Entry* entry;
    std::size_t piece;
    bool parse;
  };

  void run_reader();
  void run_worker();
  void parse(TokenJob& job) const;
  void stop();

  const Tokenizer& tokenizer_;
  const std::vector<InputFile> files_;
  const std::string text_field_;
  const Read read_;
  const std::size_t memory_;
  const std::size_t cached_words_;

  std::mutex mutex_;
  std::condition_variable work_;  ///< tasks_ has grown, or all is over
  std::condition_variable room_;  ///< in_flight_ has shrunk, or all is over
  std::condition_variable done_;  ///< the front entry may be done, or the reader is
  std::deque<Task> tasks_;
  std::deque<std::unique_ptr<Entry>> entries_;  ///< in reading order
  std::size_t in_flight_ = 0;
  bool reader_done_ = false;
  bool stopped_ = false;
  std::exception_ptr reader_error_;
  std::vector<std::thread> threads_;
};

}  // namespace attamba
