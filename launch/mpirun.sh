#!/usr/bin/env bash
# Starts a command on several ranks by Open MPI's mpirun, on this machine or on hosts that ssh reaches, with the options that
# training needs: binding, environment, more ranks than cores, root.
#
#   launch/mpirun.sh [-n RANKS] [--hosts LIST | --hostfile FILE] [--requeue N] [--dry-run] COMMAND...
#
#   launch/mpirun.sh -n 8 attamba train configs/attamba_1b.toml
#   launch/mpirun.sh --hosts node1:8,node2:8 --requeue 10 attamba train configs/attamba_1b.toml
#
#   -n RANKS         default: all slots of the hosts; without hosts a rank per GPU, or one
#   --hosts LIST     host:slots,host:slots,...; slots default to 1
#   --hostfile FILE  Open MPI's: lines of "host slots=8"
#   --requeue N      when training was stopped and saved (exit code 75), start it again, at most N times
#   --dry-run        print the command, start nothing
#
# TERM, INT, HUP, USR1 and USR2 to this script make the ranks save and stop; it does not start them again then. The exit code is
# the command's.
# ATTAMBA_MPIRUN holds more options for mpirun, ATTAMBA_SSH replaces ssh. mpirun itself may hang when a rank dies while ranks meet:
# when it has had no process for ATTAMBA_PATIENCE seconds (30) it is killed, and the exit code is 137.
set -euo pipefail

say() { printf 'mpirun.sh: %s\n' "$*" >&2; }
fail() { say "$*"; exit 2; }

ranks="" hosts="" hostfile="" requeue=0 dry_run=false
while (($# > 0)); do
  case $1 in
    -n | --hosts | --hostfile | --requeue)
      (($# > 1)) || fail "$1 needs a value"
      case $1 in
        -n) ranks=$2 ;;
        --hosts) hosts=$2 ;;
        --hostfile) hostfile=$2 ;;
        --requeue) requeue=$2 ;;
      esac
      shift 2 ;;
    --dry-run) dry_run=true; shift ;;
    --) shift; break ;;
    -*) fail "no option $1; the head of launch/mpirun.sh explains the options" ;;
    *) break ;;
  esac
done
(($# > 0)) || fail "no command; give one like: attamba train CONFIG.toml"
[[ -z $hosts || -z $hostfile ]] || fail "--hosts and --hostfile are two ways to say the same; give one"
[[ -z $ranks || $ranks =~ ^[1-9][0-9]*$ ]] || fail "-n is \"$ranks\"; it must be a number, 1 or more"
[[ $requeue =~ ^[0-9]+$ ]] || fail "--requeue is \"$requeue\"; it must be a number of starts"
[[ -z $hostfile || -r $hostfile ]] || fail "--hostfile $hostfile: cannot be read"
command -v mpirun > /dev/null || fail "mpirun is not installed (package openmpi-bin); without MPI start ranks over TCP, see docs/cluster.md"

# "host slots" of every host.
host_slots() {
  if [[ -n $hosts ]]; then
    tr , '\n' <<< "$hosts" | awk -F: '{ print $1, ($2 == "" ? 1 : $2) }'
  elif [[ -n $hostfile ]]; then
    awk '{ sub(/#.*/, "") } NF { slots = 1; for (i = 2; i <= NF; i++) if ($i ~ /^slots=/) slots = substr($i, 7); print $1, slots }' "$hostfile"
  fi
}
gpus() { nvidia-smi -L 2> /dev/null | grep -c '^GPU' || true; }

mapfile -t table < <(host_slots)
slots=0 here=0 remote=()
for line in "${table[@]}"; do
  read -r host count <<< "$line"
  [[ $count =~ ^[1-9][0-9]*$ ]] || fail "$host has \"$count\" slots; it must be a number, 1 or more"
  slots=$((slots + count))
  case $host in
    localhost | 127.0.0.1 | "$(hostname)" | "$(hostname -s)") here=$((here + count)) ;;
    *) remote+=("$host") ;;
  esac
done
if [[ -z $ranks ]]; then
  ranks=$slots
  if ((${#table[@]} == 0)); then
    ranks=$(gpus)
    ((ranks > 0)) || ranks=1
  fi
fi
((${#table[@]} > 0)) || here=$ranks
((here <= ranks)) || here=$ranks

# Hosts are taken to be alike, with the cores of this one.
most=$here
for line in "${table[@]}"; do
  ((${line#* } <= most)) || most=${line#* }
done
((most <= ranks)) || most=$ranks
cores=$(lscpu -p=CORE,SOCKET 2> /dev/null | grep -v '^#' | sort -u | wc -l)
allowed=$(nproc)
((cores > 0 && cores <= allowed)) || cores=$allowed
options=(-np "$ranks")
[[ -z $hosts ]] || options+=(--host "$hosts")
[[ -z $hostfile ]] || options+=(--hostfile "$hostfile")
export OMPI_MCA_rmaps_base_oversubscribe=0
if ((here > cores || (slots > 0 && ranks > slots))); then
  say "more ranks than cores or slots ($here ranks and $cores cores here): they give up their core while they wait"
  export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_mpi_yield_when_idle=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
  options+=(--bind-to none)
elif ((most == 1 || here == 0 || $(gpus) > 0)); then
  # A rank alone has all cores; with GPUs the threads of a rank only feed its GPU, and may go where they like; and of hosts
  # without this one among them nothing is known.
  options+=(--bind-to none)
else
  options+=(--map-by "slot:PE=$((cores / most))" --bind-to core)
fi
[[ $(id -u) -ne 0 ]] || export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

# mpirun itself hands on OMPI_*.
for name in PATH LD_LIBRARY_PATH $(compgen -e | grep -E '^(ATTAMBA_|OMP_|OPENBLAS_|NCCL_|CUDA_)' || true); do
  [[ -z ${!name:-} || $name == ATTAMBA_MPIRUN || $name == ATTAMBA_SSH ]] || options+=(-x "$name")
done

agent=${ATTAMBA_SSH:-ssh -o BatchMode=yes -o ConnectTimeout=10}
if ((${#remote[@]} > 0)); then
  export OMPI_MCA_plm_rsh_agent=$agent
  if ! $dry_run; then
    for host in "${remote[@]}"; do
      $agent "$host" true < /dev/null ||
        fail "$host: \`$agent $host true\` does not work; mpirun needs ssh without a password (ssh-copy-id $host) and a known host key"
    done
  fi
else
  # Shared memory of ranks in a folder of its own, which goes with this script; and those of scripts that were killed.
  for folder in /dev/shm/attamba-mpirun-*; do
    [[ ! -O $folder ]] || kill -0 "${folder##*-}" 2> /dev/null || rm -rf "$folder"
  done
  shared=/dev/shm/attamba-mpirun-$$
  export OMPI_MCA_btl_vader_backing_directory=$shared
fi
read -r -a more <<< "${ATTAMBA_MPIRUN:-}"
command=(mpirun "${options[@]}" "${more[@]}" "$@")
if $dry_run; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
[[ -z ${shared:-} ]] || mkdir "$shared"
trap '[[ -z ${shared:-} ]] || rm -rf "$shared"; [[ -z ${watcher:-} ]] || kill "$watcher" 2> /dev/null || true' EXIT

# Whether a process has children that live.
has_children() {
  local children child state
  read -r -a children < "/proc/$1/task/$1/children" || true
  for child in "${children[@]}"; do
    state=$(sed -n 's/^State:[[:space:]]*//p' "/proc/$child/status" 2> /dev/null) || continue
    [[ $state == Z* ]] || return 0
  done
  return 1
}
watch_mpirun() {
  local since=$SECONDS patience=${ATTAMBA_PATIENCE:-30}
  while sleep 1 > /dev/null 2>&1 && kill -0 "$1" 2> /dev/null; do
    ! has_children "$1" || since=$SECONDS
    if ((SECONDS - since >= patience)); then
      say "mpirun has had no process for $patience s and does not end; killing it"
      kill -KILL "$1"
      return
    fi
  done
}

# To mpirun, TERM means that ranks have a second to live; USR1 is handed on, and then they may take their time.
stopping=false interrupted=false process=""
# When asked a second time, it is in a hurry.
stop() {
  interrupted=true
  [[ -z $process ]] || kill "-$($stopping && echo TERM || echo USR1)" "$process" 2> /dev/null || true
  stopping=true
}
trap stop TERM INT USR1 USR2 HUP
for ((start = 0; ; start++)); do
  ! $stopping || exit 75
  set +e
  # Job control gives mpirun a process group of its own, so that Ctrl-C reaches this script alone.
  set -m
  "${command[@]}" < /dev/null &
  process=$!
  set +m
  ! $stopping || kill -USR1 "$process"
  watch_mpirun "$process" &
  watcher=$!
  while :; do
    interrupted=false
    wait "$process"
    code=$?
    $interrupted || break
  done
  set -e
  ((code == 75 && start < requeue)) && ! $stopping || exit "$code"
  say "stopped and saved; going on (start $((start + 2)) of at most $((requeue + 1)))"
done
