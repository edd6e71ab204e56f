#!/usr/bin/env bash
# Trains on all workers of a Cloud TPU slice, with one process on each.
#
#   TPU=my-v5e-64 ZONE=us-west4-a configs/launch/cloud_tpu.sh configs/needle_ring8.py --mesh.data 8 --run.dir /mnt/runs
#
# Before you start: create the slice, and install longattn in ~/longattn on every worker (`pip install -e .[train,tpu]`
# by the ssh line below, with --worker=all). run.dir must be on a file system that all workers share, such as a
# Filestore mount. The arguments are those of `longattn train`; the mesh must use all chips of the slice. After a
# preemption, run it again once the slice is back.
set -euo pipefail

: "${TPU:?the name of the TPU VM or queued resource}"
: "${ZONE:?its zone, such as us-west4-a}"

# Read by longattn on each worker (longattn/launch.py). longattn and JAX ask the metadata
# server which worker this is and where worker 0 is. LONGATTN_COORDINATOR, LONGATTN_PROCESSES and LONGATTN_PROCESS are
# for machines without one.
variables=(
  "LONGATTN_CONNECT=${LONGATTN_CONNECT:-600}"    # seconds until all workers must have come
  "LONGATTN_HEARTBEAT=${LONGATTN_HEARTBEAT:-60}" # seconds of silence after which a worker counts as lost
  # Read by JAX. Without a TPU a worker would go on alone, on its CPU.
  "JAX_PLATFORMS=tpu,cpu"
)

gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
  --command="cd ~/longattn && $(printf '%q ' env "${variables[@]}" longattn train "$@")"
