// A step's time predicted from what its operations say of themselves and from a machine's few numbers (docs/plan.md).
#pragma once

#include "src/train/machine.h"
#include "src/train/programs.h"

namespace attamba {

struct StepTime {
  double compute = 0;        ///< operations of the rank that computes most
  double floor = 0;          ///< of these, what the machine's best speeds would take
  double communication = 0;  ///< the network is in use
  double exposed = 0;        ///< ... while nothing is computed: operations wait for it
  double sent_bytes = 0;     ///< by each rank, in rings
  double total() const { return compute + exposed; }
};

/// A step of `micro_batches` over all ranks: the replays of a rank that has most of them, with collectives that start where
/// the programs start them, run one after another beside the operations, and are waited for where the programs wait.
StepTime predict_step(const ProgramPlans& plans, const Machine& machine, DType dtype, int ranks, std::int64_t micro_batches);

/// Calls body(node, input types, output types) for everything that a program runs, in order.
template <class Body>
void for_each_op(const ProgramPlans::Planned& program, const Body& body) {
  for (const int step : program.plan.steps) {
    const Tape::Node& node = program.tape.nodes()[static_cast<std::size_t>(step)];
    std::vector<TensorType> inputs, outputs;
    for (const Value value : node.inputs) {
      inputs.push_back(program.tape.type(value));
    }
    for (const Value value : node.outputs) {
      outputs.push_back(program.tape.type(value));
    }
    body(node, inputs, outputs);
  }
}

}  // namespace attamba
