#!/usr/bin/env bash
# Settings and helpers of the other scripts, which source this file. Every setting is an environment
# variable; DRY_RUN=1 prints the gcloud commands instead of running them.
# shellcheck disable=SC2034  # settings are read by the scripts that source this file
set -euo pipefail

TPU_NAME=${TPU_NAME:-egjax}
ZONE=${ZONE:-us-central1-a}
PROJECT=${PROJECT:-}                                   # empty: that of `gcloud config`
ACCELERATOR_TYPE=${ACCELERATOR_TYPE:-v5litepod-8}
RUNTIME_VERSION=${RUNTIME_VERSION:-v2-alpha-tpuv5-lite}
SPOT=${SPOT:-0}                                        # 1: cheaper, and may be taken away
RUN_ID=${RUN_ID:-main}                                 # the run directory's name, kept over restarts
BUCKET=${BUCKET:-}                                     # gs://bucket/folder that keeps runs, optional
POLL=${POLL:-30}                                       # seconds between two looks
DRY_RUN=${DRY_RUN:-0}

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
REMOTE_DIR=egjax                                       # of the checkout, in the home of each worker
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

# Runs remote.sh with the given words on all workers, or on those that WORKER names.
on_workers() {
  local command
  command=$(printf ' %q' "$@")
  cloud compute tpus tpu-vm ssh "$TPU_NAME" "${WHERE[@]}" --worker "${WORKER:-all}" \
    --ssh-flag="-o ConnectTimeout=30" --ssh-flag="-o ServerAliveInterval=30" \
    --command "bash $REMOTE_DIR/tpu_scripts/remote.sh$command"
}
