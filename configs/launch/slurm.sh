#!/usr/bin/env bash
# Trains on several nodes of a SLURM cluster: one process on each node, with all of the node's GPUs.
#
#   sbatch configs/launch/slurm.sh configs/needle_ring8.py --mesh.data 2      (2 nodes of 8 GPUs: 16 devices)
#
# Options before the config file go to sbatch, those after it to `longattn train`. The mesh must use all devices.
# run.dir (runs/ in the folder that sbatch was called in) must be on a file system that all nodes share.
#
#SBATCH --job-name=longattn
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1     # one process for a node's GPUs; with more, let SLURM give each its own: --gpus-per-task
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --requeue               # after a lost node: the same command, which goes on from the last checkpoint
#SBATCH --signal=TERM@120       # two minutes before the time is over; training saves and exits with 143
#SBATCH --output=%x-%j.log
set -euo pipefail

# Read by longattn (longattn/launch.py). srun sets the number of each process: SLURM_PROCID of SLURM_STEP_NUM_TASKS.
# Process 0 listens on the first node of SLURM_STEP_NODELIST.
export LONGATTN_CONNECT=600     # seconds until all processes must have come: nodes may start late
export LONGATTN_HEARTBEAT=60    # seconds of silence after which a process counts as lost; the others exit with 75
# export LONGATTN_PORT=8476     # process 0's port; by default one made of SLURM_JOB_ID, above 61440

# Read by JAX.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/.jax_cache}" # compiled programs, for the next start

# Read by NCCL: the interface between nodes, where it chooses the wrong one.
# export NCCL_SOCKET_IFNAME=eth0

status=0
# --kill-on-bad-exit=0: the other processes notice a lost one by themselves, and say which one it was.
srun --kill-on-bad-exit=0 longattn train "$@" || status=$?
if [ "$status" -eq 75 ] || [ "$status" -eq 137 ]; then # a process was lost (75), or killed (128 + 9)
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
