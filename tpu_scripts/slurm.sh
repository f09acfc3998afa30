#!/usr/bin/env bash
#SBATCH --job-name=egjax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=egjax-%j.log
# An experiment on GPU nodes under Slurm, from a checkout on a file system that all nodes see, after
# `bash tpu_scripts/remote.sh setup` there. One task a node; a task sees all of its GPUs. Five minutes
# before the time limit, or when preempted, the run saves and leaves, and the job is queued again.
# Usage: sbatch [--nodes=4] tpu_scripts/slurm.sh experiments.pipeline --run runs/main …
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
[[ $# -gt 0 ]] || { echo "error: name the experiment" >&2; exit 2; }

# Lets the preflight name a host that never answers.
EGJAX_HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd, -)
export EGJAX_HOSTS EGJAX_STATE=${EGJAX_STATE:-$PWD/runs/.state}

code=0
srun --kill-on-bad-exit=0 bash tpu_scripts/remote.sh here "$SLURM_JOB_ID" "$@" || code=$?
# 143: asked to stop, all have saved; 4: another node was lost. The same command goes on. A node that
# is lost each time, as where memory does not suffice, ends that.
if [[ $code == 143 || ($code == 4 && ${SLURM_RESTART_COUNT:-0} -lt 10) ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
