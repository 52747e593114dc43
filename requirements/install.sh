#!/usr/bin/env bash
# Makes a virtual environment that holds exactly a lock and this project, or does nothing if it is there already.
#
#   bash requirements/install.sh requirements/test.txt .venv-test
#   PYTHON=python3.12 bash requirements/install.sh requirements/quickstart.txt .venv
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
LOCK=$1
VENV=$2
PIP=("$VENV/bin/pip" --quiet --disable-pip-version-check install --no-build-isolation)

# The environment keeps a copy of the lock that it was made from. One made from another lock is emptied first, since
# pip would leave behind what the new lock does not name. One without a copy is half made, or not ours to empty.
if [ -e "$VENV/lock.txt" ] && ! cmp -s "$LOCK" "$VENV/lock.txt"; then
  echo "$VENV was made from another lock: making it anew from $LOCK"
  "$PYTHON" -m venv --clear "$VENV"
elif [ ! -x "$VENV/bin/pip" ]; then
  "$PYTHON" -m venv "$VENV"
fi

if [ ! -e "$VENV/lock.txt" ]; then
  # First what builds, then what must be built: without isolation pip builds DeepSpeed with this setuptools, not with
  # the newest one.
  "${PIP[@]}" -r requirements/build.txt
  "${PIP[@]}" -r "$LOCK"
  "$VENV/bin/python" requirements/torchvision_ops.py
  cp "$LOCK" "$VENV/lock.txt"
fi

# The project last: its commands are made from pyproject.toml. --no-deps: what it depends on is the lock's business.
if ! cmp -s pyproject.toml "$VENV/pyproject.toml"; then
  "${PIP[@]}" --no-deps -e .
  cp pyproject.toml "$VENV/pyproject.toml"
fi
