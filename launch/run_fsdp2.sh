#!/usr/bin/env bash
# FSDP2: parameters, gradients and optimizer state in rows over all GPUs of this machine. Start here.
#
#   bash launch/run_fsdp2.sh --config launch/configs/quickstart.json   # after launch/quickstart.sh made its model
#   NGPU=8 bash launch/run_fsdp2.sh --config FILE --output-dir runs/wan --set train.steps=2000
#   DRY_RUN=1 bash launch/run_fsdp2.sh --config FILE      # prints every learning rate; needs no GPU
set -euo pipefail

NGPU=${NGPU:-2}                                  # ranks on this machine, one per GPU
TRAIN=$(cd "$(dirname "$0")" && pwd)/train.py
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}     # CPU threads per rank

if [ "${DRY_RUN:-0}" = 1 ]; then
  exec "${PYTHON:-python3}" "$TRAIN" --plan-only --sharding fsdp2 "$@"
fi
exec torchrun --standalone --nproc_per_node "$NGPU" "$TRAIN" --sharding fsdp2 "$@"
