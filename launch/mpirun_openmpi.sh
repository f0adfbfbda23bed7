#!/usr/bin/env bash
# Ranks with Open MPI 5. Usage: launch/mpirun_openmpi.sh CONFIG [HOSTFILE]
#
# One rank per GPU (or CPU socket): parallel.tensor x parallel.pipeline of them, numbered stage by
# stage, so that the ranks of one stage, which talk the most, are neighbours on a host.
#
# HOSTFILE: a line for each host, the first one runs the coordinator:
#   node01 slots=8
#   node02 slots=8
# mpirun starts its daemons over ssh without a password; configuration, code and model must have the
# same paths on all hosts.
set -euo pipefail
config=$1 hostfile=${2:-}
ranks=${RANKS:-2}

options=(
  -n "$ranks"
  --bind-to none  # a rank takes its own share of the cores
  # The environment does not travel by itself.
  -x PATH ${PYTHONPATH:+-x PYTHONPATH}
  # Which network interface torch takes; needed only where the automatic choice is wrong.
  ${GLOO_SOCKET_IFNAME:+-x GLOO_SOCKET_IFNAME} ${NCCL_SOCKET_IFNAME:+-x NCCL_SOCKET_IFNAME}
)
# On many hosts: fill one before the next. Should a host vanish without a word, mpirun itself would
# wait for TCP to give up, which takes a quarter of an hour; the ranks do not.
[[ -z $hostfile ]] || options+=(
  --hostfile "$hostfile" --map-by slot
  --prtemca oob_tcp_keepalive_time 30 --prtemca oob_tcp_keepalive_intvl 5 --prtemca oob_tcp_keepalive_probes 3
)
[[ -n $hostfile ]] || options+=(--oversubscribe)  # more ranks than cores, on one host
[[ $EUID -ne 0 ]] || options+=(--allow-run-as-root)

# shellcheck source=keep_up.sh
source "$(dirname "$0")/keep_up.sh"
keep_up mpirun "${options[@]}" python -m fastserve_mega worker --config "$config" --supervisor $$ ${ARGUMENTS:-}
