#!/usr/bin/env bash
# A Slurm cluster of this machine only, all of it in one directory, without a service manager.
#   one_node_slurm.sh start DIRECTORY    then: export SLURM_CONF=DIRECTORY/slurm.conf
#   one_node_slurm.sh stop DIRECTORY
# Needs root and Debian's slurm-wlm and munge.
set -euo pipefail
directory=$(realpath -m "$2")
export PATH=$PATH:/usr/sbin SLURM_CONF=$directory/slurm.conf

start() {
  mkdir -p "$directory"/{state,spool}
  chmod 755 "$directory"
  dd if=/dev/urandom of="$directory/munge.key" bs=128 count=1 status=none
  chmod 400 "$directory/munge.key"
  munged --force --key-file="$directory/munge.key" --socket="$directory/munge.socket" \
    --pid-file="$directory/munged.pid" --log-file="$directory/munged.log" --seed-file="$directory/munge.seed"
  cat >"$SLURM_CONF" <<END
ClusterName=one-node
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
AuthType=auth/munge
AuthInfo=socket=$directory/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$directory/state
SlurmdSpoolDir=$directory/spool
SlurmctldPidFile=$directory/slurmctld.pid
SlurmdPidFile=$directory/slurmd.pid
SlurmctldLogFile=$directory/slurmctld.log
SlurmdLogFile=$directory/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$(nproc --all) State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP OverSubscribe=FORCE:4
END
  # Control groups of version 1 need not be there when nothing asks for them.
  echo "CgroupPlugin=cgroup/v1" >"$directory/cgroup.conf"
  slurmctld
  slurmd
  for _ in $(seq 100); do
    [[ $(sinfo --noheader --format=%T 2>/dev/null) == idle ]] && return
    sleep 0.2
  done
  echo "the node does not become idle:" >&2
  tail -n 5 "$directory"/slurm*.log >&2
  exit 1
}

stop() {
  scancel --user=root --quiet 2>/dev/null || true
  local name
  for name in slurmd slurmctld munged; do
    [[ -s $directory/$name.pid ]] || continue
    local pid
    pid=$(cat "$directory/$name.pid")
    kill "$pid" 2>/dev/null || true
    for _ in $(seq 50); do
      kill -0 "$pid" 2>/dev/null || break  # the ports are free only then
      sleep 0.2
    done
  done
}

"$1"
