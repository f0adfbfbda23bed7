#!/usr/bin/env bash
# Ranks with torchrun: no MPI, no ssh. Usage, once on each host:
#
#   one host:    launch/torchrun.sh CONFIG
#   two hosts:   NODES=2 NODE=0 MASTER_ADDR=node01 launch/torchrun.sh CONFIG    on node01
#                NODES=2 NODE=1 MASTER_ADDR=node01 launch/torchrun.sh CONFIG    on node02
#
# The host with NODE=0 runs the coordinator. RANKS is the number of ranks per host.
set -euo pipefail
config=$1

options=(--nproc-per-node "${RANKS:-2}")
if [[ ${NODES:-1} -gt 1 ]]; then
  # The agents meet here, and the ranks in the same place. An agent waits for the others as long as
  # --rdzv-conf timeout=… says (seconds); a rank for another one, parallel.timeout_s.
  options+=(
    --nnodes "$NODES" --node-rank "${NODE:?the number of this host, from 0}"
    --master-addr "${MASTER_ADDR:?name or address of the host with NODE=0}"
    --master-port "${MASTER_PORT:-29500}"
  )
else
  options+=(--standalone)  # a free port, so that two deployments do not meet
fi

# Ranks set their own threads (parallel.threads_per_rank); unset, torchrun says so in a banner.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# shellcheck source=keep_up.sh
source "$(dirname "$0")/keep_up.sh"
ask_ranks_to_stop() { # torchrun itself would end by this signal
  pkill -USR1 -P "$1"
}
# No --max-restarts: that ends the ranks of all hosts without a word, which is no sooner.
keep_up torchrun "${options[@]}" -m fastserve_mega worker --config "$config" --supervisor $$ ${ARGUMENTS:-}
