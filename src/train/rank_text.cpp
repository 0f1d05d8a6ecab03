#include "src/train/rank_text.h"

#include <algorithm>
#include <cstring>

#include "src/core/error.h"

namespace attamba {

namespace {

/// Texts travel as integers, padded with zeros.
std::vector<std::int64_t> padded(const std::string& text, std::int64_t words) {
  std::vector<std::int64_t> memory(static_cast<std::size_t>(words));
  std::memcpy(memory.data(), text.data(), std::min(text.size(), memory.size() * sizeof(std::int64_t)));
  return memory;
}

std::int64_t words_of(std::int64_t bytes) {
  return (bytes + 7) / 8;
}

}  // namespace

std::vector<std::string> gather_text(const std::string& text, Communicator& communicator) {
  const auto ranks = static_cast<std::size_t>(communicator.size());
  const auto own = static_cast<std::int64_t>(text.size());
  std::vector<std::int64_t> sizes(ranks);
  sizes[static_cast<std::size_t>(communicator.rank())] = own;
  communicator.all_reduce_sum({sizes.data(), {DType::int64, {communicator.size()}}});
  const std::int64_t words = words_of(*std::max_element(sizes.begin(), sizes.end()));
  std::vector<std::int64_t> part = padded(text, words), whole(ranks * part.size());
  if (words > 0) {
    communicator.all_gather({whole.data(), {DType::int64, {communicator.size(), words}}},
                            {part.data(), {DType::int64, {words}}});
  }
  std::vector<std::string> texts;
  for (std::size_t rank = 0; rank < ranks; ++rank) {
    const auto* begin = reinterpret_cast<const char*>(whole.data() + rank * part.size());
    texts.emplace_back(begin, static_cast<std::size_t>(sizes[rank]));
  }
  return texts;
}

std::string broadcast_text(std::string text, Communicator& communicator) {
  auto size = static_cast<std::int64_t>(text.size());
  communicator.broadcast({&size, {DType::int64, {1}}}, 0);
  std::vector<std::int64_t> memory = padded(text, words_of(size));
  if (size > 0) {
    communicator.broadcast({memory.data(), {DType::int64, {words_of(size)}}}, 0);
  }
  return {reinterpret_cast<const char*>(memory.data()), static_cast<std::size_t>(size)};
}

std::string on_rank_0(const std::function<std::string()>& body, Communicator& communicator) {
  constexpr char kWell = '+', kFailed = '-';
  std::string text;
  if (communicator.rank() == 0) {
    try {
      text = kWell + body();
    } catch (const std::exception& error) {
      text = kFailed + std::string(error.what());
    }
  }
  text = broadcast_text(std::move(text), communicator);
  require(text.front() == kWell, text.substr(1));
  return text.substr(1);
}

}  // namespace attamba
