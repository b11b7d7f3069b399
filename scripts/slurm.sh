#!/usr/bin/env bash
# One run on several nodes under Slurm, one task per GPU; a run that is preempted continues where it stopped.
#   sbatch --nodes 2 scripts/slurm.sh --config RUN.yaml --output-dir OUT
# Arguments go to ast-train. `training.fsdp: true` shards the model (FSDP2), otherwise it is DDP, as with torchrun.
# Options of sbatch before the script replace the lines below: --gpus-per-node 4 --ntasks-per-node 4 --time 2:00:00
# First activate the environment and export HF_HOME: "On a cluster" in ast_sparse/run/README.md says what nodes share.
#SBATCH --job-name=ast-train
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# below the ports that Linux gives to outgoing connections
export MASTER_ADDR=${nodes[0]} MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True} # fewer holes in GPU memory

# srun starts the ranks without torchrun, so USR1 reaches each of them 300 s before the end, and their exit code comes
# back: the highest of all. When one rank dies, the others wait for it, and srun kills them after 60 s (137). That must
# not hide the 75 of a rank that was stopped by a signal and can be continued, so 75 becomes 200 here.
code=0
# shellcheck disable=SC2016  # the variables are those of each task
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --distribution=block --kill-on-bad-exit=0 --wait=60 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
    trap : TERM USR1 # Slurm sends them to this shell too
    ast-train --resume-if-started "$@"
    code=$?
    exit $((code == 75 ? 200 : code))
' ast-train "$@" || code=$?
if [[ $code -eq 200 ]]; then
    if ((${SLURM_RESTART_COUNT:-0} < ${MAX_RESTARTS:-100})); then exec scontrol requeue "$SLURM_JOB_ID"; fi
    echo "Not queued again after $SLURM_RESTART_COUNT restarts: does --time leave enough for a checkpoint?" >&2
    code=75
fi
exit "$code"
