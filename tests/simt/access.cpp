// Loads, stores, atomics and asynchronous copies, checked and counted.
#include <cstring>

#include "tests/simt/machine.h"

namespace attamba::simt {

namespace {

enum class Access : std::uint8_t { load, store, atomic, copy };

const char* name_of(Access access) {
  constexpr const char* kNames[] = {"load", "store", "atomic_add", "copy_async_16"};
  return kNames[static_cast<std::size_t>(access)];
}

Registry& allocations = registry();

std::uintptr_t address_of(const void* p) {
  return reinterpret_cast<std::uintptr_t>(p);
}

[[noreturn]] void fail_finding(const Thread& thread, const Site& site, Access access, const std::string& place,
                               std::size_t bytes, const Finding& finding) {
  const int other = thread_of(finding.other);
  const std::string what = concat(name_of(access), " of ", bytes, " bytes at ", place, ": ");
  const char* did = (finding.other & kAtomic) != 0 ? "updates" : finding.other_reads ? "reads" : "writes";
  switch (finding.verdict) {
    case Verdict::unwritten:
      machine.fail(thread, &site, what, "never written");
    case Verdict::in_flight:
      machine.fail(thread, &site, what, "an asynchronous copy of thread ", other, " to there is in flight");
    case Verdict::race_between_blocks:
      machine.fail(thread, &site, what, "race with another block of the launch (its thread ", other, "), which ", did,
                   " it too");
    default:
      machine.fail(thread, &site, what, "race with thread ", other, ", which ", did, " it with no barrier in between");
  }
}

template <Access kAccess>
bool note(Shadow& shadow, std::size_t offset, std::size_t bytes, const Now& now, Finding& finding) {
  if constexpr (kAccess == Access::load) {
    return shadow.load(offset, bytes, now, finding);
  } else if constexpr (kAccess == Access::atomic) {
    return shadow.atomic(offset, bytes, now, finding);
  } else {
    return shadow.store(offset, bytes, now, kAccess == Access::copy ? kInFlight : 0, finding);
  }
}

[[noreturn]] void fail_address(const Thread& thread, const Site& site, Access access, std::uintptr_t address,
                               std::size_t bytes) {
  const std::string what = concat(name_of(access), " of ", bytes, " bytes at ");
  const std::size_t offset = address - address_of(machine.shared());
  const bool aligned = (address & (bytes - 1)) == 0;
  if (offset >= kMostShared) {
    machine.fail(thread, &site, what, registry().describe(address, bytes), aligned ? "" : ": misaligned");
  }
  machine.fail(thread, &site, what, "offset ", offset, " of shared memory: ",
               aligned ? concat("out of bounds, the block has ", machine.grid().shared_bytes, " bytes") : "misaligned");
}

/// Checks an access and notes it. True for shared memory.
template <Access kAccess>
bool check(Thread& thread, const void* p, std::size_t bytes, const Site& site) {
  const std::uintptr_t address = address_of(p);
  const std::size_t offset = address - address_of(machine.shared());
  const bool shared = offset < kMostShared, aligned = (address & (bytes - 1)) == 0;
  Finding finding;
  if (shared) {
    if (!aligned || offset + bytes > machine.grid().shared_bytes) [[unlikely]] {
      fail_address(thread, site, kAccess, address, bytes);
    }
    if (machine.checks() && !note<kAccess>(machine.shared_shadow(), offset, bytes, machine.now(thread, true), finding))
        [[unlikely]] {
      fail_finding(thread, site, kAccess, concat("offset ", offset, " of shared memory"), bytes, finding);
    }
  } else {
    Allocation* allocation = allocations.find(address);
    if (!aligned || allocation == nullptr || !allocation->contains(address, bytes)) [[unlikely]] {
      fail_address(thread, site, kAccess, address, bytes);
    }
    if (machine.checks() && !note<kAccess>(allocation->shadow, address - allocation->begin, bytes, machine.now(thread, false),
                                           finding)) [[unlikely]] {
      fail_finding(thread, site, kAccess, registry().describe(address, bytes), bytes, finding);
    }
  }
  return shared;
}

template <class T>
T atomic_add(T* p, T value, const Site& site) {
  Thread& thread = machine.current();
  check<Access::atomic>(thread, p, sizeof(T), site);
  ++machine.counters().atomics;
  machine.atomic_done();
  const T old = *p;
  *p = static_cast<T>(static_cast<std::make_unsigned_t<T>>(old) + static_cast<std::make_unsigned_t<T>>(value));
  return old;
}

void land(const Thread& thread, const AsyncCopy& copy) {
  std::memcpy(machine.shared() + copy.to, &copy.bytes, sizeof(copy.bytes));
  if (machine.checks()) {
    machine.shared_shadow().set_written(copy.to, sizeof(copy.bytes), machine.stamp(thread));
  }
}

}  // namespace

void check_row(Thread& thread, const void* row, const Site& site) {
  if (!check<Access::load>(thread, row, 16, site)) [[unlikely]] {
    machine.fail(thread, &site, "load_matrix: the row at ", row, " is not in shared memory");
  }
}

}  // namespace attamba::simt

namespace attamba::device {

using simt::machine;

int thread_index() {
  return machine.current().index;
}
int block_threads() {
  return machine.grid().threads;
}
int block_x() {
  return machine.block()[0];
}
int block_y() {
  return machine.block()[1];
}
int block_z() {
  return machine.block()[2];
}
int grid_x() {
  return static_cast<int>(machine.grid().x);
}

std::byte* dynamic_shared() {
  return machine.shared();
}

void check_load(const void* p, std::size_t bytes, Site site) {
  const bool shared = simt::check<simt::Access::load>(machine.current(), p, bytes, site);
  (shared ? machine.counters().shared_loaded : machine.counters().global_loaded) += static_cast<std::int64_t>(bytes);
}

void check_store(void* p, std::size_t bytes, Site site) {
  const bool shared = simt::check<simt::Access::store>(machine.current(), p, bytes, site);
  (shared ? machine.counters().shared_stored : machine.counters().global_stored) += static_cast<std::int64_t>(bytes);
}

std::uint32_t atomic_add(std::uint32_t* p, std::uint32_t value, Site site) {
  return simt::atomic_add(p, value, site);
}
std::int64_t atomic_add(std::int64_t* p, std::int64_t value, Site site) {
  return simt::atomic_add(p, value, site);
}
void fence_device() {
  machine.fence();
}

void copy_async_16(void* shared, const void* global, bool valid, Site site) {
  simt::Thread& thread = machine.current();
  simt::AsyncCopy copy{};
  copy.site = site;
  copy.group = thread.commits;
  if (valid) {
    if (simt::check<simt::Access::load>(thread, global, 16, site)) {
      machine.fail(thread, &site, "copy_async_16: the source ", global, " is in shared memory");
    }
    std::memcpy(&copy.bytes, global, sizeof(copy.bytes));
    machine.counters().copied_async += 16;
  }
  if (!simt::check<simt::Access::copy>(thread, shared, 16, site)) {
    machine.fail(thread, &site, "copy_async_16: the destination ", shared, " is not in shared memory");
  }
  copy.to = static_cast<std::uint32_t>(static_cast<std::byte*>(shared) - machine.shared());
  std::memset(shared, 0xff, 16);
  thread.copies.push_back(copy);
}

void copy_async_commit() {
  ++machine.current().commits;
}

void wait_for_copies(int pending) {
  simt::Thread& thread = machine.current();
  std::size_t done = 0;
  while (done < thread.copies.size() &&
         static_cast<std::int64_t>(thread.copies[done].group) < static_cast<std::int64_t>(thread.commits) - pending) {
    simt::land(thread, thread.copies[done++]);
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<std::ptrdiff_t>(done));
}

}  // namespace attamba::device
