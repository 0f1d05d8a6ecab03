#!/usr/bin/env bash
# Checks and measures everything on a GPU machine in under ten minutes: golden files, kernels against the CPU's, a sanitizer,
# benchmarks, PyTorch peers, a short training. A step that fails or takes too long does not stop the others. Results: a folder
# with the log and the numbers of every step, and report.json, which says for every goal whether it was reached.
#
#   tests/gpu_check.sh [--out FOLDER] [--device auto|cuda|cpu] [--budget SECONDS] [--only PATTERN]
#                      [--program FILE] [--kernels-check FILE] [--tokens FOLDER] [--python FILE]
#
# Without options: as in a package made by launch/package.sh, or the programs of build/cuda in a checkout, on the GPU if there is
# one. Without one, what needs none is checked on the CPU and the rest reported as not measured. --device cpu is the same on
# tiny sizes, to prove this script: its numbers say nothing. --only runs the steps whose names match the pattern (a regular
# expression).
#
# Exit code 0: every step did what it should; 1: some did not (speeds and curves in bfloat16 that miss their goal are reported,
# and fail nothing; nor does what is compiled at the end, with the time that is left).
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=gpu-check device=auto budget=540 only=. program="" kernels_check="" tokens="" python=python3
while (($# > 0)); do
  (($# > 1)) || { echo "gpu_check: $1 needs a value, or is no option; the head of this script explains them" >&2; exit 2; }
  case $1 in
    --out) out=$2 ;;
    --device) device=$2 ;;
    --budget) budget=$2 ;;
    --only) only=$2 ;;
    --program) program=$2 ;;
    --kernels-check) kernels_check=$2 ;;
    --tokens) tokens=$2 ;;
    --python) python=$2 ;;
    *) echo "gpu_check: no option $1; the head of this script explains them" >&2; exit 2 ;;
  esac
  shift 2
done
first_of() {
  local file
  for file in "$@"; do
    [[ -x $file && -f $file ]] && { realpath "$file"; return; }
  done
}
program=$(first_of "$program" "$root/attamba" "$root/build/cuda/attamba" "$root/build/release/attamba")
checks=("$kernels_check")  # the package's own and the checkout's need a GPU
[[ $device == cpu ]] || checks+=("$root/kernels_check" "$root/build/cuda/tests/gpu/kernels_check")
kernels_check=$(first_of "${checks[@]}")
[[ -n $program ]] || { echo "gpu_check: no program attamba here; name it with --program" >&2; exit 2; }
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
rm -rf "$out"/*.log "$out"/*.json "$out"/*.step "$out"/runs
[[ -z $tokens ]] || tokens=$(realpath "$tokens")
tokens=${tokens:-$root/tokens}
cd "$root" || exit 2

# Without a GPU, why there is none: what needs one is not measured.
no_gpu=""
if [[ $device == auto ]]; then
  device=cuda
  said=$("$program" verify --device cuda tests/golden/attamba_pseudo.h5 2>&1) ||
    no_gpu=$(sed -n 's/.*no GPU to compute on: //p; s/.*this program was built without CUDA.*/a program without CUDA/p' <<< "$said")
fi
if [[ -n $no_gpu ]]; then
  echo "gpu_check: no GPU ($no_gpu): checking what needs none, on the CPU"
  device=cpu kernels_check=""
fi

# What a package lists; in a checkout, what a program of that toolkit loads.
needed_libraries() {
  [[ ! -f $root/needs.txt ]] || { cat "$root/needs.txt"; return; }
  local toolkit files
  files=("$(dirname "$program")"/CMakeFiles/*/CMakeCUDACompiler.cmake)
  toolkit=$(sed -n 's/^set(CMAKE_CUDA_COMPILER_VERSION "\([0-9]*\)\..*/\1/p' "${files[0]}" 2> /dev/null)
  printf 'libcublasLt.so.%s\n' ${toolkit:-13 12}
  echo libnccl.so.2
}
# cuBLASLt and NCCL, where the system's loader does not find them: the toolkit's, or PyTorch's.
if [[ $device == cuda ]]; then
  while read -r needed; do
    # All of the list is read: one that grep leaves early ends ldconfig, and the pipe, with an error.
    ! ldconfig -p 2> /dev/null | grep -F "$needed" > /dev/null || continue
    found=""
    for folder in /usr/local/cuda*/lib64 /usr/local/cuda*/lib \
      $("$python" -c 'import glob, site, sys
for folder in site.getsitepackages() + [site.getusersitepackages()] + sys.path:
    print(*glob.glob(folder + "/nvidia/*/lib"), sep="\n")' 2> /dev/null); do
      if [[ -e $folder/$needed ]]; then
        export LD_LIBRARY_PATH=$folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
        found=$folder
        break
      fi
    done
    echo "gpu_check: $needed ${found:+found in }${found:-not found}"
  done < <(needed_libraries)
fi

# step NAME LIMIT COMMAND...: its output goes to NAME.log, what became of it to NAME.step. With may_be_cut=1, being stopped at its
# limit is no failure.
began=$(date +%s)
step() {
  local name=$1 limit=$2 left code start
  shift 2
  [[ $name =~ $only ]] || return 0
  left=$((budget - ($(date +%s) - began)))
  printf '%s\0' "$@" > "$out/$name.command"
  if ((left < 5)); then
    echo "skipped 0 $limit" > "$out/$name.step"
    echo "-- $name: skipped, the time is used up"
    return 0
  fi
  ((limit < left)) || limit=$left
  start=$(date +%s.%N)
  timeout -k 5 "$limit" "$@" > "$out/$name.log" 2>&1 < /dev/null
  code=$?
  [[ -z ${may_be_cut:-} || ! $code =~ ^(124|137)$ ]] || code=unfinished
  echo "$code $(awk -v a="$start" -v b="$(date +%s.%N)" 'BEGIN { print b - a }') $limit" > "$out/$name.step"
  if [[ $code == 0 ]]; then
    echo "-- $name: done"
  elif [[ $code == unfinished ]]; then
    echo "-- $name: not finished in $limit s"
  else
    echo "-- $name: exit code $code; the end of $name.log:"
    tail -n 5 "$out/$name.log" | sed 's/^/   /'
  fi
}
has() { command -v "$1" > /dev/null; }

environment() {
  date -u +%Y-%m-%dT%H:%M:%SZ
  uname -a
  "$program" --version
  grep -m 1 'model name' /proc/cpuinfo
  echo "$(nproc) processors"
  ! has nvidia-smi || nvidia-smi
  ! has nvidia-smi || nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem --format=csv
  "$python" -c 'import torch; print("torch", torch.__version__)' || true
  ! has compute-sanitizer || compute-sanitizer --version
}
export -f environment has
export program python

attamba62=configs/attamba_62m.toml transformer60=configs/transformer_60m.toml
if [[ $device == cuda ]]; then
  bench=(--train.device cuda --train.dtype bfloat16)
  short=16x1024 long=80x1024 lengths=1024,4096,16384,65536 tokens_a_call=65536 seconds=0.2
  models=(64x1024 8x8192 2x32768)
  curve_steps=200 curve_steps_float32=30 curve_length=256 train_steps=400 train_batch=16 train_length=1024
else
  bench=(--train.device cpu --model.vocab_size 300 --model.dim 32 --model.n_layers 2 --model.n_heads 2 --model.ffn_dim 48)
  short=2x64 long=4x64 lengths=64,128 tokens_a_call=128 seconds=0.01
  models=(2x64 1x128)
  curve_steps=20 curve_steps_float32=5 curve_length=64 train_steps=20 train_batch=2 train_length=64
fi
ssm=(--model.ssm.hidden 32 --model.ssm.state 16 --model.ssm.heads 2)
if [[ $device == cuda ]]; then
  ssm=()
fi
of_attamba=("${bench[@]}" "${ssm[@]}")

# Two kinds of result: what must be right ...
step environment 20 bash -c environment
step verify_float32 60 "$program" verify --device "$device" --dtype float32 tests/golden/*.h5
step verify_bfloat16 60 "$program" verify --device "$device" --dtype bfloat16 tests/golden/*.h5
small=()
[[ $device == cuda ]] || small=(--small --only rms_norm)
if [[ -n $kernels_check ]]; then
  step kernels 60 "$kernels_check" "${small[@]}" --json "$out/kernels.json"
fi
vocabulary=$("$program" data info "$tokens/train" 2> /dev/null | sed -n 's/^ *vocabulary[^0-9]*\([0-9]*\).*/\1/p' | head -n 1)
small_run=(train configs/quickstart.toml --data.train "$tokens/train" --data.valid "" --model.vocab_size "${vocabulary:-4096}"
  --data.sequence_length "$curve_length" --eval.every 0 --checkpoint.every 0 --run.resume never)
curve() { # DTYPE STEPS
  local warmup=$(($2 < 10 ? $2 : 10)) run
  run=("$program" "${small_run[@]}" --train.dtype "$1" --train.steps "$2" --optim.warmup "$warmup" --train.log_every 1)
  step "curve_cpu_$1" 60 "${run[@]}" --train.device cpu --run.folder "$out/runs/curve_cpu_$1"
  step "curve_device_$1" 30 "${run[@]}" --train.device "$device" --run.folder "$out/runs/curve_device_$1"
}
curve float32 "$curve_steps_float32"
curve bfloat16 "$curve_steps"
step compare 40 "$program" "${small_run[@]}" --train.dtype bfloat16 --train.steps 2 --optim.warmup 1 --train.device "$device" \
  --train.compare_cpu true --run.folder "$out/runs/compare"

# ... and how fast it is.
step step_short 30 "$program" bench step $attamba62 "${of_attamba[@]}" --train.micro_batch "${short%x*}" \
  --data.sequence_length "${short#*x}" --repeats 20 --json "$out/step_short.json"
step step_long 40 "$program" bench step $attamba62 "${of_attamba[@]}" --train.micro_batch "${long%x*}" \
  --data.sequence_length "${long#*x}" --repeats 10 --json "$out/step_long.json"
step bench_kernels 70 "$program" bench kernels $attamba62 "${of_attamba[@]}" --model.chunking.leading_tokens 16 \
  --train.micro_batch "${short%x*}" --data.sequence_length "${short#*x}" --lengths "$lengths" --tokens "$tokens_a_call" \
  --seconds "$seconds" --json "$out/bench_kernels.json"
for shape in "${models[@]}"; do
  for model in attamba transformer; do
    file=$attamba62 keys=("${of_attamba[@]}")
    [[ $model == attamba ]] || file=$transformer60 keys=("${bench[@]}")
    [[ $model == attamba || $device == cuda ]] || keys+=(--model.attn_dim 32)
    step "${model}_${shape#*x}" 25 "$program" bench step "$file" "${keys[@]}" --train.micro_batch "${shape%x*}" \
      --data.sequence_length "${shape#*x}" --repeats 5 --json "$out/${model}_${shape#*x}.json"
  done
done
train=("${of_attamba[@]}" --model.vocab_size "${vocabulary:-4096}")
step train 60 "$program" train $attamba62 "${train[@]}" --data.train "$tokens/train" --data.valid "$tokens/valid" \
  --data.sequence_length "$train_length" --train.micro_batch "$train_batch" --train.global_batch "$train_batch" \
  --train.steps "$train_steps" --optim.warmup $((train_steps / 10)) --optim.lr 1e-3 --train.log_every 5 --eval.windows 32 \
  --checkpoint.every $((train_steps / 2)) --run.resume never --run.folder "$out/runs/train"

# Tools and peers that may not be there. The sanitizer looks at this program's kernels: NVIDIA's own are not ours to mend, and its
# libraries ask CUDA for things that may be missing, which is no error either. Versions differ in how the filter is spelt.
if [[ $device == cuda ]] && has compute-sanitizer; then
  help=$(compute-sanitizer --help 2>&1)
  sanitizer=(compute-sanitizer --error-exitcode 99)
  for filter in --kernel-name --kernel-regex --filter; do
    [[ ! $help =~ $filter([^-a-z]|$) ]] || { sanitizer+=("$filter" kns=attamba); break; }
  done
  [[ $help != *--report-api-errors* ]] || sanitizer+=(--report-api-errors no)
  golden=tests/golden/attamba_cyclic_p8_l8.h5
  for tool in memcheck racecheck synccheck; do
    step "sanitizer_$tool" 50 "${sanitizer[@]}" --tool "$tool" "$program" verify --device cuda --dtype bfloat16 $golden
  done
  [[ -z $kernels_check ]] || step sanitizer_kernels 60 "${sanitizer[@]}" --tool memcheck "$kernels_check" --small
fi
if "$python" -c 'import torch' 2> /dev/null; then
  step torch_attention 120 "$python" tests/peers/torch_attention.py --device "$device" --lengths "$lengths" \
    --tokens "$tokens_a_call" --heads 8 --kv-heads 8 --head-dim 64 --chunk 8 --leading 16 --dtype bfloat16 --seconds "$seconds"
  torch_model=(tests/peers/torch_attamba.py --batch "${short%x*}" --sequence "${short#*x}" --dtype bfloat16 --device "$device"
    --chunk 8 --leading 8)
  if [[ $device == cuda ]]; then
    step torch_attamba 60 "$python" "${torch_model[@]}" --steps 20
    step torch_transformer 40 "$python" "${torch_model[@]}" --model transformer --steps 20
    # The first compilation of a whole model takes minutes.
    for model in attamba transformer; do
      may_be_cut=1 step "torch_${model}_compiled" "$budget" "$python" "${torch_model[@]}" --model $model --steps 20 --compile
    done
  else
    step torch_attamba 100 "$python" "${torch_model[@]}" --steps 1 --warmup 1
  fi
fi

"$python" tests/gpu_report.py "$out" "$device" "$(($(date +%s) - began))" "$no_gpu"
