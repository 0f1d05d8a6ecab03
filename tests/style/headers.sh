#!/bin/sh
# Fails when a header does not compile alone. Those that their own source file includes first are known to.
#
#   headers.sh TOP_FOLDER COMPILER RESPONSE_FILE [WITHOUT]
#
# The response file holds the compiler's options; WITHOUT names, as a pattern of grep, headers that need what is not installed.
top=$1 compiler=$2 options=$3 without=${4:-^$}
cd "$top" || exit 1
unproven() {
  while read -r header; do
    grep -m 1 '^#include' "${header%.h}.cpp" 2> /dev/null | grep -qF "\"$header\"" || echo "$header"
  done
}
find launch src data kernels comm -name '*.h' | grep -Ev "$without" | unproven | LC_ALL=C sort | xargs -P "$(nproc)" -I HEADER sh -c '
  "$1" @"$2" -fsyntax-only -include "$3" -x c++ /dev/null 2> "$4.$$" && rm -f "$4.$$" && exit 0
  echo "$3 does not compile alone:"
  head -n 8 "$4.$$"
  rm -f "$4.$$"
  exit 1' sh "$compiler" "$options" HEADER "$options.messages"
