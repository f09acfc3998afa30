#!/usr/bin/env bash
# What happens on a worker; the other scripts call it there over ssh, and slurm.sh and sky.yaml, too.
#   remote.sh setup · start RUN_ID MODULE [ARGUMENT…] · status RUN_ID · logs RUN_ID · stop RUN_ID
#   remote.sh here RUN_ID MODULE [ARGUMENT…]   in the foreground; leaves with the run's code
# A TPU slice, a Slurm step or one machine by itself: EGJAX_MULTI_HOST=auto finds out. Several hosts
# need a place that all of them see: --run gs://…, or a file system, whose folder is RUNS_DIR, and
# `runs` becomes a link to it. Of a run, ~/egjax-runs/RUN_ID.{pid,log,code,stop} say which process of
# which boot, what it printed, how it ended, and that somebody stopped it.
set -euo pipefail
cd "$(dirname "$0")/.."
state=${EGJAX_STATE:-$HOME/egjax-runs}
mkdir -p "$state"

boot() { cat /proc/sys/kernel/random/boot_id 2>/dev/null || echo unknown; }

# Whether the run's process lives; a number from before a reboot may be another process' now.
running() {
  local process boot
  [[ -f $state/$1.pid ]] || return 1
  read -r process boot <"$state/$1.pid"
  [[ $boot == "$(boot)" ]] && kill -0 "$process" 2>/dev/null
}

setup() {
  # The images have Python 3.10; uv brings a Python of its own. Debian 12 and Ubuntu 24.04 guard theirs
  # against pip, even for the user's own folder, where uv touches nothing of the system.
  PATH=$PATH:$HOME/.local/bin
  command -v uv >/dev/null || python3 -m pip install --quiet --user uv ||
    python3 -m pip install --quiet --user --break-system-packages uv
  [[ -x .venv/bin/python ]] || uv venv --python 3.12 .venv
  local extra=tpu
  if command -v nvidia-smi >/dev/null; then extra=cuda; fi
  uv pip install --quiet --python .venv/bin/python -e ".[all,gcs,${EGJAX_EXTRA:-$extra}]"
  uv pip install --quiet --python .venv/bin/python --no-deps virtualhome-eval==0.1.1
}

link_runs() {
  if [[ -n ${RUNS_DIR:-} && ! -e runs ]]; then ln -s "$RUNS_DIR" runs; fi
}

# The run itself; leaves with its code.
attend() {
  local code=0 child
  shift
  EGJAX_MULTI_HOST=${EGJAX_MULTI_HOST:-auto} .venv/bin/python -m "$@" &
  child=$!
  trap 'kill -TERM "$child" 2>/dev/null || true' TERM
  # A signal ends `wait` early; the child then saves and leaves on its own.
  while true; do
    if wait "$child"; then code=0; else code=$?; fi
    kill -0 "$child" 2>/dev/null || break
  done
  return "$code"
}

# In the background of `start`, in a session of its own.
work() {
  local code=0
  attend "$@" || code=$?
  echo "$code" >"$state/$1.code"
}

here() {
  link_runs
  attend "$@"
}

start() {
  local run=$1
  if running "$run"; then
    echo "run $run is at work (process $(cut -d ' ' -f 1 "$state/$run.pid"))"
    return
  fi
  rm -f "$state/$run.code" "$state/$run.stop"
  link_runs
  setsid nohup bash tpu_scripts/remote.sh work "$@" >>"$state/$run.log" 2>&1 </dev/null &
  echo "$! $(boot)" >"$state/$run.pid"
  echo "run $run started"
}

# running · ended CODE · lost (asked to stop by nobody here, as by a preemption, or because another
# process is gone: the same command goes on) · absent
status() {
  local code
  if running "$1"; then
    echo running
  elif [[ -f $state/$1.code ]]; then
    code=$(<"$state/$1.code")
    if [[ ($code == 143 && ! -f $state/$1.stop) || $code == 4 ]]; then echo lost; else echo "ended $code"; fi
  else
    echo absent
  fi
}

logs() { tail -n 200 -F "$state/$1.log"; }

stop() {
  local process
  running "$1" || { echo "run $1 is not at work"; return; }
  : >"$state/$1.stop"
  read -r process _ <"$state/$1.pid"
  kill -TERM "$process"
  for _ in $(seq 120); do
    running "$1" || { echo "run $1 stopped"; return; }
    sleep 1
  done
  echo "run $1 is still saving" >&2
  return 1
}

case ${1:-} in
  setup | start | work | here | status | logs | stop) "$@" ;;
  *) echo "unknown word: ${1:-}" >&2; exit 2 ;;
esac
