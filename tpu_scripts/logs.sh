#!/usr/bin/env bash
# Follows the run's output on one worker. Usage: [WORKER=0] [RUN_ID=…] ./logs.sh
source "$(dirname "$0")/env.sh"

WORKER=${WORKER:-0} on_workers logs "$RUN_ID"
