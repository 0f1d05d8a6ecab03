#!/bin/sh
# Fails when an include points against the order of the layers (docs/architecture.md):
#   launch -> src/train -> { src/models, src/optim, src/chunking, data } -> src/ops -> { src/graph, kernels, comm } -> src/core
# Folders between braces do not know each other, except that models use chunking. kernels/device includes only itself, and the
# two other kernel folders do not include each other.
#
#   includes.sh [TOP_FOLDER]
cd "${1:-.}" || exit 1
find launch src data kernels comm -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu' | LC_ALL=C sort | xargs awk '
  BEGIN {
    below["src/core"] = ""
    below["src/graph"] = below["kernels"] = below["comm"] = "src/core"
    below["kernels/cpu"] = below["kernels/cuda"] = "kernels kernels/device src/core"
    below["kernels/device"] = ""
    below["src/ops"] = "src/graph kernels comm src/core"
    below["data"] = below["src/chunking"] = below["src/optim"] = "src/ops src/graph kernels comm src/core"
    below["src/models"] = "src/chunking src/ops src/graph kernels comm src/core"
    below["src/train"] = "src/models src/optim src/chunking data src/ops src/graph kernels comm src/core"
    below["launch"] = "kernels/cuda src/train " below["src/train"]
  }
  function complain(text) { print FILENAME ":" FNR ": " text; failed = 1 }
  # The folder of this table that a path lies in: of subfolders that the table does not name, the nearest one above.
  function folder_of(path) {
    while (sub(/\/[^\/]*$/, "", path)) {
      if (path in below) return path
    }
    return ""
  }
  FNR == 1 { own = folder_of(FILENAME) }
  /^[ \t]*#[ \t]*include[ \t]*"/ {
    split($0, parts, "\"")
    if (parts[2] ~ /^(version|train_sbatch)\.inc$/) next  # generated
    other = folder_of(parts[2])
    if (other == "") {
      complain("\"" parts[2] "\" is not written from the top folder, like \"src/core/error.h\"")
    } else if (other != own && index(" " below[own] " ", " " other " ") == 0) {
      complain(own " must not include " other " (\"" parts[2] "\")")
    }
    ++count
  }
  END {
    if (count == 0) { print "no includes found"; failed = 1 }
    print count " includes checked"
    exit failed
  }'
