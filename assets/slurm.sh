#!/bin/bash
# Trains a run on a SLURM cluster: one process for each GPU, over any number of nodes. Prepare the run folder with notebooks 01
# and 02 first (on a file system that all nodes see), then, from the repository:
#
#     sbatch assets/slurm.sh runs/colab
#     sbatch --nodes=2 --gpus-per-node=2 assets/slurm.sh runs/colab
#
# The recipe's effective batch is shared by all processes, so their number changes the speed and not the result. A step has
# batch_size x accumulation slices (of volumes patches) in `accumulation` micro-batches (4 x 4 in the recipe): more processes than micro-batches
# leave some of them idle. A job that is stopped, or runs out of time, goes on from the last checkpoint when it is sent again;
# --requeue does that by itself after a preemption.

#SBATCH --job-name=wmh-train
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail
run="${1:?give the run folder: sbatch assets/slurm.sh runs/colab}"
gpus="${SLURM_GPUS_ON_NODE:-1}"
head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
port=$((20000 + SLURM_JOB_ID % 20000))  # two jobs on a node do not meet

# One launcher a node; it starts a process for each GPU there. SLURM_NODEID is known on the node alone, hence the quotes.
export run gpus head port OMP_NUM_THREADS="$((${SLURM_CPUS_PER_TASK:-16} / gpus))"
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-16}" --kill-on-bad-exit=1 bash -c '
  several=$([ $((SLURM_NNODES * gpus)) -gt 1 ] && echo --multi_gpu || true)
  exec .venv/bin/accelerate launch $several --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * gpus))" \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$head" --main_process_port "$port" --mixed_precision no --dynamo_backend no \
    -m wmhlib.training "$run"'
