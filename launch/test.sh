#!/usr/bin/env bash
# Sets up, builds and runs every test. The last thing printed is ctest's summary; the exit code is ctest's.
#
#   launch/test.sh [--sanitize] [CTEST ARGUMENTS...]
#
#   launch/test.sh -R chunk_scan         only tests whose name matches
#   launch/test.sh --sanitize            all but the tests of style, under AddressSanitizer and UndefinedBehaviorSanitizer
#   ATTAMBA_CUDA=ON launch/test.sh       fails where there is no CUDA toolkit; without it, tests that need one are skipped
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

preset=ci
selection=()
if [[ ${1:-} == --sanitize ]]; then
  preset=cpu-debug
  selection=(-E '^style\.')
  shift
fi
# SLURM's daemons, on machines where root tests and where installing them starts no services. Others skip that test without them.
slurm=()
[[ $(id -u) -ne 0 || -d /run/systemd/system ]] || slurm=(--with-slurm)
launch/setup.sh --preset "$preset" "${slurm[@]}"

# Tests of kernels use threads of their own: two each is enough to find what threads break, and leaves room for other tests.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
cores=$(nproc)
exec ctest --preset "$preset" --parallel $((cores < 8 ? cores : 8)) "${selection[@]}" "$@"
