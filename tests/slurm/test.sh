#!/usr/bin/env bash
# Training on a real SLURM of several nodes on this machine: jobs that are requeued, run out of time or lose a node must end with
# the weights of a run that nothing happened to. Exit code 77 (skipped) where SLURM's daemons are not installed or we are not root.
#
#   test.sh ATTAMBA FAULTS.SO [SCENARIO...]    scenarios: limit pmix mpirun tcp requeue node
set -u
attamba=$(realpath "$1") faults=$(realpath "$2")
shift 2
scenarios=("$@")
((${#scenarios[@]} > 0)) || scenarios=(limit pmix mpirun tcp requeue node)
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/cluster.sh"

why=$(why_no_cluster)
[[ -z $why ]] || { echo "skipped: $why"; exit 77; }

work=$(mktemp -d "${TMPDIR:-/tmp}/attamba-slurm-XXXXXX")
failures=0
cleanup() {
  stop_cluster
  rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

# Two "nodes" share this machine's name and memory, so ranks must not take each other for neighbours.
export OMPI_MCA_btl=tcp,self OMPI_MCA_pml=ob1 OMPI_MCA_btl_tcp_if_include=lo OMPI_MCA_mpi_yield_when_idle=1
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export ATTAMBA_INTERFACE=lo OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive

settings=(--model.vocab_size 300 --model.dim 32 --model.n_layers 2 --model.n_heads 2 --model.ffn_dim 48 --model.ssm.hidden 16
          --model.ssm.state 8 --model.ssm.heads 2 --model.chunking.size 4 --model.chunking.leading_tokens 3
          --data.sequence_length 24 --optim.warmup 2 --train.micro_batch 1 --train.global_batch 4 --train.deterministic true
          --train.log_every 1 --checkpoint.keep 2 --data.train "$work/data/train")

words=(the river ran past seven old mills and a bridge of stone)
RANDOM=3
for ((i = 0; i < 60; i++)); do
  text=
  for ((j = 0; j < 120; j++)); do text+="${words[RANDOM % 12]} "; done
  echo "{\"text\": \"$text\"}"
done > "$work/text.jsonl"
"$attamba" data prepare "$work/text.jsonl" -o "$work/data" --vocab-size 300 --valid-fraction 0.1 > "$work/prepare.log" 2>&1 ||
  { cat "$work/prepare.log"; exit 1; }

checksum() { grep -hoE '"state_crc32c": ?[^,]*' "$1/checkpoints/step-$(printf %09d "$2")/manifest.json" 2> /dev/null | head -n 1; }
logged_step() { tail -n 1 "$1/metrics.jsonl" 2> /dev/null | grep -oE '"step":[0-9]+' | cut -d: -f2; }
# The same run on this process alone. Long ones are computed once.
reference() {
  local steps=$1 folder=$work/reference-$1
  [[ -d $folder ]] || "$attamba" train "${settings[@]}" --train.steps "$steps" --checkpoint.every 0 --run.folder "$folder" \
    > "$work/reference.log" 2>&1 || cat "$work/reference.log" >&2
  checksum "$folder" "$steps"
}

# submit NAME STEPS EVERY OPTIONS...: sets `job` and `run`. With `slow` set every logged step takes so many milliseconds, of which
# the processor has none.
slow=0
submit() {
  local name=$1 steps=$2 every=$3 more=()
  shift 3
  run=$work/$name
  ((slow == 0)) || more=(LD_PRELOAD="$faults" ATTAMBA_FAULT_KIND=delay ATTAMBA_FAULT_AT=1 ATTAMBA_FAULT_COUNT=0
                         ATTAMBA_FAULT_DELAY=$slow ATTAMBA_FAULT_FOLDER="$run/metrics.jsonl")
  job=$(env "${more[@]}" "$attamba" submit "${settings[@]}" --train.steps "$steps" --checkpoint.every "$every" --run.folder "$run" \
    --nodes 2 --tasks 2 "$@" 2>&1 | tee "$work/$name.submit" | grep -oE 'Submitted batch job [0-9]+' | grep -oE '[0-9]+')
  [[ -n $job ]] || { cat "$work/$name.submit"; return 1; }
}

# wait_for SECONDS COMMAND...: until it succeeds.
wait_for() {
  local end=$((SECONDS + $1))
  shift
  until "$@"; do
    ((SECONDS < end)) || return 1
    sleep 0.2
  done
}
in_state() { [[ " $2 " == *" $(job_state "$1") "* ]]; }
has_logged() { (($(logged_step "$1" || true) + 0 >= $2)) 2> /dev/null; }

# expect NAME STEPS STARTS TEXT...: the job completes, as the reference does, in so many starts, and says these things.
expect() {
  local name=$1 steps=$2 starts=$3 problem= output text found
  shift 3
  output=$run.slurm/$job.out
  wait_for 120 in_state "$job" "COMPLETED FAILED CANCELLED TIMEOUT NODE_FAIL" || problem="not at its end"
  [[ $(job_state "$job") == COMPLETED ]] || problem+=" state $(job_state "$job")"
  [[ -n $(checksum "$run" "$steps") && $(checksum "$run" "$steps") == "$(reference "$steps")" ]] ||
    problem+=" weights: $(checksum "$run" "$steps"), alone $(reference "$steps")"
  found=$(grep -c 'train.sbatch: job .* start' "$output")
  ((found >= starts)) || problem+=" $found starts, expected $starts"
  for text in "$@"; do
    grep -qF -- "$text" "$output" || problem+=" does not say \"$text\""
  done
  if [[ -n $problem ]]; then
    failures=$((failures + 1))
    echo "FAILED $name:$problem"
    tail -n 40 "$output"
    tail -n 10 "$cluster/slurmctld.log"
  else
    echo "passed $name: $found starts, after $SECONDS s in all"
  fi
}

scenario_pmix() {
  submit pmix 30 10 --launcher pmix && expect pmix 30 1 "--mpi=pmix" "4 ranks"
}
scenario_mpirun() {
  submit mpirun 30 10 --launcher mpirun && expect mpirun 30 1 "mpirun -np 4" "4 ranks"
}
scenario_tcp() {
  export ATTAMBA_RENDEZVOUS=file:$work/rendezvous
  submit tcp 30 10 --launcher tcp && expect tcp 30 1 "--mpi=none" "TCP, 4 ranks"
  unset ATTAMBA_RENDEZVOUS
}
# Preemption by hand: SLURM ends the job and takes it back into the queue.
scenario_requeue() {
  slow=50
  submit requeue 200 0 --launcher pmix || return
  wait_for 60 has_logged "$run" 20 || echo "no step within 60 s"
  scontrol requeue "$job"
  expect requeue 200 2 "SLURM ends this job" "resuming after step"
}
# SLURM looks at its clock twice a minute, so the warning comes within 30 s of the start, and the first job never gets to the end.
# Other scenarios run meanwhile.
scenario_limit() {
  slow=60
  submit limit 600 0 --launcher pmix --time 1 --warning 58 || return
  limit_job=$job
}
end_of_limit() {
  job=$limit_job run=$work/limit
  expect limit 600 2 "back into the queue" "resuming after step"
}
# A node goes without a word; a third one takes its place.
scenario_node() {
  slow=50
  submit node 200 20 --launcher pmix || return
  wait_for 60 has_logged "$run" 50 || echo "no step within 60 s"
  kill_node n2
  expect node 200 2 "resuming after step"
}

start_cluster "$work/cluster" 3 || exit 1
limit_job=
for scenario in "${scenarios[@]}"; do
  slow=0
  [[ $scenario != node || -z $limit_job ]] || { end_of_limit; limit_job=; }
  "scenario_$scenario" || failures=$((failures + 1))
done
[[ -z $limit_job ]] || end_of_limit
stop_cluster
left=$(cluster_processes)
[[ -z $left ]] || { echo "FAILED: processes left behind: $left"; failures=$((failures + 1)); }
echo "${#scenarios[@]} scenarios, $failures failures"
((failures == 0))
