#!/bin/sh
# Runs tests/gpu_check.sh without a GPU, on tiny sizes: every step that needs none must work, and the report must say so.
#   check_script.sh FOLDER PROGRAM KERNELS_CHECK PYTHON
set -eu
folder=$1 program=$2 kernels_check=$3 python=$4
top=$(cd "$(dirname "$0")/../.." && pwd)
rm -rf "$folder"
mkdir -p "$folder/text"
cp "$top"/*.md "$top"/docs/*.md "$folder/text/"
"$program" data prepare "$folder/text" --output "$folder/tokens" --vocab-size 400 --valid-fraction 0.2 > "$folder/prepare.log" 2>&1 ||
  { cat "$folder/prepare.log"; exit 1; }
"$top/tests/gpu_check.sh" --device cpu --out "$folder/out" --program "$program" --kernels-check "$kernels_check" \
  --tokens "$folder/tokens" --python "$python"
"$python" - "$folder/out/report.json" <<'PYTHON'
import json, sys
report = json.load(open(sys.argv[1]))
reached = {goal["goal"]: goal["reached"] for goal in report["goals"]}
assert report["failed_steps"] == [] and report["skipped_steps"] == [], (report["failed_steps"], report["skipped_steps"])
assert report["version"].startswith("attamba "), report["version"]
for goal in ("golden files, float32", "golden files, bfloat16", "every kernel agrees with the CPU's", "a real training",
             "every operation of a model agrees with the CPU's"):
    assert reached[goal] is True, goal
curves = report["results"]["curves"]
for dtype, steps in (("float32", 5), ("bfloat16", 20)):
    assert curves[dtype]["steps"] == steps and curves[dtype]["finite"], curves[dtype]
    assert curves[dtype]["largest_relative_difference"] == 0 == curves[dtype]["largest_of_window_means"], curves[dtype]
measured = {goal["goal"]: goal["measured"] for goal in report["goals"]}
for goal in ("tokens/s, 62M, 16 x 1024", "tokens/s, 62M, 80 x 1024", "chunk_scan: share of copy bandwidth"):
    assert measured[goal] > 0 and reached[goal] is None, goal
PYTHON
