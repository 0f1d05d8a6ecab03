#!/usr/bin/env bash
# launch/mpirun.sh on two hosts: two network namespaces on this machine, joined by a bridge, with names and shared memory of their
# own, where a command takes ssh's place. Trains on both, is told to stop, goes on, and must end with the weights of one process.
# Exit code 77 (skipped) where namespaces cannot be made.
#
#   two_hosts.sh ATTAMBA
set -u
attamba=$(realpath "$1")
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
id=$(printf %04x $(($$ % 65536)))
work=$(mktemp -d "${TMPDIR:-/tmp}/attamba-hosts-XXXXXX")
export work id

cleanup() {
  local host
  for host in one two; do
    ip netns pids "at$id$host" 2> /dev/null | xargs -r kill -KILL 2> /dev/null
    ip netns delete "at$id$host" 2> /dev/null
  done
  ip link delete "at${id}br" 2> /dev/null
  rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

[[ $(id -u) -eq 0 ]] || { echo "skipped: needs root"; exit 77; }
ip link add "at${id}br" type bridge 2> /dev/null || { echo "skipped: this machine makes no network namespaces"; exit 77; }
ip link set "at${id}br" up
number=1
for host in one two; do
  ip netns add "at$id$host" && ip link add "at$id$host" type veth peer name eth0 netns "at$id$host" ||
    { echo "skipped: this machine makes no network namespaces"; exit 77; }
  ip link set "at$id$host" master "at${id}br" up
  ip -n "at$id$host" link set lo up
  ip -n "at$id$host" link set eth0 up
  ip -n "at$id$host" address add "10.213.7.$number/24" dev eth0
  number=$((number + 1))
done

# on HOST COMMAND...: the way ssh calls it, one string for a shell.
cat > "$work/on" <<'END'
#!/usr/bin/env bash
host=$1
shift
exec nsenter --net="/run/netns/at$id$host" unshare --uts --mount --ipc bash -c '
  hostname "$1" && mount -t tmpfs none /dev/shm && shift && exec bash -c "$*"' bash "$host" "$@"
END
chmod +x "$work/on"

words=(the river ran past seven old mills and a bridge of stone)
RANDOM=3
for ((i = 0; i < 60; i++)); do
  text=
  for ((j = 0; j < 120; j++)); do text+="${words[RANDOM % 12]} "; done
  echo "{\"text\": \"$text\"}"
done > "$work/text.jsonl"
"$attamba" data prepare "$work/text.jsonl" -o "$work/data" --vocab-size 300 --valid-fraction 0.1 > "$work/log" 2>&1 || { cat "$work/log"; exit 1; }
steps=400
settings=(--model.vocab_size 300 --model.dim 32 --model.n_layers 2 --model.n_heads 2 --model.ffn_dim 48 --model.ssm.hidden 16
          --model.ssm.state 8 --model.ssm.heads 2 --model.chunking.size 4 --model.chunking.leading_tokens 3
          --data.sequence_length 24 --optim.warmup 2 --train.micro_batch 1 --train.global_batch 4 --train.deterministic true
          --train.log_every 1 --checkpoint.every 0 --train.steps $steps --data.train "$work/data/train")
checksum() { grep -hoE '"state_crc32c": ?[^,]*' "$work/$1/checkpoints/step-000000$steps/manifest.json" 2> /dev/null | head -n 1; }

export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
"$attamba" train "${settings[@]}" --run.folder "$work/alone" > "$work/log" 2>&1 || { cat "$work/log"; exit 1; }

# The first signal of a rank on the far host makes all stop; --requeue starts them again.
export ATTAMBA_SSH="$work/on"
"$work/on" one "$top/launch/mpirun.sh --hosts one:2,two:2 --requeue 3 $attamba train ${settings[*]} --run.folder $work/hosts" > "$work/log" 2>&1 &
script=$!
for ((i = 0; i < 300; i++)); do
  (($(grep -c '' "$work/hosts/metrics.jsonl" 2> /dev/null || true) > 20)) && break
  sleep 0.05
done
for process in $(ip netns pids "at${id}two"); do
  [[ $(readlink "/proc/$process/exe") != "$attamba" ]] || { kill -USR1 "$process"; break; }
done
wait $script
code=$?
echo "exit code $code; $(checksum hosts) on two hosts, $(checksum alone) alone"
if ((code != 0)) || [[ -z $(checksum alone) || $(checksum alone) != "$(checksum hosts)" ]] || ! grep -q "on 2 hosts" "$work/log" ||
  ! grep -q "mpirun.sh: stopped and saved; going on" "$work/log"; then
  cat "$work/log"
  exit 1
fi
