#!/usr/bin/env bash
# Asks for a TPU slice (a queued resource) and waits until it is there. Usage: [SPOT=1] ./create.sh
source "$(dirname "$0")/env.sh"

if [[ -z $RUNTIME_VERSION ]]; then
  say "error: no image is known for $ACCELERATOR_TYPE; set RUNTIME_VERSION (cloud.google.com/tpu/docs/runtimes)"
  exit 3
fi
request=(compute tpus queued-resources create "$TPU_NAME" --node-id "$TPU_NAME" "${WHERE[@]}"
  --accelerator-type "$ACCELERATOR_TYPE" --runtime-version "$RUNTIME_VERSION")
if [[ $SPOT == 1 ]]; then request+=(--spot); fi

if [[ $DRY_RUN == 1 ]]; then
  cloud "${request[@]}"
  exit
fi

state=$(resource_state)
if [[ $state == ABSENT ]]; then
  errors=$(mktemp)
  trap 'rm -f "$errors"' EXIT
  if ! cloud "${request[@]}" 2> >(tee "$errors" >&2); then
    # No waiting mends these; anything else may have been half done, and the next try finds it.
    if grep -qiE 'quota|permission_denied|permission denied|invalid_argument' "$errors"; then
      say "error: $TPU_NAME cannot be had so: see above; another ZONE or ACCELERATOR_TYPE, or ask for quota"
      exit 3
    fi
    exit 1
  fi
  state=$(resource_state)
fi
until [[ $state == ACTIVE ]]; do
  case $state in
    FAILED | SUSPENDING | SUSPENDED | DELETING)
      fail "$TPU_NAME is $state; ./delete.sh it, then ask again" ;;
  esac
  say "$TPU_NAME: $state"
  sleep "$POLL"
  state=$(resource_state)
done
say "$TPU_NAME: ACTIVE"
