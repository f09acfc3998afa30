#!/usr/bin/env bash
# What happens on a worker; the other scripts call it there over ssh, and slurm.sh and sky.yaml, too.
#   remote.sh setup · start RUN_ID BUCKET MODULE [ARGUMENT…] · status RUN_ID · logs RUN_ID · stop RUN_ID
#   remote.sh here RUN_ID BUCKET MODULE [ARGUMENT…]   in the foreground; leaves with the run's code
# A TPU slice, a Slurm step or one machine by itself: EGJAX_MULTI_HOST=auto finds out. Several hosts
# need a file system that all of them see: RUNS_DIR is its folder, and `runs` becomes a link to it.
# Of a run, ~/egjax-runs/RUN_ID.{pid,log,code} say which process, what it printed, how it ended.
set -euo pipefail
cd "$(dirname "$0")/.."
state=${EGJAX_STATE:-$HOME/egjax-runs}
mkdir -p "$state"

running() { [[ -f $state/$1.pid ]] && kill -0 "$(<"$state/$1.pid")" 2>/dev/null; }

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

# Copies between the bucket and runs/RUN_ID; only worker 0 writes to the bucket.
restore() {
  if [[ -n ${RUNS_DIR:-} && ! -e runs ]]; then ln -s "$RUNS_DIR" runs; fi
  if [[ -n $2 ]]; then
    mkdir -p "runs/$1"
    # Nothing there yet is no error: the run is new.
    gcloud storage rsync -r "$2/$1" "runs/$1" || echo "nothing restored from $2/$1"
  fi
}
keep() {
  if [[ -n $2 && -d runs/$1 && $(worker_number) == 0 ]]; then
    gcloud storage rsync -r "runs/$1" "$2/$1" || echo "could not copy to $2/$1"
  fi
}
worker_number() {
  local number=${EGJAX_PROCESS:-${SLURM_PROCID:-${TPU_WORKER_ID:-}}}
  if [[ -z $number ]]; then
    number=$(curl -sf -m 5 -H 'Metadata-Flavor: Google' \
      http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number) ||
      number=0
  fi
  echo "$number"
}

# The run itself; leaves with its code.
attend() {
  local run=$1 bucket=$2 code=0 child keeper
  shift 2
  EGJAX_MULTI_HOST=${EGJAX_MULTI_HOST:-auto} .venv/bin/python -m "$@" &
  child=$!
  trap 'kill -TERM "$child" 2>/dev/null || true' TERM
  (while sleep 300; do keep "$run" "$bucket"; done) &
  keeper=$!
  # A signal ends `wait` early; the child then saves and leaves on its own.
  while true; do
    if wait "$child"; then code=0; else code=$?; fi
    kill -0 "$child" 2>/dev/null || break
  done
  kill "$keeper" 2>/dev/null || true
  keep "$run" "$bucket"
  return "$code"
}

# In the background of `start`, in a session of its own.
work() {
  local code=0
  attend "$@" || code=$?
  echo "$code" >"$state/$1.code"
}

here() {
  restore "$1" "$2"
  attend "$@"
}

start() {
  local run=$1 bucket=$2
  if running "$run"; then
    echo "run $run is at work (process $(<"$state/$run.pid"))"
    return
  fi
  rm -f "$state/$run.code"
  restore "$run" "$bucket"
  setsid nohup bash tpu_scripts/remote.sh work "$@" >>"$state/$run.log" 2>&1 </dev/null &
  echo $! >"$state/$run.pid"
  echo "run $run started"
}

status() {
  if running "$1"; then
    echo running
  elif [[ -f $state/$1.code ]]; then
    echo "ended $(<"$state/$1.code")"
  else
    echo absent
  fi
}

logs() { tail -n 200 -F "$state/$1.log"; }

stop() {
  running "$1" || { echo "run $1 is not at work"; return; }
  kill -TERM "$(<"$state/$1.pid")"
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
