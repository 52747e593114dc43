#!/usr/bin/env bash
# From nothing to a finetuned video transformer with per-layer learning rates: about 5 minutes on 2 CPU cores.
#
#   bash launch/quickstart.sh                 # makes .venv from the lock, trains on 2 ranks under FSDP2
#   NPROC=4 bash launch/quickstart.sh         # the same weights from 4 ranks (the global batch is divisible by 4)
#   OUT=/data/run bash launch/quickstart.sh --set train.steps=2000
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
NPROC=${NPROC:-2}
OUT=${OUT:-runs/quickstart}

PYTHON=$PYTHON bash requirements/install.sh requirements/quickstart.txt "$VENV"

"$VENV/bin/python" launch/make_tiny_wan.py runs/quickstart/tiny_wan

# One thread per rank: two ranks on two cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${STOP_S:-270}   # a stop leaves ranks this many seconds to save
"$VENV/bin/torchrun" --standalone --nproc_per_node "$NPROC" launch/train.py \
  --config launch/configs/quickstart.json --sharding fsdp2 --output-dir "$OUT" "$@"

cat <<END

Look at:
  $OUT/lr_grid.png            the learning rates, blocks across, components down
  $OUT/samples/samples.png    generated clips beside real ones
  $OUT/verify.json            the proof that every rank trains at the planned rates
END
