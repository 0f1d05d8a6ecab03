#!/usr/bin/env bash
# From a fresh clone to a trained model: installs what is missing, builds, prepares text, trains a small Attamba on two ranks for
# about two minutes, evaluates it, lets it write, draws its loss, and says where everything is.
#
#   launch/quickstart.sh [--again] [TEXT...]
#
# TEXT: files or folders of text (plain, .jsonl, .gz, .zst), at least 100 KB in all. Without any, English text that is on this
# machine anyway (manuals, licences), so no network is needed. Results go to runs/quickstart and data-cache/quickstart, or for
# other text to folders of its own beside these. A second run goes on where the first stopped, and only shows the results when it had finished;
# --again forgets it and starts anew.
#
# ATTAMBA_STEPS sets the number of training steps (default 500), ATTAMBA_RANKS that of ranks (default 2).
set -euo pipefail

say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
fail() { printf 'quickstart: %s\n' "$*" >&2; exit 1; }

again=false
if [[ ${1:-} == --again ]]; then
  again=true
  shift
elif [[ ${1:-} == -* ]]; then
  fail "no option $1; usage: launch/quickstart.sh [--again] [TEXT...]"
fi
texts=()
for text in "$@"; do
  [[ -e $text ]] || fail "$text: no such file or folder"
  texts+=("$(realpath "$text")")
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Text that is named gets a folder of its own, by the names, sizes and dates of its files.
name=quickstart
if ((${#texts[@]} > 0)); then
  name+=-$(find -L "${texts[@]}" -type f -printf '%p %s %T@\n' | LC_ALL=C sort | sha256sum | cut -c 1-8)
fi
work=data-cache/$name run=runs/$name
! $again || rm -rf "$work" "$run"
ranks=${ATTAMBA_RANKS:-2}
steps=${ATTAMBA_STEPS:-500}
cores=$(nproc)
threads=$((cores / ranks > 1 ? cores / ranks : 1))

# The same program on several ranks. Open MPI must be told that root may do this, and that there may be fewer cores than ranks.
on_ranks() {
  OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1 \
    OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_mpi_yield_when_idle=1 mpirun -n "$ranks" "$@"
}

# Cuts standard input into documents of about 16 KB, so that some can be held out for validation. Their names, and with them
# their order, mix the text's parts.
cut_into_documents() {
  iconv -c -f UTF-8 -t UTF-8 2> /dev/null | LC_ALL=C awk -v folder="$work/text.part" '
    function next_file() {
      if (name) close(name)
      name = sprintf("%s/%05d-%d.txt", folder, ++count * 7919 % 99991, count)
      bytes = 0
    }
    BEGIN { next_file() }
    { print > name; bytes += length($0) + 1 }
    (bytes > 16384 && $0 == "") || bytes > 65536 { next_file() }'
}

named_texts() {
  local file
  find -L "${texts[@]}" -type f ! -name '.*' ! -name '*.jsonl*' -print0 | LC_ALL=C sort -z | while IFS= read -r -d '' file; do
    case $file in
      *.gz) zcat "$file" ;;
      *.zst) command -v zstdcat > /dev/null || fail "$file: needs zstdcat (package zstd)"; zstdcat "$file" ;;
      *) cat "$file" ;;
    esac
    printf '\n\n'
  done
}

say "Setting up and building"
launch/setup.sh attamba
attamba=build/release/attamba
$attamba --version

say "Preparing text"
json=()
if ((${#texts[@]} > 0)); then
  mapfile -d '' json < <(find -L "${texts[@]}" -type f ! -name '.*' -name '*.jsonl*' -print0 | LC_ALL=C sort -z)
fi
if [[ ! -d $work/text ]]; then
  rm -rf "$work/text.part"
  mkdir -p "$work/text.part"
  if ((${#texts[@]} > 0)); then
    named_texts | cut_into_documents
  else
    launch/text_on_this_machine.sh | cut_into_documents
  fi
  mv "$work/text.part" "$work/text"
fi
bytes=$(find "$work/text" -type f -exec cat {} + | wc -c)
for file in ${json[@]+"${json[@]}"}; do
  bytes=$((bytes + $(stat -L -c %s "$file")))
done
((bytes >= 100000)) || fail "only $bytes bytes of text; a vocabulary and a model need at least 100 KB"
vocabulary=4096
((bytes >= 2000000)) || vocabulary=1024
echo "$((bytes / 1000)) KB of text in $work/text${json[*]:+ and ${#json[@]} .jsonl files}"
inputs=(${json[@]+"${json[@]}"})
[[ -z $(find "$work/text" -type f -print -quit) ]] || inputs=("$work/text" ${inputs[@]+"${inputs[@]}"})
$attamba data prepare "${inputs[@]}" --output "$work/tokens" --vocab-size $vocabulary --vocab-sample 4 --valid-fraction 0.05

say "Training on $ranks ranks of $threads thread(s)"
on_ranks $attamba train configs/quickstart.toml --train.steps "$steps" --optim.warmup $((steps < 400 ? steps / 10 : 40)) \
  --train.threads "$threads" --model.vocab_size $vocabulary --data.train "$work/tokens/train" \
  --data.valid "$work/tokens/valid" --run.folder "$run" ||
  fail "training did not finish; the same command goes on where it stopped, --again starts anew"

say "Evaluating on text that was held out"
on_ranks $attamba eval "$run" --threads "$threads"

say "Letting it write"
for prompt in "The" "This function" "You may"; do
  $attamba generate "$run" --prompt "$prompt" --tokens 60 --seed 1
  echo "--"
done

$attamba plot "$run" --x steps --out "$run/loss.svg"

# Single batches scatter: the last loss is the mean over the last ten that were logged.
losses=$(sed -n 's/.*"loss": *\([0-9.]*\).*/\1/p' "$run/metrics.jsonl")
last=$(tail -n 10 <<< "$losses" | awk '{ sum += $1 } END { printf "%.2f", sum / NR }')
say "Done: the loss fell from $(head -n 1 <<< "$losses" | cut -c 1-4) to $last nats per token"
cat <<END
  text                $work/text
  tokens, vocabulary  $work/tokens
  metrics             $run/metrics.jsonl
  resolved settings   $run/config.toml
  checkpoints         $run/checkpoints
  picture of the loss $run/loss.svg
  program             $attamba (--help)

Next:
  more of its writing          $attamba generate $run --prompt "Once"
  other chunks than trained    $attamba eval $run --chunk-size 4
  every setting                $attamba train --help
  the whole story              docs/user-guide.md
END
