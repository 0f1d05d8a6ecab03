#!/usr/bin/env bash
# Prints English text that every Debian machine with this project's packages has, so that a first training needs no network: the
# manual of CMake, the manual pages inside Perl's modules, licences and copyright files, then (where they were not left out of
# the installation) change logs and read-me files. UTF-8, paragraphs parted by one empty line, none of them twice.
#
#   launch/text_on_this_machine.sh [BYTES]      at most about so many, 12,000,000 by default
set -euo pipefail
limit=${1:-12000000}

# files FOLDER... -- FIND ARGUMENTS...: a sorted list, so that the same machine gives the same text.
files() {
  local folders=()
  while [[ $1 != -- ]]; do
    [[ ! -d $1 ]] || folders+=("$1")
    shift
  done
  shift
  ((${#folders[@]} == 0)) || find "${folders[@]}" -type f "$@" -print0 | LC_ALL=C sort -z
}

sources() {
  files /usr/share/cmake*/Help -- -name '*.rst' | xargs -0 -r cat
  # Only the documentation of a module: from a line like "=head1" to "=cut".
  files /usr/share/perl /usr/share/perl5 /usr/lib/x86_64-linux-gnu/perl -- \( -name '*.pm' -o -name '*.pod' \) |
    xargs -0 -r awk 'FNR == 1 { shown = 0 } /^=cut/ { shown = 0 } /^=(head|pod|over|item)/ { shown = 1 } shown'
  files /usr/share/common-licenses -- | xargs -0 -r cat
  files /usr/share/doc -- -name copyright | xargs -0 -r cat
  files /usr/share/doc -- -name 'README*' ! -name '*.gz' | xargs -0 -r cat
  files /usr/share/doc -- \( -name 'README*.gz' -o -name 'NEWS*.gz' -o -name 'changelog*.gz' \) -size -200k | xargs -0 -r zcat -f
}

# Paragraphs already seen are dropped, and with them most licences. Reading stops at the limit, which ends the sources early.
{ sources 2> /dev/null || true; } | iconv -c -f UTF-8 -t UTF-8 2> /dev/null |
  LC_ALL=C awk -v limit="$limit" 'BEGIN { RS = ""; ORS = "\n\n" }
    !seen[$0]++ { print; bytes += length($0) + 2 }
    bytes >= limit { exit }' || true
