#!/usr/bin/env bash
# Installs the Debian packages that are missing, configures a build folder and builds in it. Run it as often as you like: what is
# there already is left alone.
#
#   launch/setup.sh [--preset NAME] [--with-slurm] [TARGET...]
#
# NAME is from CMakePresets.json, cpu-release by default; no TARGET: everything. --with-slurm also installs SLURM's daemons, of
# which tests/slurm starts its own.
#
# ATTAMBA_JOBS sets the number of compilers at a time (default: one per core). ATTAMBA_CUDA=ON makes it an error when there is no
# CUDA toolkit, OFF leaves the GPU's part out; otherwise it is built where the toolkit is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '%s\n' "$*" >&2; }
fail() { say "setup: $*"; exit 1; }

preset=cpu-release slurm=()
while [[ ${1:-} == --* ]]; do
  case $1 in
    --preset) preset=${2:?setup: --preset needs a name}; shift 2 ;;
    --with-slurm) slurm=(slurmctld slurmd slurm-client munge); shift ;;
    *) fail "no option $1; the head of launch/setup.sh explains the options" ;;
  esac
done

# A tool counts as present when it can be called, wherever it came from; a library when its Debian package is installed.
tools=(g++:g++ cmake:cmake ninja:ninja-build ccache:ccache pkg-config:pkg-config mpirun:openmpi-bin git:git)
# oneDNN's CMake package looks for OpenCL, which its Debian package does not bring along.
libraries=(libopenmpi-dev libhdf5-dev libopenblas-dev libdnnl-dev ocl-icd-opencl-dev libsentencepiece-dev libzstd-dev zlib1g-dev libcli11-dev
           libtomlplusplus-dev nlohmann-json3-dev libgtest-dev libgmock-dev libboost-context-dev "${slurm[@]}")

missing_packages() {
  local entry
  for entry in "${tools[@]}"; do
    command -v "${entry%%:*}" > /dev/null || echo "${entry#*:}"
  done
  for entry in "${libraries[@]}"; do
    dpkg-query -W -f='${db:Status-Status}' "$entry" 2> /dev/null | grep -qx installed || echo "$entry"
  done
}

install_packages() {
  local packages=("$@") become=() log
  if [[ $(id -u) -ne 0 ]]; then
    command -v sudo > /dev/null || fail "these packages are missing and need root or sudo to install: ${packages[*]}"
    become=(sudo)
    sudo -n true 2> /dev/null || [[ -t 0 ]] || fail "sudo wants a password, but nobody can type it here; missing: ${packages[*]}"
  fi
  say "setup: installing ${packages[*]}"
  log=$(mktemp)
  # `env` carries the variable through sudo.
  if ! "${become[@]}" env DEBIAN_FRONTEND=noninteractive sh -c '
      apt-get -qq update
      apt-get -qq -y -o Dpkg::Use-Pty=0 install --no-install-recommends "$@"' sh "${packages[@]}" > "$log" 2>&1; then
    grep -E '^[EW]:' "$log" >&2 || tail -n 20 "$log" >&2
    rm -f "$log"
    fail "apt-get could not install ${packages[*]}"
  fi
  rm -f "$log"
}

if command -v apt-get > /dev/null && command -v dpkg-query > /dev/null; then
  mapfile -t missing < <(missing_packages)
  if ((${#missing[@]} > 0)); then
    install_packages "${missing[@]}"
    hash -r
  fi
else
  command -v cmake > /dev/null || fail "not a Debian or Ubuntu system: install the counterparts of ${tools[*]#*:} ${libraries[*]}"
  say "setup: not a Debian or Ubuntu system, so nothing is installed; going on with what is here"
fi

# The CPU kernels are compiled for any x86-64 processor with AVX2 and FMA; others get a build for themselves.
architecture=()
if [[ $(uname -m) != x86_64 ]] || ! grep -qw avx2 /proc/cpuinfo || ! grep -qw fma /proc/cpuinfo; then
  architecture=(-DATTAMBA_CPU_ARCH=native)
fi

cuda=()
[[ -z ${ATTAMBA_CUDA:-} ]] || cuda=("-DATTAMBA_CUDA=$ATTAMBA_CUDA")

mkdir -p build
log=build/configure-$preset.log
if ! cmake --preset "$preset" "${architecture[@]}" "${cuda[@]}" > "$log" 2>&1; then
  grep -A 4 'CMake Error' "$log" >&2 || cat "$log" >&2
  fail "cmake could not configure; everything it said is in $log"
fi
sed -n '/^ *built without CUDA/,/^$/p' "$log" >&2
targets=()
if (($# > 0)); then
  targets=(--target "$@")
fi
say "setup: building ($preset)"
cmake --build --preset "$preset" --parallel "${ATTAMBA_JOBS:-$(nproc)}" "${targets[@]}" >&2 || fail "the build failed, see above"
