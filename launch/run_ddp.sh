#!/usr/bin/env bash
# DDP: a whole copy of the model on every GPU. For models that fit with their optimizer state, and for LoRA.
#
#   bash launch/run_ddp.sh --config launch/configs/quickstart.json   # after launch/quickstart.sh made its model
#   NGPU=8 bash launch/run_ddp.sh --config FILE --output-dir runs/lora --set adapter.rank=32
#   DRY_RUN=1 bash launch/run_ddp.sh --config FILE      # prints every learning rate; needs no GPU
set -euo pipefail

NGPU=${NGPU:-2}                                  # ranks on this machine, one per GPU
TRAIN=$(cd "$(dirname "$0")" && pwd)/train.py
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}     # CPU threads per rank

if [ "${DRY_RUN:-0}" = 1 ]; then
  exec "${PYTHON:-python3}" "$TRAIN" --plan-only --sharding ddp "$@"
fi
exec torchrun --standalone --nproc_per_node "$NGPU" "$TRAIN" --sharding ddp "$@"
