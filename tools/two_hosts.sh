#!/usr/bin/env bash
# Three hosts on this one, to try what needs several: network namespaces with names, addresses and
# cables of their own. The files are shared, as on a cluster. Needs root and iproute2.
#
#   tools/two_hosts.sh up            make host-a (10.77.0.1), host-b (.2), host-c (.3) and a switch
#   tools/two_hosts.sh on a COMMAND  run a command on host-a
#   tools/two_hosts.sh cut b         pull host-b's cable;  `plug b` puts it back
#   tools/two_hosts.sh ssh HOST …    what mpirun takes for ssh, see below
#   tools/two_hosts.sh down          remove everything
#
# Two ranks of Open MPI, one on each host:
#   tools/two_hosts.sh on a mpirun --allow-run-as-root --prtemca plm_ssh_agent "$PWD/tools/two_hosts.sh ssh" \
#     --host host-a,host-b -n 2 python -m fastserve_mega worker --config X
set -euo pipefail

names=(a b c)
space() { echo "fastserve-$1"; }
switch=$(space switch)

up() {
  down
  ip netns add "$switch"
  ip -n "$switch" link add bridge type bridge
  ip -n "$switch" link set bridge up
  local number=0 name
  for name in "${names[@]}"; do
    number=$((number + 1))
    ip netns add "$(space "$name")"
    ip -n "$(space "$name")" link set lo up
    ip -n "$(space "$name")" link add eth0 type veth peer name "port-$name" netns "$switch"
    ip -n "$(space "$name")" addr add "10.77.0.$number/24" dev eth0
    ip -n "$(space "$name")" link set eth0 up
    ip -n "$switch" link set "port-$name" master bridge up
    # `ip netns exec` shows this file as /etc/hosts. The host's own name is loopback, as Debian has it.
    mkdir -p "/etc/netns/$(space "$name")"
    {
      echo "127.0.0.1 localhost"
      echo "127.0.1.1 host-$name"
      echo "10.77.0.1 host-a"; echo "10.77.0.2 host-b"; echo "10.77.0.3 host-c"
    } >"/etc/netns/$(space "$name")/hosts"
  done
}

down() {
  local name
  for name in "${names[@]}" switch; do
    ip netns del "$(space "$name")" 2>/dev/null || true
    rm -rf "/etc/netns/$(space "$name")"
  done
}

on() {
  local name=$1
  shift
  exec ip netns exec "$(space "$name")" unshare --uts \
    sh -c 'hostname "$0" && exec "$@"' "host-$name" "$@"
}

# ssh [options] host-b command words, which ssh would join and give to the shell there.
ssh_to() {
  while [[ $1 == -* ]]; do shift; done
  local name=${1#host-}
  shift
  on "$name" sh -c "$*"
}

case ${1:-} in
  up) up ;;
  down) down ;;
  on) shift; on "$@" ;;
  ssh) shift; ssh_to "$@" ;;
  cut) ip -n "$switch" link set "port-$2" down ;;
  plug) ip -n "$switch" link set "port-$2" up ;;
  *) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2; exit 2 ;;
esac
