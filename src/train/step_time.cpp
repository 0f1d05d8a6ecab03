#include "src/train/step_time.h"

#include <algorithm>
#include <map>

namespace attamba {

namespace {

/// Two clocks: that of the operations, and when the network has done all that it was asked.
class Timeline {
 public:
  Timeline(const Machine& machine, DType dtype, int ranks) : machine_(machine), dtype_(dtype), ranks_(ranks) {}

  void run(const ProgramPlans::Planned& program) {
    std::map<int, double> done;  // by value: when the network lets go of it
    for_each_op(program, [&](const Tape::Node& node, const auto& inputs, const auto& outputs) {
      const Collective collective = node.op->collective(inputs);
      if (collective.kind == Collective::Kind::wait) {
        wait(node.inputs, done);
        return;
      }
      if (collective.kind != Collective::Kind::none) {
        const double seconds = machine_.collective_seconds(collective, ranks_);
        network_ = std::max(network_, now_) + seconds;
        time_.communication += seconds;
        time_.sent_bytes += ring_bytes(collective, ranks_);
        for (const Value value : node.inputs) {
          done[value.id] = network_;
        }
        if (collective.waits) {
          wait(node.inputs, done);
        }
        return;
      }
      const double flops = node.op->flops(inputs, outputs);
      const auto bytes = static_cast<double>(node.op->traffic(inputs, outputs));
      const double seconds = machine_.op_time(flops, bytes, dtype_);
      time_.floor += machine_.floor_seconds(flops, bytes, dtype_);
      time_.compute += seconds;
      now_ += seconds;
    });
  }
  const StepTime& time() const { return time_; }

 private:
  void wait(const std::vector<Value>& values, const std::map<int, double>& done) {
    for (const Value value : values) {
      if (const auto found = done.find(value.id); found != done.end() && found->second > now_) {
        time_.exposed += found->second - now_;
        now_ = found->second;
      }
    }
  }

  const Machine& machine_;
  DType dtype_;
  int ranks_;
  double now_ = 0, network_ = 0;
  StepTime time_;
};

}  // namespace

StepTime predict_step(const ProgramPlans& plans, const Machine& machine, DType dtype, int ranks, std::int64_t micro_batches) {
  const auto time_of = [&](ProgramKind kind, double times) {
    Timeline timeline(machine, dtype, ranks);
    timeline.run(plans.program(kind));
    StepTime time = timeline.time();
    for (double* part : {&time.compute, &time.floor, &time.communication, &time.exposed, &time.sent_bytes}) {
      *part *= times;
    }
    return time;
  };
  const std::int64_t replays = std::max<std::int64_t>(1, (micro_batches + ranks - 1) / ranks);
  StepTime step = time_of(ProgramKind::closing, 1);
  if (replays > 1) {
    const StepTime more = time_of(ProgramKind::accumulate, static_cast<double>(replays - 1));
    step.compute += more.compute;
    step.floor += more.floor;
    step.communication += more.communication;
    step.exposed += more.exposed;
    step.sent_bytes += more.sent_bytes;
  }
  return step;
}

}  // namespace attamba
