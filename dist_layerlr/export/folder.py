"""Files of one export: split by size, written beside the earlier export, put in its place when they
are complete.
"""

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
Files = Mapping[str, Sequence[Entry]]


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
    files: Files,
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
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        for file, entries in files.items():
            write(staging / file, entries, fetch, metadata)
        more = {
            **texts,
            **({f"{stem}.safetensors.index.json": _index(files)} if len(files) > 1 else {}),
        }
        for name, text in more.items():
            write_text(staging / name, text)
        _replace(staging, folder, stem)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _index(files: Files) -> str:
    total = sum(entry.nbytes for entries in files.values() for entry in entries)
    places = {entry.name: file for file, entries in files.items() for entry in entries}
    return (
        json.dumps(
            {"metadata": {"total_size": total}, "weight_map": places}, indent=2, sort_keys=True
        )
        + "\n"
    )


def _replace(staging: Path, folder: Path, stem: str) -> None:
    """The old index goes first and the new one comes last: no moment shows files of two exports as
    one.
    """
    ours = re.compile(rf"{re.escape(stem)}(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
    new = sorted(
        (file.name for file in staging.iterdir()),
        key=lambda name: (name.endswith(".index.json"), name),
    )
    indexed = new[-1].endswith(".index.json")
    for old in folder.iterdir():
        if ours.fullmatch(old.name) and (indexed or old.name not in new):
            old.unlink()
    for name in new:
        (staging / name).replace(folder / name)
    sync_folder(folder)
