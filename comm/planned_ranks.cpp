#include "comm/planned_ranks.h"

#include "src/core/error.h"

namespace attamba {

namespace {

[[noreturn]] void refuse(const char* collective) {
  throw Error(concat(collective, ": these ranks exist in a plan only; programs made for them cannot run"));
}

}  // namespace

std::unique_ptr<Communicator> PlannedRanks::split(int) {
  refuse("split");
}
void PlannedRanks::all_reduce_sum(const Tensor&) {
  refuse("all_reduce_sum");
}
std::unique_ptr<Request> PlannedRanks::start_all_reduce_sum(const Tensor&) {
  refuse("start_all_reduce_sum");
}
std::unique_ptr<Request> PlannedRanks::start_reduce_scatter_sum(const Tensor&, const Tensor&) {
  refuse("start_reduce_scatter_sum");
}
std::unique_ptr<Request> PlannedRanks::start_all_gather(const Tensor&, const Tensor&) {
  refuse("start_all_gather");
}
void PlannedRanks::all_reduce_max(const Tensor&) {
  refuse("all_reduce_max");
}
void PlannedRanks::broadcast(const Tensor&, int) {
  refuse("broadcast");
}
void PlannedRanks::all_gather(const Tensor&, const Tensor&) {
  refuse("all_gather");
}
void PlannedRanks::barrier() {
  refuse("barrier");
}
void PlannedRanks::abort(int) {
  refuse("abort");
}

}  // namespace attamba
