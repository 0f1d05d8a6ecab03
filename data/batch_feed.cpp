#include "data/batch_feed.h"

#include <utility>

namespace attamba {

namespace {

/// A data source that does not answer is left behind after so many seconds.
constexpr double kPatience = 1;

}  // namespace

std::vector<std::uint64_t> BatchFeed::Settings::samples(std::uint64_t k) const {
  const auto at = static_cast<std::int64_t>(k);
  const std::int64_t step = first_step + at / share.count();
  std::vector<std::uint64_t> indices;
  if (step < end_step) {
    const std::int64_t micro = (step + passed_over) * share.per_step + share.micro_batch(at % share.count());
    for (std::int64_t i = 0; i < micro_batch; ++i) {
      indices.push_back(static_cast<std::uint64_t>(micro * micro_batch + i));
    }
  }
  return indices;
}

BatchFeed::BatchFeed(const SampleSource& source, const Settings& settings) {
  if (settings.share.count() > 0) {
    loader_ = std::make_unique<Loader>(
        source, [settings](std::uint64_t k) { return settings.samples(k); }, static_cast<std::size_t>(settings.depth));
  }
}

BatchFeed::~BatchFeed() {
  if (loader_ && !loader_->stop(kPatience)) {
    [[maybe_unused]] Loader* const stuck = loader_.release();
  }
}

bool BatchFeed::wait(double seconds) {
  return ahead_ || loader_->wait(seconds);
}

const Batch& BatchFeed::next() {
  current_ = ahead_ ? *std::exchange(ahead_, std::nullopt) : loader_->next();
  return current_;
}

const Batch* BatchFeed::peek() {
  if (!ahead_ && loader_) {
    ahead_ = loader_->take();
  }
  return ahead_ ? &*ahead_ : nullptr;
}

}  // namespace attamba
