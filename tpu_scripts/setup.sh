#!/usr/bin/env bash
# Copies the committed files to all workers and installs them there; again after every commit.
# Usage: ./setup.sh
source "$(dirname "$0")/env.sh"

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
git -C "$ROOT" archive --format=tar.gz --prefix="$REMOTE_DIR/" -o "$folder/egjax.tar.gz" HEAD
cloud compute tpus tpu-vm scp "$folder/egjax.tar.gz" "$TPU_NAME:egjax.tar.gz" "${WHERE[@]}" \
  --worker all
cloud compute tpus tpu-vm ssh "$TPU_NAME" "${WHERE[@]}" --worker all \
  --command "tar xzf egjax.tar.gz && $(remote setup)"
