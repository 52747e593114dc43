#!/usr/bin/env bash
# Accelerate as a launcher: it starts the ranks as torchrun does, train.py shards. Do not pass --use_fsdp to it.
#
#   bash launch/run_accelerate.sh --config launch/configs/quickstart.json   # after launch/quickstart.sh made its model
#   NGPU=8 bash launch/run_accelerate.sh --config FILE --sharding ddp --output-dir runs/lora     # the last one counts
#   DRY_RUN=1 bash launch/run_accelerate.sh --config FILE      # prints every learning rate; needs no GPU
set -euo pipefail

NGPU=${NGPU:-2}                                  # ranks on this machine, one per GPU
TRAIN=$(cd "$(dirname "$0")" && pwd)/train.py
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}     # CPU threads per rank

if [ "${DRY_RUN:-0}" = 1 ]; then
  exec "${PYTHON:-python3}" "$TRAIN" --plan-only --sharding fsdp2 "$@"
fi
# --multi_gpu starts one process per rank, on CPU too (--cpu would start a single one); port 0 is any free port.
exec accelerate launch --multi_gpu --num_processes "$NGPU" --num_machines 1 --main_process_port 0 \
  --mixed_precision no --dynamo_backend no "$TRAIN" --sharding fsdp2 "$@"
