#!/bin/sh
# Starts ranks that find each other over TCP, as a launcher without MPI would, and waits for all of them; the exit code is the
# largest of theirs.
#
#   start_ranks.sh RANKS PROGRAM [ARGUMENTS...]
ranks=$1
shift
folder=$(mktemp -d) || exit 1
trap 'rm -rf "$folder"' EXIT
export ATTAMBA_RANKS="$ranks" ATTAMBA_RENDEZVOUS="file:$folder/rendezvous" ATTAMBA_INTERFACE=lo ATTAMBA_CONNECT_TIMEOUT=60
rank=0
pids=
while [ "$rank" -lt "$ranks" ]; do
  ATTAMBA_RANK=$rank "$@" &
  pids="$pids $!"
  rank=$((rank + 1))
done
worst=0
for pid in $pids; do
  wait "$pid"
  code=$?
  [ "$code" -gt "$worst" ] && worst=$code
done
exit "$worst"
