#!/usr/bin/env bash
# Makes a folder (and an archive of it) that runs on another x86-64 Linux machine without anything of this project's packages:
# the program, its shared libraries, configurations, golden files, kernels_check, tests/gpu_check.sh, peers, and a few tokens to
# train on. Built without MPI. It carries neither libc nor NVIDIA's libraries, and says at the end where it looks for them.
#
#   launch/package.sh [--architectures LIST] [--cpu] [--build FOLDER] [--tokens FOLDER] [OUTPUT]
#
#   --architectures LIST  GPUs to build for (CMAKE_CUDA_ARCHITECTURES), 90a-real by default: H100 and H200
#   --cpu                 a program without the GPU backend
#   --build FOLDER        takes the program from a build folder that is made already, or builds in that folder
#   --tokens FOLDER       a data set of `attamba data prepare`; without, one is made from text on this machine
#   OUTPUT                the folder to make, build/package/attamba by default; OUTPUT.tar.gz is the archive
#
# ATTAMBA_JOBS sets the number of compilers at a time (default: one per core).
set -euo pipefail

say() { printf 'package: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

architectures=90a-real cuda=ON build="" tokens="" output=""
while (($# > 0)); do
  case $1 in
    --architectures | --build | --tokens)
      (($# > 1)) || fail "$1 needs a value"
      case $1 in
        --architectures) architectures=$2 ;;
        --build) build=$(realpath -m "$2") ;;
        --tokens) tokens=$(realpath -e "$2") || fail "$2: no such folder" ;;
      esac
      shift 2 ;;
    --cpu) cuda=OFF; shift ;;
    -*) fail "no option $1; the head of launch/package.sh explains the options" ;;
    *) [[ -z $output ]] || fail "one OUTPUT only, got $output and $1"; output=$(realpath -m "$1"); shift ;;
  esac
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
output=${output:-$PWD/build/package/attamba}
build=${build:-$PWD/build/package-$([[ $cuda == ON ]] && echo cuda || echo cpu)}
most=$((64 << 20))

[[ ! -e $output || -e $output/PACKAGE.txt ]] || fail "$output exists and is no package; move it away"

mkdir -p "$(dirname "$output")"
say "building in $build"
programs=(attamba)
[[ $cuda == OFF ]] || programs+=(kernels_check)
# DT_RPATH, unlike the newer DT_RUNPATH, also tells where the libraries' own libraries are.
cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DATTAMBA_MPI=OFF -DATTAMBA_CUDA=$cuda \
  "-DCMAKE_CUDA_ARCHITECTURES=$architectures" -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON '-DCMAKE_INSTALL_RPATH=$ORIGIN/lib' \
  -DCMAKE_EXE_LINKER_FLAGS=-Wl,--disable-new-dtags > "$output.log" 2>&1 || { cat "$output.log" >&2; fail "cmake could not configure"; }
cmake --build "$build" --parallel "${ATTAMBA_JOBS:-$(nproc)}" --target "${programs[@]}" >&2
rm -f "$output.log"

rm -rf "$output"
mkdir -p "$output/lib" "$output/tests"
for program in "${programs[@]}"; do
  install -s "$(find "$build" -type f -name "$program" -perm -u+x | head -n 1)" "$output/$program"
done

# Shared libraries, each under the name it is asked for. libc's family, the driver, cuBLAS and NCCL stay where they are.
stays='^(libc|libm|libdl|libpthread|librt|libresolv|libutil|libnss_[a-z]+|libcuda|libnvidia-[a-z]+|libcublas|libcublasLt|libnccl)\.so'
libraries_of() {
  env -i PATH=/usr/bin:/bin ldd "$@" | sed 's/=> not found/=> missing/' | awk '$2 == "=>" { print $1, $3 }' | grep -Ev "$stays" | sort -u
}
libraries_of "${programs[@]/#/$output/}" | while read -r name path; do
  [[ $path != missing ]] || fail "$name is missing here already"
  [[ $path == "$output"/* ]] || install -m 644 "$path" "$output/lib/$name"
done
strip --strip-unneeded "$output"/lib/*

cp -r configs "$output/configs"
cp -r tests/golden tests/peers tests/gpu_check.sh tests/gpu_report.py "$output/tests/"
rm -rf "$output"/tests/peers/__pycache__

if [[ -z $tokens ]]; then
  say "preparing tokens from text on this machine"
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  mkdir "$work/text"
  launch/text_on_this_machine.sh 4000000 | split -C 64k - "$work/text/part-" --additional-suffix=.txt
  "$output/attamba" data prepare "$work/text" --output "$work/tokens" --vocab-size 4096 --vocab-sample 4 --valid-fraction 0.05 >&2
  tokens=$work/tokens
fi
cp -r "$tokens" "$output/tokens"

libc=$(objdump -T "$output"/attamba "$output"/lib/* 2> /dev/null | grep -o 'GLIBC_[0-9.]*' | sort -uV | tail -n 1 | tr _ ' ')
if [[ $cuda == ON ]]; then
  blas=libcublasLt.so.$(sed -n 's/^set(CMAKE_CUDA_COMPILER_VERSION "\([0-9]*\)\..*/\1/p' "$build"/CMakeFiles/*/CMakeCUDACompiler.cmake)
  printf '%s\n' "$blas" libnccl.so.2 > "$output/needs.txt"
fi
{
  "$output/attamba" --version
  echo "made $(date -u +%Y-%m-%dT%H:%MZ) for $([[ $cuda == ON ]] && echo "GPUs $architectures and ")x86-64 processors with AVX2"
  echo
  echo "Expected on the machine where it runs:"
  echo "  $libc or newer (ldd --version), a Linux kernel of its time"
  if [[ $cuda == ON ]]; then
    echo "  NVIDIA's driver (libcuda.so.1), found by the system's loader"
    echo "  $blas in the loader's path (LD_LIBRARY_PATH), in /usr/local/cuda/lib64, /usr/local/cuda/lib or"
    echo "    /usr/lib/x86_64-linux-gnu; PyTorch brings one along, which tests/gpu_check.sh finds by itself"
    echo "  for several GPUs: libnccl.so.2 (package libnccl2, or PyTorch's) in the same places"
  fi
  echo
  echo "tests/gpu_check.sh checks and measures everything in under ten minutes and writes report.json."
} > "$output/PACKAGE.txt"

# Elsewhere, and without this machine's settings, it must find all of these beside itself.
elsewhere=$(mktemp -d)
cp -r "$output" "$elsewhere/package"
outside=$(libraries_of "${programs[@]/#/$elsewhere/package/}" | grep -v " $elsewhere/package/" || true)
env -i PATH=/usr/bin:/bin "$elsewhere/package/attamba" --version > /dev/null || outside+=" (the program does not start)"
rm -rf "$elsewhere"
[[ -z $outside ]] || fail "the package does not hold everything that it needs: $outside"

tar -C "$(dirname "$output")" --sort=name --owner=0 --group=0 --numeric-owner -cf - "$(basename "$output")" | gzip -9 > "$output.tar.gz"
size=$(stat -c %s "$output.tar.gz")
cat "$output/PACKAGE.txt"
echo
echo "$output: $(du -sh "$output" | cut -f 1), of which libraries $(du -sh "$output/lib" | cut -f 1)"
echo "$output.tar.gz: $((size >> 20)) MiB"
((size <= most)) || fail "the archive is larger than $((most >> 20)) MiB; build for fewer architectures, or take fewer tokens"
