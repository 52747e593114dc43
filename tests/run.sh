#!/usr/bin/env bash
# Makes the test environment and passes all tests.
#
#   bash tests/run.sh                      # everything, with the releases in requirements/test.txt
#   bash tests/run.sh tests/unit           # what pytest is given
#   bash tests/run.sh --latest             # with the newest releases that pyproject.toml allows
#   PYTHON=python3.10 bash tests/run.sh --oldest   # with the oldest ones, requirements/oldest.txt
#   TORCH=torch==2.13.0 bash tests/run.sh --latest  # the newest of all but torch
#   WORKERS=0 bash tests/run.sh            # in one process, as a debugger needs it
set -euo pipefail
cd "$(dirname "$0")/.."

export PYTHON=${PYTHON:-python3}
case "${1:-}" in
  --latest)
    shift
    VENV=${VENV:-.venv-latest}
    [ -x "$VENV/bin/pip" ] || "$PYTHON" -m venv "$VENV"
    # Each run asks again, because newest means today's. pip is told --upgrade so that it leaves nothing older in place.
    "$VENV/bin/pip" install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager \
      ${TORCH:+"$TORCH"} setuptools -e ".[train,plot,families,dev]"
    "$VENV/bin/python" requirements/torchvision_ops.py
    ;;
  --oldest)
    shift
    VENV=${VENV:-.venv-oldest}
    bash requirements/install.sh requirements/oldest.txt "$VENV"
    ;;
  *)
    VENV=${VENV:-.venv-test}
    bash requirements/install.sh requirements/test.txt "$VENV"
    ;;
esac

# DeepSpeed compiles its ops on first use; environments must not share what they compiled.
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$PWD/$VENV/torch_extensions}
# Files are shared out among workers, each whole to one: many tests of a file share a set of ranks. They keep their
# order, because the fake device of tests/offload cannot be registered in a process that has run a backward pass.
exec "$VENV/bin/python" -m pytest -n "${WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
