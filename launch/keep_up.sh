# For the scripts beside it: `keep_up COMMAND…` runs a command again whenever it fails, until this
# script is told to stop by SIGTERM or Ctrl-C. It then asks the ranks to finish their requests.
#
# The ranks get `--supervisor $$`, so that clients are told to be patient and go on with the next
# start. That works when rank 0 is on this host; else clients are told the end, and must ask again.

ask_ranks_to_stop() { # of a launcher that passes the signal on
  kill -USR1 "$1"
}

keep_up() {
  local child status stopping="" pause=0 begin
  trap 'stopping=yes; ask_ranks_to_stop "$child" 2>/dev/null || true' TERM INT
  while true; do
    begin=$SECONDS
    "$@" &
    child=$!
    while true; do # a signal ends `wait`, and not the child
      status=0
      wait "$child" || status=$?
      kill -0 "$child" 2>/dev/null || break
    done
    # 2: the configuration cannot work.
    [[ -z $stopping && $status -ne 0 && $status -ne 2 ]] || return "$status"
    # At once the first time, then with growing pauses until it has served for a while.
    ((SECONDS - begin < 60)) || pause=0
    echo "$(date '+%F %T') the ranks ended with status $status; starting again in $pause s" >&2
    sleep "$pause" &
    wait $! || true
    [[ -z $stopping ]] || return 0
    pause=$((pause ? pause * 2 : 1))
    ((pause <= 30)) || pause=30
  done
}
