#!/bin/bash
# A real Slurm cluster of several virtual nodes on this one machine, for tests and trials; needs no root and no munge.
#
#   slurm/dev_cluster.sh start DIR NODES    start it; says what to type next; ready in seconds
#   slurm/dev_cluster.sh stop DIR           stop every process of it; DIR stays, with its logs
#
# The nodes are n1, n2, ...; each has two processors. Partitions: low (the default), and urgent, whose jobs preempt those
# of low after 20 s of grace. MMPRETRAIN_CLUSTER_USER_SIGNAL=no: preempted jobs are not sent their --signal.
# MMPRETRAIN_CLUSTER_PORT: the first of NODES + 1 ports; free ones are looked for when it is not set.
set -euo pipefail
PATH=$PATH:/usr/sbin # where Debian keeps daemons, and not every user looks

fail() {
  echo "error: $1" >&2
  exit 4
}

free_port() {
  local count=$1 port offset
  for ((port = 21000 + RANDOM % 8000; port < 30000; port += count)); do
    for ((offset = 0; offset < count; offset++)); do
      if (exec 3<>"/dev/tcp/127.0.0.1/$((port + offset))") 2>/dev/null; then continue 2; fi
    done
    echo "$port"
    return
  done
  fail "no $count free ports in a row between 21000 and 30000"
}

write_config() {
  local dir=$1 nodes=$2 port=$3 user host signal
  user=$(id -un) host=$(hostname -s)
  signal="SlurmctldParameters=preempt_send_user_signal"
  [[ ${MMPRETRAIN_CLUSTER_USER_SIGNAL:-yes} == yes ]] || signal="# preempted jobs are not sent their --signal"
  cat >"$dir/slurm.conf" <<CONF
ClusterName=dev
SlurmctldHost=$host(127.0.0.1)
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/none
CredType=cred/none
# a requeued job may start again after the life of its credential
AuthInfo=cred_expire=5
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SlurmctldPort=$port
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmdSpoolDir=$dir/spool-%n
StateSaveLocation=$dir/state
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
SlurmdTimeout=20
KillWait=10
JobRequeue=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
$signal
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/completed.txt
NodeName=n[1-$nodes] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + nodes))] CPUs=2 RealMemory=1000
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=20 MaxTime=INFINITE
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE
CONF
}

start() {
  local dir nodes=$2 number
  command -v slurmctld >/dev/null || fail "there is no slurmctld; on Debian and Ubuntu: apt install slurm-wlm"
  [[ $nodes =~ ^[1-9][0-9]?$ ]] || fail "NODES is '$nodes'; give a number from 1 to 99"
  mkdir -p "$1/state" && dir=$(cd "$1" && pwd)
  [[ ! -e $dir/slurmctld.pid ]] || fail "$dir holds a cluster; stop it first: $0 stop $dir"
  write_config "$dir" "$nodes" "${MMPRETRAIN_CLUSTER_PORT:-$(free_port $((nodes + 1)))}"
  export SLURM_CONF=$dir/slurm.conf
  slurmctld -c
  for ((number = 1; number <= nodes; number++)); do slurmd -N "n$number"; done
  for _ in {1..150}; do
    if [[ $(sinfo -h -N -t idle -p low 2>/dev/null | wc -l) == "$nodes" ]]; then
      echo "export SLURM_CONF=$SLURM_CONF"
      return
    fi
    sleep 0.2
  done
  stop "$dir"
  fail "the $nodes nodes were not idle after 30 s; see $dir/*.log"
}

stop() {
  local dir pid_file pid
  dir=$(cd "$1" && pwd)
  export SLURM_CONF=$dir/slurm.conf
  timeout 5 scancel --user "$(id -un)" 2>/dev/null || true
  for _ in {1..75}; do # KillWait and a little more, or steps would outlive their daemons
    [[ -n $(timeout 5 squeue -h 2>/dev/null) ]] && sleep 0.2
  done
  for pid_file in "$dir"/slurmd-*.pid "$dir"/slurmctld.pid; do
    [[ -e $pid_file ]] || continue
    pid=$(<"$pid_file")
    kill "$pid" 2>/dev/null || true
    for _ in {1..50}; do kill -0 "$pid" 2>/dev/null && sleep 0.1; done
    kill -KILL "$pid" 2>/dev/null || true
    rm -f "$pid_file"
  done
}

case "${1:-}:$#" in
start:3) start "$2" "$3" ;;
stop:2) stop "$2" ;;
*) fail "usage: $0 start DIR NODES | $0 stop DIR" ;;
esac
