#!/usr/bin/env bash
# Proves the emulator and its tests: plants one mistake at a time in a copy of a kernel, and expects its tests to fail.
#
#   tests/simt/mutants.sh [--build FOLDER] [PATTERN]   mutants whose names match, a regular expression; without one all
#   tests/simt/mutants.sh --apply                      only whether every mutant of the list still applies, and its tests exist
#
# mutants.txt lists the mistakes and says how to add one. Needs an up-to-date test_simt (build/release, or --build): of a mutant
# only the named sources are compiled, into a temporary folder, and linked in front of the build's own. The checkout and the
# build stay as they are. Exit code 0: all were caught; 1: some were missed; 2: the list or the build is wrong.
set -uo pipefail

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
list=$top/tests/simt/mutants.txt
build=$top/build/release pattern=. apply_only=false
while (($# > 0)); do
  case $1 in
    --apply) apply_only=true ;;
    --build) build=$(cd "$2" && pwd) && shift ;;
    -*) echo "mutants: no option $1; the head of this script explains them" >&2; exit 2 ;;
    *) pattern=$1 ;;
  esac
  shift
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

fail() {
  echo "mutants: $*" >&2
  exit 2
}

# Prints FILE with the one occurrence of the text $old replaced by $new; fails when there is none, or more than one.
mutate() {
  old=$old new=$new awk '
    BEGIN {
      old = ENVIRON["old"]; new = ENVIRON["new"]
      gsub(/\\n/, "\n", old); gsub(/\\n/, "\n", new)
    }
    { text = text $0 "\n" }
    END {
      at = index(text, old)
      if (at == 0 || old == new || index(substr(text, at + 1), old) != 0) exit 1
      printf "%s%s%s", substr(text, 1, at - 1), new, substr(text, at + length(old))
    }' "$1"
}

# The list, one mutant per element of each array.
names=() files=() olds=() news=() filters=()
while IFS= read -r line; do
  [[ $line == '#'* || -z $line ]] && continue
  fields=()
  while [[ $line == *' | '* ]]; do
    fields+=("${line%%' | '*}")
    line=${line#*' | '}
  done
  fields+=("$line")
  ((${#fields[@]} == 5)) || fail "${fields[0]} has ${#fields[@]} fields, not 5"
  [[ ${fields[1]} == *.cu* ]] || fail "${fields[0]}: no source is compiled with ${fields[1]}"
  names+=("${fields[0]}") files+=("${fields[1]}") olds+=("${fields[2]}") news+=("${fields[3]}") filters+=("${fields[4]}")
done < "$list"
[[ -z $(printf '%s\n' "${names[@]}" | sort | uniq -d) ]] || fail "two mutants of one name: $(printf '%s\n' "${names[@]}" | sort | uniq -d)"

stale=0
for i in "${!names[@]}"; do
  old=${olds[i]} new=${news[i]}
  [[ $new == - ]] && new=
  if ! mutate "$top/${files[i]%% *}" > /dev/null; then
    echo "${names[i]}: ${files[i]%% *} does not hold this text exactly once: $old" >&2
    stale=$((stale + 1))
  fi
done
((stale == 0)) || fail "$stale of ${#names[@]} mutants do not apply: mend tests/simt/mutants.txt"
if [[ -x $build/tests/simt/test_simt ]]; then
  while read -r filter; do
    [[ $("$build/tests/simt/test_simt" --gtest_filter="$filter" --gtest_list_tests) == *$'\n  '* ]] || fail "no test is called $filter"
  done < <(printf '%s\n' "${filters[@]}" | tr ':' '\n' | sort -u)
fi
if $apply_only; then
  echo "all ${#names[@]} mutants apply"
  exit 0
fi

selected=()
for i in "${!names[@]}"; do
  [[ ${names[i]} =~ $pattern ]] && selected+=("$i")
done
((${#selected[@]} > 0)) || fail "no mutant is called like $pattern"

# How the build makes a file: its command, of a chain of them the one that writes it.
command_of() {
  ninja -C "$build" -t commands "$1" | tail -n 1 | sed 's/ && /\n/g' | grep -F -- " -o $1 "
}
program=tests/simt/test_simt
link=$(command_of $program) || fail "no $program in $build: configure and build it first (cmake --build --preset ci)"
[[ -x $build/$program ]] || fail "$program is not built in $build"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} OMP_WAIT_POLICY=passive

ulimit -c 0

# run_tests PROGRAM FILTER: the tests' exit code up to the first failure, what they print in $work/output.
run_tests() {
  { timeout "$seconds" "$1" --gtest_filter="$2" --gtest_brief=1 --gtest_throw_on_failure > "$work/output" 2>&1; } 2> /dev/null
}
seconds=300  # of tests that take a few

# Tests that fail without any mistake would find every one.
declare -A sound
expect_sound() {
  [[ -z ${sound[$1]:-} ]] || return 0
  run_tests "$build/$program" "$1" || fail "tests fail without any mistake: $(tail -n 20 "$work/output")"
  sound[$1]=yes
}

# What went wrong first, in one line, after the exit code of the tests.
reason() {
  local text
  text=$(grep -m 1 -A 2 'C++ exception with description' "$work/output" | tr '\n' ' ' |
    sed "s#^C++ exception with description ##; s#$work/overlay/##g; s# thrown in .*##")
  [[ -n $text ]] || text=$(grep -m 1 -A 4 ': Failure' "$work/output" | sed 's/^.*tests\/simt\///' | tr '\n' ' ')
  [[ -n $text || $1 != 124 ]] || text="the tests did not end in $seconds seconds"
  echo "${text:-the tests ended with code $1: $(tail -n 1 "$work/output")}" | cut -c 1-300
}

# Compiles and links mutant $1 to $work/test_simt.
build_mutant() {
  local old=${olds[$1]} new=${news[$1]} file=${files[$1]%% *} overlay=$work/overlay objects="" source object from compile
  [[ $new == - ]] && new=
  rm -rf "$overlay" && mkdir -p "$overlay/$(dirname "$file")"
  mutate "$top/$file" > "$overlay/$file"
  for source in ${files[$1]}; do
    [[ $source == *.cu ]] || continue
    object=tests/simt/CMakeFiles/attamba_simt_kernels.dir/__/__/$source.o
    compile=$(command_of "$object") || return
    from=$top/$source
    [[ $source != "$file" ]] || from=$overlay/$source
    compile=${compile/ -I/ -I$overlay -I}
    compile=${compile/ -o $object/ -o $work/$(basename "$source").o -w -O1}
    compile=$(sed -E "s# -MF [^ ]+# -MF $work/depends#; s# -c [^ ]+# -c $from#" <<< "$compile")
    (cd "$build" && eval "$compile") || return
    objects+=" $work/$(basename "$source").o"
  done
  # In front of the others: where functions are inline, the first object's copy is the program's.
  (cd "$build" && eval "$(sed "s#\( tests/simt/[^ ]*\.o\)#$objects\1#; s# -o $program # -o $work/test_simt #" <<< "$link")")
}

missed=() broken=()
for i in "${selected[@]}"; do
  expect_sound "${filters[i]}"
  if ! build_mutant "$i" > "$work/output" 2>&1; then
    echo "broken  ${names[i]} does not compile: $(head -n 3 "$work/output")"
    broken+=("${names[i]}")
  elif run_tests "$work/test_simt" "${filters[i]}"; then
    echo "MISSED  ${names[i]}"
    missed+=("${names[i]}")
  else
    echo "caught  ${names[i]}: $(reason $?)"
  fi
done
echo "${#selected[@]} mutants: $((${#selected[@]} - ${#missed[@]} - ${#broken[@]})) caught, ${#missed[@]} missed${missed[*]:+: ${missed[*]}}"
((${#broken[@]} == 0)) || fail "${#broken[@]} do not compile: ${broken[*]}"
((${#missed[@]} == 0))
