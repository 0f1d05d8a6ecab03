#!/bin/bash
# tests/gpu_check.sh with programs that stand for those of a GPU machine: what it asks them for, and what it makes of their end.
#   check_stubs.sh FOLDER PYTHON
set -eu
folder=$1 python=$2
top=$(cd "$(dirname "$0")/../.." && pwd)
rm -rf "$folder"
mkdir -p "$folder/bin" "$folder/packages/nvidia/any/lib"
touch "$folder"/packages/nvidia/any/lib/{libcublasLt.so.12,libcublasLt.so.13,libnccl.so.2}
stub() { cat > "$folder/bin/$1" && chmod +x "$folder/bin/$1"; }
stub attamba <<< '#!/bin/sh'
stub ldconfig <<< '#!/bin/sh'
stub python << STUB
#!/bin/sh
case "\$*" in
  *"import torch"*) ;;
  *--compile*) exec sleep 60 ;;
  *) exec "$python" "\$@" ;;
esac
STUB
check() { # OPTIONS...
  PATH=$folder/bin:$PATH PYTHONPATH=$folder/packages "$top/tests/gpu_check.sh" --device cuda --out "$folder/out" \
    --program "$folder/bin/attamba" --python "$folder/bin/python" "$@" 2>&1 | tee "$folder/said"
}
expect() { grep -E -e "$1" "${2:-$folder/said}" > /dev/null || { echo "check_stubs: no '$1' in ${2:-what it said}"; exit 1; }; }
refuse() { ! grep -E -e "$1" "${2:-$folder/said}" || { echo "check_stubs: '$1' in ${2:-what it said}"; exit 1; }; }

# Libraries of a checkout, which has no list of them: found in packages; or known to the loader, whose list is longer than a pipe.
check --only none
expect 'libcublasLt.so.1[23] found in ' && expect 'libnccl.so.2 found in '
stub ldconfig <<< $'#!/bin/sh\necho "libcublasLt.so.12 libcublasLt.so.13 libnccl.so.2"; seq 200000'
check --only none
refuse 'libcublasLt|libnccl'

# The sanitizer looks at this program's kernels, however its version spells that.
for spelt in --kernel-name --kernel-regex --filter; do
  stub compute-sanitizer <<< "#!/bin/sh
[ \"\$1\" != --help ] || { echo '  $spelt arg  of kernels'; echo '  --kernel-name-exclude arg'; echo '  --report-api-errors arg'; exit; }
echo asked for \"\$@\""
  check --only sanitizer_racecheck
  expect "$spelt kns=attamba --report-api-errors no --tool racecheck" "$folder/out/sanitizer_racecheck.log"
done

# What is compiled at the end may be cut.
check --only torch_attamba_compiled --budget 6
expect 'torch_attamba_compiled: not finished' && expect '0 failed, not finished: torch_attamba_compiled'

# Curves in bfloat16 that part are measured; in float32, or without numbers, they are wrong.
curve() { # DTYPE DEVICE'S LOSS
  mkdir -p "$folder/curves/runs/curve_cpu_$1" "$folder/curves/runs/curve_device_$1"
  for step in $(seq 60); do echo "{\"step\": $step, \"loss\": 2.0}"; done > "$folder/curves/runs/curve_cpu_$1/metrics.jsonl"
  for step in $(seq 60); do echo "{\"step\": $step, \"loss\": $2}"; done > "$folder/curves/runs/curve_device_$1/metrics.jsonl"
}
report() { "$python" "$top/tests/gpu_report.py" "$folder/curves" cuda 1 > "$folder/said"; }
curve float32 2.0 && curve bfloat16 2.5
report
expect 'bfloat16, largest relative difference, means over 50 +0.25 +< 0.001 +MISSED'
curve bfloat16 null
! report || { echo "check_stubs: losses that are no numbers pass"; exit 1; }
curve float32 2.5 && curve bfloat16 2.0
! report || { echo "check_stubs: float32 may differ"; exit 1; }
