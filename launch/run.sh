#!/usr/bin/env bash
# Start the main job under one sharder: none ddp fsdp1 fsdp1_flat fsdp2 hsdp zero. What follows it goes to train.py.
#
#   bash launch/run.sh fsdp2 --config launch/configs/quickstart.json   # after launch/quickstart.sh made its model
#   NGPU=8 NNODES=2 HEAD=node0:29500 bash launch/run.sh hsdp --config FILE      # the same line on both machines
#   DRY_RUN=1 bash launch/run.sh ddp --config FILE      # prints every learning rate; needs no GPU
#
# zero reads DS_CONFIG, a file of ds_configs/ (its README says what each is for). LAUNCHER=accelerate, or deepspeed,
# starts the ranks instead of torchrun. A stop (SIGTERM) leaves ranks STOP_S seconds to finish a microbatch and save.
set -euo pipefail

SHARDER=${1:?name a sharder: none ddp fsdp1 fsdp1_flat fsdp2 hsdp zero}; shift
NGPU=${NGPU:-2}                                  # ranks on this machine, one per GPU
NNODES=${NNODES:-1}                              # machines; ranks = NNODES x NGPU
HEAD=${HEAD:-localhost:0}                        # host:port of one of them where ranks meet; port 0: any, one machine
HERE=$(cd "$(dirname "$0")" && pwd)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}     # CPU threads per rank
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${STOP_S:-270}   # torch's own 30 s are shorter than a step of a large model

JOB=("$HERE/train.py" --sharding "$SHARDER" "$@")
if [ "$SHARDER" = zero ]; then
  JOB=("$HERE/train.py" --deepspeed_config "${DS_CONFIG:-$HERE/../ds_configs/zero2.json}" "$@")
fi
if [ "${DRY_RUN:-0}" = 1 ]; then
  exec "${PYTHON:-python3}" "${JOB[@]}" --plan-only
fi
case "$SHARDER ${LAUNCHER:-}" in
  "none "*) exec "${PYTHON:-python3}" "${JOB[@]}" ;;
  # --multi_gpu starts one process per rank, on CPU too (--cpu would start a single one); port 0 is any free port.
  *" accelerate") exec accelerate launch --multi_gpu --num_processes "$NGPU" --num_machines 1 --main_process_port 0 \
    --mixed_precision no --dynamo_backend no "${JOB[@]}" ;;
  # Another job on this machine needs another PORT: DeepSpeed's launcher takes no free one by itself. It kills ranks
  # 30 s after a stop, whatever STOP_S says.
  *" deepspeed") exec deepspeed --num_gpus "$NGPU" --master_port "${PORT:-29500}" "${JOB[@]}" ;;
  *) exec torchrun --nnodes "$NNODES" --nproc_per_node "$NGPU" --rdzv_backend c10d --rdzv_endpoint "$HEAD" \
    --rdzv_id "${RUN_ID:-$SHARDER}" "${JOB[@]}" ;;
esac
