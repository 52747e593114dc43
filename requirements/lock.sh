#!/usr/bin/env bash
# Resolves pyproject.toml into exact releases, for every supported Python and every platform. `make lock` calls it.
#
#   UV=.venv-lock/bin/uv bash requirements/lock.sh torch==2.13.0
set -euo pipefail
cd "$(dirname "$0")/.."

UV=${UV:-uv}
TORCH=$1

header() {
  cat <<'END'
# Made by `make lock` from pyproject.toml: exact releases for every Python from 3.10 on and every platform. Do not edit.
# torch has no local version, so that a CPU build (as 2.13.0+cpu) and a CUDA build both satisfy its line. The packages
# of CUDA (nvidia-*, cuda-*, triton) are left out for the same reason: the metadata of a CUDA build names them, nearly
# all at exact releases, and a CPU build needs none. The builds differ, so there are no hashes either.
END
}

# lock FILE OPTION...: uv reads metadata only, so no build of torch is downloaded. The file is written last: one that
# cannot be resolved stays as it was.
lock() {
  local file=requirements/$1 resolved
  resolved=$("$UV" pip compile --quiet --universal --python-version 3.10 --no-header --annotation-style line "${@:2}")
  header > "$file"
  # The last two expressions take the path of pyproject.toml and uv's padding out of the comments.
  sed -E -e '/^(nvidia-|cuda-|triton)/d' -e 's/dist-layerlr \([^()]*\)/pyproject.toml/' -e 's/ +# +via/  # via/' \
    <<< "$resolved" >> "$file"
}

TRAIN=(pyproject.toml --extra train --extra plot)
# setuptools is in all of them: what is installed must not move what has just built it.
BUILT=(--constraint requirements/build.txt)
lock build.txt --group build
lock quickstart.txt "${TRAIN[@]}" "${BUILT[@]}" - <<< "$TORCH"
lock test.txt "${TRAIN[@]}" "${BUILT[@]}" --extra families --extra dev - <<< "$TORCH"
lock oldest.txt "${TRAIN[@]}" --extra dev --resolution lowest-direct
