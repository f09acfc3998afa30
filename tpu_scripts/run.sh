#!/usr/bin/env bash
# Starts an experiment on all workers; it goes on when this terminal closes. The same command continues
# it.
# Usage: [RUN_ID=…] ./run.sh experiments.pipeline --run gs://bucket/folder …
source "$(dirname "$0")/env.sh"

[[ $# -gt 0 ]] || fail "name the experiment, e.g. ./run.sh experiments.pipeline --run gs://bucket/folder"
on_workers start "$RUN_ID" "$@"
