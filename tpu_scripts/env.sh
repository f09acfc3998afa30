#!/usr/bin/env bash
# Settings and helpers of the other scripts, which source this file. Every setting is an environment
# variable; DRY_RUN=1 prints the gcloud commands instead of running them.
# shellcheck disable=SC2034  # settings are read by the scripts that source this file
set -euo pipefail

TPU_NAME=${TPU_NAME:-egjax}
ZONE=${ZONE:-us-central1-a}
PROJECT=${PROJECT:-}                                   # empty: that of `gcloud config`
ACCELERATOR_TYPE=${ACCELERATOR_TYPE:-v5litepod-8}
# The image that belongs to the chips (cloud.google.com/tpu/docs/runtimes); none for unknown ones.
case $ACCELERATOR_TYPE in
  v5litepod-*) image=v2-alpha-tpuv5-lite ;;
  v5p-*) image=v2-alpha-tpuv5 ;;
  v6e-*) image=v2-alpha-tpuv6e ;;
  v[234]-*) image=tpu-ubuntu2204-base ;;
  *) image= ;;
esac
RUNTIME_VERSION=${RUNTIME_VERSION:-$image}
SPOT=${SPOT:-0}                                        # 1: cheaper, and may be taken away
RUN_ID=${RUN_ID:-main}                                 # names the run's process on the workers
POLL=${POLL:-30}                                       # seconds between two looks
DRY_RUN=${DRY_RUN:-0}

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
REMOTE_DIR=egjax                                       # of the checkout, in the home of each worker
# What goes to the workers where it is set here. No secret, and nothing that differs between workers,
# as EGJAX_PROCESS does.
PASSED_ON=(RUNS_DIR EGJAX_EXTRA EGJAX_MULTI_HOST EGJAX_BUCKET_SILENCE EGJAX_SILENCE EGJAX_PATIENCE
  EGJAX_TRACEBACK EGJAX_COSTS)
WHERE=(--zone "$ZONE")
if [[ -n $PROJECT ]]; then WHERE+=(--project "$PROJECT"); fi

say() { printf '%s\n' "$*" >&2; }

fail() {
  say "error: $*"
  exit 2
}

# Runs gcloud, or prints what would be run.
cloud() {
  if [[ $DRY_RUN == 1 ]]; then
    printf 'gcloud'
    printf ' %q' "$@"
    printf '\n'
  else
    gcloud "$@"
  fi
}

# One word about a resource: its state, or ABSENT. A question that gets no answer is an error and
# never ABSENT: a lost connection must not make watch.sh delete a slice.
look() {
  local kind=$1 field=$2 answer errors
  errors=$(mktemp)
  if answer=$(gcloud compute tpus "$kind" describe "$TPU_NAME" "${WHERE[@]}" \
    --format "value($field)" 2>"$errors"); then
    rm -f "$errors"
    printf '%s\n' "${answer:-UNKNOWN}"
  elif grep -qi 'not_found\|not found' "$errors"; then
    rm -f "$errors"
    echo ABSENT
  else
    cat "$errors" >&2
    rm -f "$errors"
    return 1
  fi
}

resource_state() { look queued-resources state.state; }
node_state() { look tpu-vm state; }

# The last place that an experiment's arguments name for what it writes; empty: its own default.
place() {
  local found='' previous='' word
  for word in "$@"; do
    case $word in
      --run=* | --out=*) found=${word#--*=} ;;
      *) if [[ $previous == --run || $previous == --out ]]; then found=$word; fi ;;
    esac
    previous=$word
  done
  printf '%s\n' "$found"
}

# Whether that place outlives the slice: a bucket, or the file system that RUNS_DIR names.
lasting() {
  case $1 in
    gs://*) ;;
    runs/* | ./runs/*) [[ -n ${RUNS_DIR:-} ]] ;;
    *) [[ -n ${RUNS_DIR:-} && $1 == "$RUNS_DIR"/* ]] ;;
  esac
}

# The shell command that runs remote.sh with the given words on a worker.
remote() {
  local name
  for name in "${PASSED_ON[@]}"; do
    if [[ -n ${!name:-} ]]; then printf '%s=%q ' "$name" "${!name}"; fi
  done
  printf 'bash %s/tpu_scripts/remote.sh' "$REMOTE_DIR"
  printf ' %q' "$@"
}

# Does so on all workers, or on those that WORKER names.
on_workers() {
  local command
  command=$(remote "$@")
  cloud compute tpus tpu-vm ssh "$TPU_NAME" "${WHERE[@]}" --worker "${WORKER:-all}" \
    --ssh-flag="-o ConnectTimeout=30" --ssh-flag="-o ServerAliveInterval=30" \
    --command "$command"
}
