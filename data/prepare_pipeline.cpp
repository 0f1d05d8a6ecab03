#include "data/prepare_pipeline.h"

#include <algorithm>

#include "data/utf8.h"
#include "src/core/error.h"

namespace attamba {
namespace {

/// Long texts are tokenised in pieces of about this size, by several workers at a time.
constexpr std::size_t kPieceText = std::size_t{1} << 17;

/// Text on the way, per thread and within bounds; with its tokens each byte costs about four.
std::size_t memory_for(int threads) {
  return std::clamp(static_cast<std::size_t>(threads) << 20, std::size_t{16} << 20, std::size_t{64} << 20);
}

/// Remembered words per worker: 3 MiB each, less when many workers share 128 MiB.
std::size_t cached_words_for(int threads) {
  std::size_t words = std::size_t{1} << 15;
  while (words > 1024 && words * 96 * static_cast<std::size_t>(threads) > (std::size_t{128} << 20)) {
    words /= 2;
  }
  return words;
}

}  // namespace

TokenPipeline::TokenPipeline(const Tokenizer& tokenizer, std::vector<InputFile> files, std::string text_field, int threads,
                             Read read)
    : tokenizer_(tokenizer),
      files_(std::move(files)),
      text_field_(std::move(text_field)),
      read_(std::move(read)),
      memory_(memory_for(threads)),
      cached_words_(cached_words_for(threads)) {
  try {
    threads_.emplace_back([this] { run_reader(); });
    for (int i = 0; i < threads; ++i) {
      threads_.emplace_back([this] { run_worker(); });
    }
  } catch (...) {
    stop();
    throw;
  }
}

TokenPipeline::~TokenPipeline() {
  stop();
}

void TokenPipeline::stop() {
  {
    const std::scoped_lock lock(mutex_);
    stopped_ = true;
  }
  work_.notify_all();
  room_.notify_all();
  for (auto& thread : threads_) {
    thread.join();
  }
  threads_.clear();
}

void TokenPipeline::run_reader() {
  std::exception_ptr error;
  try {
    for (;;) {
      auto entry = std::make_unique<Entry>();
      entry->job = std::make_unique<TokenJob>();
      if (!read_(*entry->job)) {
        break;
      }
      entry->size = entry->job->unit.raw.size() + sizeof(TokenJob);
      std::unique_lock lock(mutex_);
      room_.wait(lock, [&] { return stopped_ || in_flight_ == 0 || in_flight_ + entry->size <= memory_; });
      if (stopped_) {
        return;
      }
      in_flight_ += entry->size;
      tasks_.push_back({entry.get(), 0, true});
      entries_.push_back(std::move(entry));
      work_.notify_one();
    }
  } catch (...) {
    error = std::current_exception();
  }
  const std::scoped_lock lock(mutex_);
  reader_error_ = error;
  reader_done_ = true;
  work_.notify_all();
  done_.notify_all();
}

void TokenPipeline::parse(TokenJob& job) const {
  const auto& path = files_[job.file].path;
  require_utf8(job.unit, path);
  if (files_[job.file].jsonl) {
    job.text = text_of_json_line(job.unit, text_field_, path);
    std::string().swap(job.unit.raw);
  } else {
    job.text = std::move(job.unit.raw);
  }
  std::string_view rest = job.text;
  bool begins = job.unit.begins_document;
  while (!rest.empty()) {
    const std::size_t size = rest.size() <= kPieceText ? rest.size() : tokenizer_.cut_point(rest.substr(0, kPieceText + 1));
    job.pieces.push_back({.text = rest.substr(0, size), .begins_document = begins, .tokens = {}, .words = 0});
    rest.remove_prefix(size);
    begins = false;
  }
}

void TokenPipeline::run_worker() {
  Encoder encoder(tokenizer_, cached_words_);
  std::unique_lock lock(mutex_);
  for (;;) {
    work_.wait(lock, [&] { return stopped_ || !tasks_.empty() || (reader_done_ && entries_.empty()); });
    if (stopped_ || tasks_.empty()) {
      return;
    }
    const Task task = tasks_.front();
    tasks_.pop_front();
    Entry& entry = *task.entry;
    TokenJob& job = *entry.job;
    lock.unlock();
    std::exception_ptr error;
    try {
      if (task.parse) {
        parse(job);
      } else {
        auto& piece = job.pieces[task.piece];
        const char* before = piece.text.data();
        const bool inside_word = before == job.text.data() ? job.unit.inside_word : !is_space(before[-1]);
        piece.words = count_words(piece.text, inside_word);
        piece.tokens.reserve(piece.text.size() / 3);
        encoder.append(piece.text, piece.begins_document, piece.tokens);
      }
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    if (error && !job.error) {
      job.error = error;
    }
    if (task.parse) {
      entry.parsed = true;
      entry.open_pieces = error ? 0 : job.pieces.size();
      // In front of other jobs: what is oldest is finished first.
      for (std::size_t piece = entry.open_pieces; piece-- > 0;) {
        tasks_.push_front({&entry, piece, false});
      }
      work_.notify_all();
    } else {
      --entry.open_pieces;
    }
    if (entry.parsed && entry.open_pieces == 0) {
      done_.notify_all();
    }
  }
}

std::unique_ptr<TokenJob> TokenPipeline::next() {
  std::unique_lock lock(mutex_);
  done_.wait(lock,
             [&] { return entries_.empty() ? reader_done_ : entries_.front()->parsed && entries_.front()->open_pieces == 0; });
  if (entries_.empty()) {
    if (reader_error_) {
      std::rethrow_exception(reader_error_);
    }
    return nullptr;
  }
  auto job = std::move(entries_.front()->job);
  in_flight_ -= entries_.front()->size;
  entries_.pop_front();
  room_.notify_all();
  if (reader_done_ && entries_.empty()) {
    work_.notify_all();
  }
  lock.unlock();
  if (job->error) {
    std::rethrow_exception(job->error);
  }
  return job;
}

}  // namespace attamba
