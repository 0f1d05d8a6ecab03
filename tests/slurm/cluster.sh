# A SLURM cluster of several nodes on this machine, for `source`: munged, slurmctld and a slurmd per node, all of our own, with
# folders below $cluster and ports that nobody uses. Needs root, because slurmd does.
#
#   start_cluster FOLDER NODES    stop_cluster    kill_node NODE    job_state JOB

# Prints why there can be no cluster here; nothing when there can.
why_no_cluster() {
  local program
  [[ $(id -u) -eq 0 ]] || { echo "needs root"; return; }
  for program in munged slurmctld slurmd sbatch; do
    [[ -n $(PATH=$PATH:/usr/sbin command -v $program) ]] || { echo "$program is not installed; launch/setup.sh --with-slurm does it"; return; }
  done
}

# The first of a row of ports that are all free.
free_ports() {
  local count=$1 port used
  used=$(cat /proc/net/tcp /proc/net/tcp6 | awk '{ split($2, a, ":"); print a[2] }')
  for ((port = 21000 + $$ % 5000; ; port += count)); do
    local i=0
    while ((i < count)) && ! grep -qix "$(printf %04X $((port + i)))" <<< "$used"; do
      i=$((i + 1))
    done
    ((i == count)) && echo "$port" && return
  done
}

write_configuration() {
  local port=$1 nodes=$2 host i
  host=$(hostname -s)
  cat <<END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$cluster/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$cluster/state
SlurmdSpoolDir=$cluster/spool.%n
TmpFS=$cluster/tmp.%n
SlurmctldPidFile=$cluster/slurmctld.pid
SlurmdPidFile=$cluster/%n.pid
SlurmctldLogFile=$cluster/slurmctld.log
SlurmdLogFile=$cluster/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
JobRequeue=1
SlurmdTimeout=5
MessageTimeout=3
TCPTimeout=2
KillWait=10
BatchStartTimeout=5
UnkillableStepTimeout=15
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
  for ((i = 1; i <= nodes; i++)); do
    echo "NodeName=n$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + i)) CPUs=4 RealMemory=1000 State=UNKNOWN"
  done
}

start_node() {
  mkdir -p "$cluster/spool.$1" "$cluster/tmp.$1"
  slurmd -N "$1" -f "$SLURM_CONF"
}

start_cluster() {
  cluster=$1
  local nodes=$2 i waited
  PATH=$PATH:/usr/sbin
  mkdir -p "$cluster/state"
  chmod 755 "$cluster"
  dd if=/dev/urandom of="$cluster/munge.key" bs=128 count=1 2> /dev/null
  chmod 600 "$cluster/munge.key"
  munged --force --key-file="$cluster/munge.key" --socket="$cluster/munge.socket" --pid-file="$cluster/munged.pid" \
    --log-file="$cluster/munged.log" --seed-file="$cluster/munged.seed"
  export SLURM_CONF=$cluster/slurm.conf
  write_configuration "$(free_ports $((nodes + 1)))" "$nodes" > "$SLURM_CONF"
  slurmctld -c -f "$SLURM_CONF"
  for ((i = 1; i <= nodes; i++)); do
    start_node "n$i"
  done
  for ((waited = 0; waited < 200; waited++)); do
    (($(sinfo -h -N -t idle -o %N 2> /dev/null | wc -l) == nodes)) && return
    sleep 0.1
  done
  echo "the cluster did not come up:"
  tail -n 20 "$cluster"/*.log
  return 1
}

# Our daemons and everything that they started, by our own folder's name in their environment or command.
cluster_processes() {
  local process
  for process in /proc/[0-9]*; do
    if tr '\0' '\n' 2> /dev/null < "$process/environ" | grep -qxF "SLURM_CONF=$cluster/slurm.conf" ||
      tr '\0' ' ' 2> /dev/null < "$process/cmdline" | grep -qF "$cluster/"; then
      [[ ${process#/proc/} -eq $$ || ${process#/proc/} -eq $BASHPID ]] || echo "${process#/proc/}"
    fi
  done
}

# As if the machine had gone: the daemon, its steps and their tasks, all at once.
kill_node() {
  local process victims=("$(cat "$cluster/$1.pid")")
  for process in /proc/[0-9]*; do
    if tr '\0' '\n' 2> /dev/null < "$process/environ" | grep -qxF "SLURMD_NODENAME=$1" &&
      tr '\0' '\n' 2> /dev/null < "$process/environ" | grep -qxF "SLURM_CONF=$cluster/slurm.conf"; then
      victims+=("${process#/proc/}" "$(awk '{ print $4 }' "$process/stat" 2> /dev/null)")
    fi
  done
  kill -KILL "${victims[@]}" 2> /dev/null
}

job_state() { scontrol -o show job "$1" 2> /dev/null | grep -o 'JobState=[A-Z_]*' | cut -d= -f2; }

stop_cluster() {
  local name left tries
  [[ -n ${cluster:-} ]] || return 0
  scancel --quiet --state=RUNNING 2> /dev/null
  for name in "$cluster"/n*.pid "$cluster/slurmctld.pid" "$cluster/munged.pid"; do
    [[ -s $name ]] && kill "$(cat "$name")" 2> /dev/null
  done
  for ((tries = 0; tries < 30; tries++)); do
    mapfile -t left < <(cluster_processes)
    ((${#left[@]} == 0)) && break
    ((tries < 10)) || kill -KILL "${left[@]}" 2> /dev/null
    sleep 0.2
  done
  ((${#left[@]} == 0)) || echo "still running: ${left[*]}"
}
