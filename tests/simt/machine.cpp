#include "tests/simt/machine.h"

#include <bit>
#include <cstring>
#include <new>
#include <numeric>

namespace attamba::simt {

namespace {

struct Abandoned {};  ///< unwinds the threads of a launch that failed

bool same(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

/// "0-3, 7"
std::string set_text(std::uint32_t set, int offset) {
  std::string text;
  for (int i = 0; i < 32; ++i) {
    if ((set >> i & 1) != 0) {
      const int first = i;
      while (i < 31 && (set >> (i + 1) & 1) != 0) {
        ++i;
      }
      text += concat(text.empty() ? "" : ", ", first + offset, i > first ? concat("-", i + offset) : "");
    }
  }
  return text;
}

bool orders_memory(WarpFunction function, bool shuffles_too) {
  return shuffles_too || function == WarpFunction::sync_warp;
}

}  // namespace

Machine machine;

std::string name_of(WarpFunction function) {
  constexpr const char* kNames[] = {"shuffle",    "shuffle_xor", "shuffle_up",     "shuffle_down",
                                    "ballot",     "sync_warp",   "load_matrix_x4", "load_matrix_x4_transposed",
                                    "mma_16x8x16"};
  return kNames[static_cast<std::size_t>(function)];
}

Machine::Machine()
    : shared_(new (std::align_val_t{1024}) std::byte[kMostShared]), shared_shadow_(std::make_unique<Shadow>(kMostShared)) {
  threads_.reserve(kMostThreads);
}

std::string Machine::site_text(const Site& site) {
  const std::string top = ATTAMBA_SOURCE_DIR "/";
  std::string file = site.file_name();
  if (file.starts_with(top)) {
    file.erase(0, top.size());
  }
  while (file.starts_with("../")) {  // a compiler cache may make paths relative to the build folder
    file.erase(0, 3);
  }
  return concat(" (", file, ":", site.line(), ")");
}

std::string Machine::where(const Thread* thread) const {
  return concat(name_, ": block (", block_[0], ", ", block_[1], ", ", block_[2], ")",
                thread == nullptr ? "" : concat(", thread ", thread->index), ": ");
}

std::uint32_t Machine::random() {
  random_state_ += 0x9e3779b97f4a7c15u;  // splitmix64
  std::uint64_t z = random_state_;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return static_cast<std::uint32_t>(z >> 32);
}

// ------------------------------------------------------------------------------------------------ a launch

void Machine::check_grid() const {
  require(grid_.x > 0 && grid_.y > 0 && grid_.z > 0 && grid_.x <= 0x7fffffff && grid_.y <= 65535 && grid_.z <= 65535 &&
              grid_.threads >= 1 && grid_.threads <= kMostThreads && grid_.shared_bytes <= kMostShared,
          name_, ": could not be started on ", grid_.x, " x ", grid_.y, " x ", grid_.z, " blocks of ", grid_.threads,
          " threads and ", grid_.shared_bytes, " bytes of shared memory");
}

void Machine::run(const std::string& name, const Grid& grid, const std::function<void()>& body) {
  name_ = name, grid_ = grid, body_ = &body;
  check_grid();
  const Options& now = options();
  checks_ = now.checks, shuffles_order_memory_ = now.shuffles_order_memory;
  counters_ = &counters_of(name);
  ++counters_->launches;
  random_state_ = now.seed;
  describe_own_stack(host_);
  prepare_threads();
  if (epoch_ > kEpochs / 2) {
    registry().forget_times();
    epoch_ = 1;
  }
  *shared_shadow_ = Shadow(kMostShared);
  launch_first_ = (epoch_ + 1) << kEpochShift;
  releases_.clear();
  order_.resize(static_cast<std::size_t>(grid.x * grid.y * grid.z));
  std::iota(order_.begin(), order_.end(), 0u);
  for (std::size_t left = order_.size(); left > 1; --left) {
    std::swap(order_[left - 1], order_[random() % left]);
  }
  for (const std::uint32_t index : order_) {
    run_block(index);
  }
}

void Machine::prepare_threads() {
  while (threads_.size() < static_cast<std::size_t>(grid_.threads)) {
    Thread& thread = threads_.emplace_back();
    thread.index = static_cast<int>(threads_.size()) - 1;
    thread.lane = thread.index % kWarp;
    thread.warp = &warps_[static_cast<std::size_t>(thread.index / kWarp)];
    fibers_.start(thread.context, &Machine::fiber_main);
  }
}

void Machine::run_block(std::int64_t index) {
  block_ = {static_cast<int>(index % grid_.x), static_cast<int>(index / grid_.x % grid_.y),
            static_cast<int>(index / grid_.x / grid_.y)};
  ++counters_->blocks;
  live_ = grid_.threads;
  at_barrier_ = 0;
  ready_ = 0;
  for (int w = 0; w * kWarp < grid_.threads; ++w) {
    Warp& warp = warps_[static_cast<std::size_t>(w)];
    const int lanes = std::min(kWarp, grid_.threads - w * kWarp);
    warp.all = warp.runnable = lanes == kWarp ? ~0u : (1u << lanes) - 1;
    warp.in_function = warp.at_barrier = warp.returned = 0;
    warp.first_atomic = ~Stamp{0};
    warp.turn = static_cast<int>(random() % kWarp);
    ready_ |= 1u << w;
  }
  for (int i = 0; i < grid_.threads; ++i) {
    Thread& thread = threads_[static_cast<std::size_t>(i)];
    thread.bits = static_cast<Stamp>(i);
    thread.last_fence = 0;
    thread.did_atomic = false;
    thread.commits = 0;
    thread.copies.clear();
  }
  fenced_ = fenced_in_epoch_ = false;
  first_atomic_epoch_ = 0;
  next_epoch();
  block_first_ = epoch_ << kEpochShift;
  std::memset(shared_, 0xff, grid_.shared_bytes);
  run_threads();
}

void Machine::run_threads() {
  current_ = pick(random_warp());
  switch_context(host_, current_->context);
  if (error_ == nullptr && live_ > 0) {
    error_ = std::make_exception_ptr(Error(stuck()));
  }
  if (error_ != nullptr) {
    abandon();
    std::rethrow_exception(std::exchange(error_, nullptr));
  }
}

void Machine::abandon() {
  abandoning_ = true;
  for (Thread& thread : threads_) {
    if (thread.inside) {
      current_ = &thread;
      switch_context(host_, thread.context);
    }
  }
  abandoning_ = false;
}

void Machine::fiber_main() {
  Machine& m = machine;
  Thread& thread = *m.current_;
  for (;;) {
    thread.inside = true;
    try {
      (*m.body_)();
      m.thread_returned();
    } catch (const Abandoned&) {  // on purpose nothing: the launch has failed already
    } catch (...) {
      m.error_ = std::current_exception();
    }
    thread.inside = false;
    m.leave(thread, m.error_ != nullptr || m.abandoning_ ? nullptr : m.pick(*thread.warp));
  }
}

void Machine::thread_returned() {
  Thread& thread = *current_;
  if (!thread.copies.empty()) {
    const AsyncCopy& copy = thread.copies.front();
    fail(thread, &copy.site, "returned with ", thread.copies.size(), " asynchronous copies in flight, the first one ",
         copy.group == thread.commits ? "never committed" : "never waited for");
  }
  Warp& warp = *thread.warp;
  warp.returned |= 1u << thread.lane;
  if (warp.in_function != 0) {
    diverged(thread, "the end of the kernel", Site{});
  }
  --live_;
  if (live_ > 0 && at_barrier_ == live_) {
    release_barrier();
  }
}

// ------------------------------------------------------------------------------------------------ who runs next

Warp& Machine::random_warp() {
  if (ready_ == 0) {
    return warps_[0];
  }
  const int shift = static_cast<int>(random() % 32);
  return warps_[static_cast<std::size_t>((std::countr_zero(std::rotr(ready_, shift)) + shift) % 32)];
}

Thread* Machine::pick(Warp& preferred) {
  Warp& warp = preferred.runnable != 0 ? preferred : random_warp();
  if (warp.runnable == 0) {
    return nullptr;
  }
  const int lane = (std::countr_zero(std::rotr(warp.runnable, warp.turn)) + warp.turn) % kWarp;
  warp.runnable &= ~(1u << lane);
  const auto w = &warp - warps_.data();
  if (warp.runnable == 0) {
    ready_ &= ~(1u << w);
  }
  return &threads_[static_cast<std::size_t>(w * kWarp + lane)];
}

void Machine::suspend(Warp& preferred) {
  Thread& thread = *current_;
  Thread* next = pick(preferred);
  if (next != &thread) {
    leave(thread, next);
    if (abandoning_) [[unlikely]] {
      throw Abandoned{};
    }
  }
}

void Machine::leave(Thread& thread, Thread* next) {
  if (next != nullptr) {
    current_ = next;
  }
  switch_context(thread.context, next != nullptr ? next->context : host_);
}

void Machine::meet(WarpFunction function, Site site, const Lane& arguments) {
  Thread& thread = *current_;
  Warp& warp = *thread.warp;
  const std::uint32_t self = 1u << thread.lane;
  if (warp.in_function == 0) {
    warp.function = function;
    warp.site = site;
  }
  if (warp.all != ~0u || (warp.returned | warp.at_barrier) != 0 || warp.function != function || !same(warp.site, site))
      [[unlikely]] {
    diverged(thread, name_of(function).c_str(), site);
  }
  warp.lanes[static_cast<std::size_t>(thread.lane)] = arguments;
  warp.in_function |= self;
  if (warp.in_function != ~0u) {
    suspend(warp);
    return;
  }
  complete(warp);
  warp.runnable = ~self;
  ready_ |= 1u << (&warp - warps_.data());
  if (random() % 4 == 0) {  // let another warp go first
    warp.runnable |= self;
    suspend(random_warp());
  }
}

void Machine::complete(Warp& warp) {
  compute(warp.function, warp, &threads_[static_cast<std::size_t>(&warp - warps_.data()) * kWarp], warp.site);
  warp.in_function = 0;
  ++counters_->warp_functions;
  if (orders_memory(warp.function, shuffles_order_memory_)) {
    warp.epoch += Stamp{1} << kWarpEpochShift;
    if (warp.epoch > kWarpEpochMask) {
      fail(*current_, &warp.site, "more than ", kWarpEpochs,
           " warp functions between two sync_block: the emulator cannot count on");
    }
  }
}

void Machine::sync_block(Site site) {
  Thread& thread = *current_;
  Warp& warp = *thread.warp;
  if (at_barrier_ == 0) {
    barrier_site_ = site;
  }
  if (warp.in_function != 0 || !same(barrier_site_, site)) [[unlikely]] {
    diverged(thread, "sync_block", site);
  }
  warp.at_barrier |= 1u << thread.lane;
  thread.site = site;
  ++at_barrier_;
  if (at_barrier_ == live_) {
    release_barrier();
    suspend(random_warp());
  } else {
    suspend(warp);
  }
}

void Machine::release_barrier() {
  ++counters_->block_barriers;
  at_barrier_ = 0;
  for (int w = 0; w * kWarp < grid_.threads; ++w) {
    Warp& warp = warps_[static_cast<std::size_t>(w)];
    if (warp.at_barrier != 0) {
      warp.runnable |= std::exchange(warp.at_barrier, 0u);
      ready_ |= 1u << w;
    }
  }
  next_epoch();
}

void Machine::next_epoch() {
  ++epoch_;
  require(epoch_ < kEpochs, name_, ": more than ", kEpochs / 2, " barriers in one launch: the emulator cannot count on");
  for (int w = 0; w * kWarp < grid_.threads; ++w) {
    warps_[static_cast<std::size_t>(w)].epoch = 0;
  }
  if (fenced_in_epoch_) {
    for (int i = 0; i < grid_.threads; ++i) {
      threads_[static_cast<std::size_t>(i)].bits &= ~kFenceMask;
    }
    fenced_in_epoch_ = false;
  }
}

void Machine::diverged(const Thread& thread, const char* function, Site site) const {
  const Warp& warp = *thread.warp;
  const int first = thread.index - thread.lane;
  std::string others;
  const auto add = [&](const std::string& text) { others += (others.empty() ? "" : "; ") + text; };
  if (warp.all != ~0u) {
    add(concat("the warp has only threads ", set_text(warp.all, first)));
  }
  if (warp.in_function != 0) {
    add(concat("threads ", set_text(warp.in_function, first), " are at ", name_of(warp.function), site_text(warp.site)));
  }
  if (warp.at_barrier != 0) {
    add(concat("threads ", set_text(warp.at_barrier, first), " are at sync_block", site_text(barrier_site_)));
  }
  if (const std::uint32_t returned = warp.returned & ~(1u << thread.lane); returned != 0) {
    add(concat("threads ", set_text(returned, first), " have returned"));
  }
  if (others.empty()) {
    add(concat(at_barrier_, " threads of other warps are at sync_block", site_text(barrier_site_)));
  }
  throw Error(
      concat(where(&thread), "divergent: it is at ", function, site.line() == 0 ? "" : site_text(site), ", but ", others));
}

std::string Machine::stuck() const {
  std::string text = where(nullptr) + "no thread can go on:";
  for (int w = 0; w * kWarp < grid_.threads; ++w) {
    const Warp& warp = warps_[static_cast<std::size_t>(w)];
    if (warp.in_function != 0) {
      text += concat(" threads ", set_text(warp.in_function, w * kWarp), " wait in ", name_of(warp.function),
                     site_text(warp.site), ";");
    }
    if (warp.at_barrier != 0) {
      text += concat(" threads ", set_text(warp.at_barrier, w * kWarp), " wait at sync_block", site_text(barrier_site_), ";");
    }
  }
  return text;
}

}  // namespace attamba::simt
