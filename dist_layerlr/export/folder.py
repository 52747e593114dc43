"""Files of one export: split by size, written beside the earlier one, which they then replace."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dist_layerlr.files import sync_folder, write_text
from dist_layerlr.weights.tensorfile import Entry, file_order, write

FILE_BYTES = 5 * 10**9
"""A larger export is several files with an index."""
_STAGING = ".exporting"
ExportFiles = Mapping[str, Sequence[Entry]]
"""{file name: what goes into it, in order}."""


def split(entries: Sequence[Entry], stem: str, file_bytes: int) -> dict[str, list[Entry]]:
    """{file name: what goes into it, in order}, named and filled as ``save_pretrained`` does it."""
    from huggingface_hub import split_torch_state_dict_into_shards

    by_name = {entry.name: entry for entry in entries}
    described = {e.name: torch.empty(e.shape, dtype=e.dtype, device="meta") for e in entries}
    pattern = stem + "{suffix}.safetensors"
    files = split_torch_state_dict_into_shards(
        described, filename_pattern=pattern, max_shard_size=file_bytes
    )
    return {
        file: file_order([by_name[name] for name in names])
        for file, names in files.filename_to_tensors.items()
    }


def publish(
    folder: Path,
    stem: str,
    files: ExportFiles,
    fetch: Callable[[Entry], Tensor],
    metadata: Mapping[str, str],
    texts: Mapping[str, str],
) -> None:
    """Write all files, then put them in the place of an earlier export.

    Args:
        folder: made if missing.
        stem: of the weight files; others of this stem go.
        files: what goes where.
        fetch: called once for each entry, in order.
        metadata: of every weight file.
        texts: further files.

    Raises:
        OSError: no room, no rights.
    """
    staging = folder / _STAGING
    # What a killed export has left behind is in the way.
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        for file, entries in files.items():
            write(staging / file, entries, fetch, metadata)
        more = dict(texts)
        if len(files) > 1:
            more[f"{stem}.safetensors.index.json"] = _index(files)
        for name, text in more.items():
            write_text(staging / name, text)
        _replace(staging, folder, stem)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _index(files: ExportFiles) -> str:
    total = 0
    places: dict[str, str] = {}
    for file, entries in files.items():
        for entry in entries:
            total += entry.nbytes
            places[entry.name] = file
    index = {"metadata": {"total_size": total}, "weight_map": places}
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


def _replace(staging: Path, folder: Path, stem: str) -> None:
    """Put the new files in the place of the old ones."""
    # Every name that an export of this stem may have: one file, ``-00001-of-00003``, or the index.
    ours = re.compile(rf"{re.escape(stem)}(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
    new = sorted(
        (file.name for file in staging.iterdir()),
        key=lambda name: (name.endswith(".index.json"), name),
    )
    # The old index goes first and the new one comes last, so that no moment shows files of two
    # exports as one.
    indexed = new[-1].endswith(".index.json")
    for old in folder.iterdir():
        if ours.fullmatch(old.name) and (indexed or old.name not in new):
            old.unlink()
    for name in new:
        (staging / name).replace(folder / name)
    sync_folder(folder)
