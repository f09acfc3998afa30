#!/usr/bin/env bash
# Gives the slice back. Usage: ./delete.sh
source "$(dirname "$0")/env.sh"

if [[ $DRY_RUN != 1 ]]; then
  state=$(resource_state)
  if [[ $state == ABSENT ]]; then
    say "$TPU_NAME: nothing to delete"
    exit
  fi
fi
cloud compute tpus queued-resources delete "$TPU_NAME" "${WHERE[@]}" --force --quiet
