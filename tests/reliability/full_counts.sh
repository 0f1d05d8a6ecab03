#!/bin/sh
# Runs the tests behind what is promised of runs (docs/reliability.md) with full numbers of trials, which takes hours; CI runs
# samples of them. At the end it prints a table; the exit code is 0 when nothing has failed, 2 when the command is mistaken.
#
#   tests/reliability/full_counts.sh BUILD_FOLDER [NAME...]
#
#   tests/reliability/full_counts.sh build/release                       all
#   tests/reliability/full_counts.sh build/release signals rank-counts   only these; without a folder it lists the names
set -u

build=${1:-}
[ $# -eq 0 ] || shift
chosen=" $* "
known="" mode=list

# row PROMISE NAME TRIALS PROGRAM ARGUMENTS...: TRIALS, which `times` multiplies in the table, reach it as ATTAMBA_TRIALS.
times=1
row() {
  promise=$1 name=$2 trials=$3 program=$build/tests/$4
  shift 4
  if [ "$mode" = list ]; then
    known="$known $name"
    return
  fi
  case $chosen in
    "  " | *" $name "*) ;;
    *) return ;;
  esac
  log=$logs/$name.log
  began=$(date +%s)
  ATTAMBA_TRIALS=$trials "$program" "$@" > "$log" 2>&1 < /dev/null
  code=$?
  failed=$(grep -c -e ': Failure$' -e '^FAILED: ' "$log")
  # Also what ends without a word, and a filter that fits no test.
  if [ "$failed" -eq 0 ] && { [ $code -ne 0 ] || grep -q 'PASSED  \] 0 tests' "$log"; }; then
    failed=1
  fi
  ran=$(awk '$1 == "all" { print $2 }' "$log") # attamba_faults counts for itself
  line=$(printf '%-8s %-15s %8s %8s %8s' "$promise" "$name" "${ran:-$((trials * times))}" "$failed" "$(($(date +%s) - began))")
  echo "$line"
  table="$table$line
"
  all_failed=$((all_failed + failed))
}

# faults PROMISE NAME TRIALS KINDS: trials of those kinds of faults.
faults() {
  row "$1" "$2" "$3" faults/attamba_faults --jobs 2 --trials "$3" --kinds "$4"
}

rows() {
  faults P1,P17 kills 1000 kill-rank,kill-launcher,kill-job,call-kill,call-torn
  row P1 kill-sweep 0 faults/attamba_faults --jobs 2 --sweep 2
  row P2 rank-counts 36 reliability/test_reliability --gtest_filter='RankCounts.ARunSavedByAnyNumber*'
  times=3 # files of a checkpoint
  row P3 mutations 3334 test_train --gtest_filter='Checkpoints.EveryFlippedOrMissingByteIsFound'
  times=1
  faults P3,P14 damage 200 flip-bit,truncate,remove-file,all-damaged
  faults P5 disk 500 call-error,call-short,disk-full
  row P5 error-sweep 0 faults/attamba_faults --jobs 2 --sweep 2 --sweep-with eio
  faults P6 leftovers 100 leftover
  row P8 signals 200 reliability/test_reliability --gtest_filter='Signals.EndEveryRun*'
  row P9 stopped-ranks 100 reliability/test_reliability --gtest_filter='Hangs.AStoppedRank*'
  row P10 slow-ranks 100 reliability/test_reliability --gtest_filter='SlowRanksOfARun.*'
  row P12 shards 1 test_data --gtest_filter='ManyShards.*'
  row P13 epochs 1000 test_data --gtest_filter='Epochs.*'
}

rows
if [ -z "$build" ]; then
  echo "usage: full_counts.sh BUILD_FOLDER [NAME...]; names:$known" >&2
  exit 2
fi
if [ ! -d "$build/tests" ]; then
  echo "full_counts: '$build' is no build folder: it has no tests" >&2
  exit 2
fi
for name in "$@"; do
  case "$known " in
    *" $name "*) ;;
    *)
      echo "full_counts: no test '$name'; there are:$known" >&2
      exit 2
      ;;
  esac
done

export OMP_WAIT_POLICY=passive
logs=$(mktemp -d) || exit 1
mode=run table="" all_failed=0
rows
printf '\n%-8s %-15s %8s %8s %8s\n%s' promise test trials failed seconds "$table"
echo "outputs: $logs"
[ "$all_failed" -eq 0 ]
