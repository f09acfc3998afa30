#!/usr/bin/env bash
# Starts an experiment on all workers; it goes on when this terminal closes. The run directory is
# runs/$RUN_ID, so the same command continues it.
# Usage: [RUN_ID=…] [BUCKET=gs://…] ./run.sh experiments.pipeline --run "runs/$RUN_ID" …
source "$(dirname "$0")/env.sh"

[[ $# -gt 0 ]] || fail "name the experiment, e.g. ./run.sh experiments.pipeline --run runs/$RUN_ID"
check_place "$@"
on_workers start "$RUN_ID" "$BUCKET" "$@"
