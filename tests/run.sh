#!/usr/bin/env bash
# Makes the test environment and passes all tests.
#
#   bash tests/run.sh                      # everything
#   bash tests/run.sh tests/unit           # what pytest is given
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv-test}

if [ ! -x "$VENV/bin/pytest" ]; then
  "$PYTHON" -m venv "$VENV"
  "$VENV/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
  "$VENV/bin/pip" install --quiet --disable-pip-version-check -e ".[train,plot,dev]"
fi

# DeepSpeed compiles its ops on first use; environments must not share what they compiled.
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$PWD/$VENV/torch_extensions}
exec "$VENV/bin/python" -m pytest "$@"
