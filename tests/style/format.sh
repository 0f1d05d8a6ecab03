#!/bin/sh
# Fails when a tracked C++ file is not formatted as .clang-format says; exit code 77 (skipped) where clang-format is absent.
#
#   format.sh [TOP_FOLDER]
cd "${1:-.}" || exit 1
command -v clang-format > /dev/null || { echo "clang-format is not installed"; exit 77; }
git rev-parse --is-inside-work-tree > /dev/null 2>&1 || { echo "not a git checkout"; exit 77; }
git ls-files -z --cached -- '*.h' '*.cuh' '*.cpp' '*.cu' | xargs -0 sh -c '
  for file; do [ -e "$file" ] && printf "%s\0" "$file"; done' sh | xargs -0 clang-format --dry-run --Werror && echo "all files are formatted"
