#!/usr/bin/env bash
# HSDP: FSDP2 inside each machine, a replica on each: parameters stay off the slower network. One machine: two halves.
#
#   bash launch/run_hsdp.sh --config launch/configs/quickstart.json   # after launch/quickstart.sh made its model
#   NGPU=8 NNODES=2 HEAD=node0:29500 bash launch/run_hsdp.sh --config FILE      # the same line on both machines
#   DRY_RUN=1 bash launch/run_hsdp.sh --config FILE      # prints every learning rate; needs no GPU
set -euo pipefail

NGPU=${NGPU:-2}                                  # ranks on this machine, one per GPU
NNODES=${NNODES:-1}                              # machines; ranks = NNODES x NGPU
HEAD=${HEAD:-localhost:0}                        # host:port of one of them where ranks meet; port 0: any, one machine
TRAIN=$(cd "$(dirname "$0")" && pwd)/train.py
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}     # CPU threads per rank

if [ "${DRY_RUN:-0}" = 1 ]; then
  exec "${PYTHON:-python3}" "$TRAIN" --plan-only --sharding hsdp "$@"
fi
exec torchrun --nnodes "$NNODES" --nproc_per_node "$NGPU" --rdzv_backend c10d --rdzv_endpoint "$HEAD" \
  --rdzv_id "${RUN_ID:-hsdp}" "$TRAIN" --sharding hsdp "$@"
