#!/usr/bin/env bash
# DeepSpeed ZeRO, by a file of ds_configs/ (its README says what each is for).
#
#   bash launch/run_deepspeed.sh --config launch/configs/quickstart.json   # after launch/quickstart.sh made its model
#   NGPU=8 DS_CONFIG=ds_configs/zero3_offload.json bash launch/run_deepspeed.sh --config FILE --output-dir runs/big
#   DRY_RUN=1 bash launch/run_deepspeed.sh --config FILE      # prints every learning rate; needs no GPU
set -euo pipefail

NGPU=${NGPU:-2}                                  # ranks on this machine, one per GPU
HERE=$(cd "$(dirname "$0")" && pwd)
DS_CONFIG=${DS_CONFIG:-$HERE/../ds_configs/zero2.json}
PORT=${PORT:-29500}                              # another job on this machine needs another one
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}     # CPU threads per rank

if [ "${DRY_RUN:-0}" = 1 ]; then
  exec "${PYTHON:-python3}" "$HERE/train.py" --plan-only --deepspeed_config "$DS_CONFIG" "$@"
fi
exec deepspeed --num_gpus "$NGPU" --master_port "$PORT" "$HERE/train.py" --deepspeed_config "$DS_CONFIG" "$@"
