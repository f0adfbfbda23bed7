#!/usr/bin/env bash
# Ranks with MPICH (or Intel MPI, MVAPICH). Usage: launch/mpirun_mpich.sh CONFIG [HOSTFILE]
#
# mpi4py must load the same MPI: its wheels look for libmpi in the environment of python, then in
# the system. With several there, say MPI4PY_LIBMPI=/usr/lib/x86_64-linux-gnu/libmpi.so.12
#
# HOSTFILE: a line for each host, the first one runs the coordinator:
#   node01:8
#   node02:8
set -euo pipefail
config=$1 hostfile=${2:-}
ranks=${RANKS:-2}

options=(-n "$ranks" -bind-to none)
# The environment travels by itself. -iface names the network interface.
[[ -z $hostfile ]] || options+=(-f "$hostfile" ${INTERFACE:+-iface "$INTERFACE"})

# shellcheck source=keep_up.sh
source "$(dirname "$0")/keep_up.sh"
keep_up mpiexec "${options[@]}" python -m fastserve_mega worker --config "$config" --supervisor $$ ${ARGUMENTS:-}
