#!/usr/bin/env bash
# Prints English text that every Debian machine with this project's packages has, so that a first training needs no network: the
# manual of CMake, the manuals inside Perl's modules, licences, and (where they were not left out of the installation) read-me
# and news files of packages. UTF-8, paragraphs of prose parted by one empty line, none of them twice.
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

# reStructuredText without its marks: :command:`add_test` and ``words`` become what they say.
cmake_manual() {
  files /usr/share/cmake*/Help -- -name '*.rst' | xargs -0 -r cat |
    sed -E 's/:[a-z_:-]+:`([^`<]*[^`< ])( *<[^`]*>)?`/\1/g; s/`{1,2}([^`]*)`{1,2}_?/\1/g; s/\*\*//g; /^\.\. /d'
}

# Only the documentation of a module (from a line like "=head1" to "=cut"), without its code and marks: C<$x> becomes $x.
perl_manuals() {
  files /usr/share/perl /usr/share/perl5 /usr/lib/*/perl -- \( -name '*.pm' -o -name '*.pod' \) |
    xargs -0 -r awk 'FNR == 1 { shown = 0 } /^=cut/ { shown = 0 } /^=(head|pod|over|item)/ { shown = 1 } shown && !/^[ \t]/' |
    sed -E 's/^=(head[0-9]|item) *//; /^=[a-z]/d; s/[A-Z]<<+ ([^<>]*) >>+/\1/g; s/[A-Z]<([^<>]*)>/\1/g; s/[A-Z]<([^<>]*)>/\1/g
             s/E<(lt|gt)>//g'
}

sources() {
  cmake_manual
  perl_manuals
  files /usr/share/common-licenses -- | xargs -0 -r cat
  files /usr/share/doc -- -name copyright | xargs -0 -r sed -E 's/^ \.$//; s/^ //'
  files /usr/share/doc -- \( -name 'README*' -o -name 'NEWS*' \) -size -200k | xargs -0 -r zcat -f
}

# Prose is a paragraph of which nearly all is letters: lists of names, tables and code are not. Paragraphs already seen are
# dropped, and with them most licences. Reading stops at the limit, which ends the sources early.
{ sources 2> /dev/null || true; } | iconv -c -f UTF-8 -t UTF-8 2> /dev/null |
  LC_ALL=C awk -v limit="$limit" '
    BEGIN { RS = ""; ORS = "\n\n" }
    {
      rest = $0
      gsub(/[A-Za-z ,.;\n'\''"()-]/, "", rest)
      if (length(rest) * 20 > length($0) || length($0) < 40 || seen[$0]++) next
      print
      bytes += length($0) + 2
    }
    bytes >= limit { exit }' || true
