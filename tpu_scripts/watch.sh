#!/usr/bin/env bash
# Runs an experiment to its end on a slice that may be taken away: after each preemption the slice is
# deleted and asked for again, and the run continues in its place (--run gs://…, because the workers'
# disks go with the slice). Leaves with the run's exit code.
# Usage: SPOT=1 [RUN_ID=…] ./watch.sh experiments.pipeline --run gs://bucket/folder …
source "$(dirname "$0")/env.sh"
here=$(dirname "$0")

[[ $# -gt 0 ]] || fail "name the experiment, e.g. ./watch.sh experiments.pipeline --run gs://bucket/folder"
if [[ $SPOT == 1 ]] && ! lasting "$(place "$@")"; then
  fail "SPOT=1 needs --run gs://… (or RUNS_DIR, a shared file system): the workers' disks go with the slice"
fi
again=10  # restarts of a run that was lost where its slice was not

bring_up() { "$here/create.sh" && "$here/setup.sh" && "$here/run.sh" "$@"; }

# The same, and to the end where trying again is no use (create.sh: 3).
try() {
  bring_up "$@" || case $? in
    3) exit 2 ;;
    *) say "could not bring it up; trying again" ;;
  esac
}

if [[ $DRY_RUN == 1 ]]; then
  bring_up "$@"
  on_workers status "$RUN_ID"
  "$here/delete.sh"
  exit
fi

# gone · there · unknown (no answer: look again later)
slice() {
  local resource node
  resource=$(resource_state) || { echo unknown; return; }
  node=$(node_state) || { echo unknown; return; }
  case $resource/$node in
    ABSENT/* | SUSPENDING/* | SUSPENDED/* | FAILED/*) echo gone ;;
    ACTIVE/PREEMPTED | ACTIVE/TERMINATED | ACTIVE/ABSENT) echo gone ;;
    *) echo there ;;
  esac
}

while true; do
  case $(slice) in
    gone)
      say "$(date -u +%FT%TZ) $TPU_NAME is gone: asking for it again, run $RUN_ID"
      "$here/delete.sh" || say "could not delete; trying again"
      try "$@"
      ;;
    there)
      # running · ended <code> · lost · absent; the run has ended when worker 0's has. Where setup has
      # not been yet bash finds no script (127); any other failure is a connection's.
      answer=$(WORKER=0 on_workers status "$RUN_ID" 2>/dev/null) || case $? in
        127) answer=absent ;;
        *) answer=unknown ;;
      esac
      case $answer in
        "ended "*)
          say "run $RUN_ID: $answer"
          exit "${answer#ended }"
          ;;
        lost)
          # The slice may be about to go, or have come back: seen by the next look.
          sleep "$POLL"
          if [[ $(slice) == there ]]; then
            ((again-- > 0)) || fail "run $RUN_ID was lost again and again; see logs.sh"
            say "$(date -u +%FT%TZ) run $RUN_ID was lost, its slice is there: starting it again"
            try "$@"
          fi
          ;;
        absent) try "$@" ;;
      esac
      ;;
  esac
  sleep "$POLL"
done
