#!/usr/bin/env bash
# One run on several nodes under Slurm, one task per GPU, sharded (FSDP2); a run that is preempted continues later.
#   sbatch --nodes 2 scripts/slurm.sh --config configs/llama2_7b.yaml --output-dir runs/llama2_7b
# All nodes must see the output folder, the data and the cache of the tokenised text (HF_DATASETS_CACHE).
#SBATCH --job-name=ast-train
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
resume=()
for ((i = 1; i < $#; i++)); do
    next=$((i + 1))
    if [[ ${!i} == --output-dir && -e ${!next}/config.yaml ]]; then resume=(--resume); fi
done

# Without torchrun, USR1 reaches every rank 300 s before the end, and their exit code comes back.
code=0
# shellcheck disable=SC2016  # the variables are those of each task
srun --wait=60 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec ast-train "$@"
' ast-train "$@" --set training.fsdp=true "${resume[@]}" || code=$?
if [[ $code -eq 75 ]]; then # saved after a request to stop
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
