#!/usr/bin/env bash
# Stops the run on all workers; it saves and leaves, and run.sh continues it. Usage: [RUN_ID=…] ./stop.sh
source "$(dirname "$0")/env.sh"

on_workers stop "$RUN_ID"
