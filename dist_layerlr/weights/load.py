"""Pretrained weights straight into a live model, sharded or not.

Each rank reads the bytes of its own elements, no more. Build the model without memory, shard it,
then load::

    with accelerate.init_empty_weights(include_buffers=False):
        model = build()
    ...  # plan, fully_shard
    materialize(model, device)
    load_pretrained(model, folder)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from dist_layerlr.errors import ModelSourceError
from dist_layerlr.plan.entries import Shape
from dist_layerlr.plan.names import base_name, canonical_name, parse
from dist_layerlr.plan.read import checkpoint_files
from dist_layerlr.ranks import alike
from dist_layerlr.sharders import Weight, sharder_of
from dist_layerlr.sharders.model import unwrap
from dist_layerlr.weights.disk_names import Stored, under_live_names
from dist_layerlr.weights.picklefile import SUFFIXES, pickled_tensors
from dist_layerlr.weights.tensorfile import FileTensor, Part, stored_tensors

Pretrained = str | Path | Iterable[Path]
"""A checkpoint folder, a safetensors file or a ``.pth`` of torch.save, or several files."""
Fresh = Callable[[str, Shape], Tensor]
"""(canonical name, shape) -> the first value of a parameter that no file holds."""
Matched = list[tuple[Weight, Stored | None]]
"""What the model holds and where a file has it; None: it begins anew, as an adapter does."""
CHUNK = 1 << 24
"""Elements read at once where they are cast or go to a device: the memory that loading needs beside
the model itself, 64 MiB in fp32."""


def load_pretrained(
    model: nn.Module,
    source: Pretrained,
    *,
    fresh: Fresh | None = None,
    anew: Collection[str] = (),
) -> None:
    """Fill every parameter and persistent buffer, whatever wraps or shards the model. Collective.

    Values take the dtype of the live tensor; under ZeRO the fp32 masters are filled, and the
    low-precision copies from them. Nothing is written unless all ranks find everything in order.

    Args:
        model: after sharding, and after ``deepspeed.initialize``; its parameters are real.
        source: a checkpoint folder, a safetensors file, or several.
        fresh: (canonical name, shape) -> value of an adapter's parameter, which no checkpoint
            holds, and of those in ``anew``. The same on all ranks.
        anew: canonical names that are not read, whatever the files hold under them, such as a head
            for another number of classes. They need ``fresh``.

    Raises:
        ModelSourceError: on all ranks alike; see ``check_pretrained``, or a file that cannot be
            read.
    """
    sharder = sharder_of(model)
    # Two agreements: no rank writes its first element before every rank has matched all names.
    names = _anew(anew, fresh is not None)
    matched = alike(lambda: _match(model, sharder.true_weights(), source, names))
    alike(lambda: _fill(matched, fresh))
    # ZeRO computes with low-precision copies, which are made from the masters that were filled.
    sharder.refresh()


def check_pretrained(
    model: nn.Module, source: Pretrained, *, fresh: bool = False, anew: Collection[str] = ()
) -> None:
    """Refuse a checkpoint that does not fit the model, from file headers alone.

    The model may be on the meta device.

    Args:
        model: sharded or not.
        source: as for ``load_pretrained``.
        fresh: whether adapters' parameters may be missing.
        anew: as for ``load_pretrained``.

    Raises:
        ModelSourceError: damaged file, or a tensor that is missing, too many, of another shape or
            kind of number.
    """
    _match(model, sharder_of(model).weights(), source, _anew(anew, fresh))


def pretrained_tensors(model: nn.Module, source: Pretrained) -> Mapping[str, Stored]:
    """Where the files have each tensor, by its name in the base model: headers are read alone.

    Args:
        model: sharded or not; its class says which names of the files stand for which of its own.
        source: as for ``load_pretrained``.

    Raises:
        ModelSourceError: damaged file, or names that cannot be turned into the model's.
    """
    return _under_live_names(model, sharder_of(model).weights(), source)


def _under_live_names(
    model: nn.Module, weights: list[Weight], source: Pretrained
) -> Mapping[str, Stored]:
    inner = unwrap(model)
    # Buffers that the model computes are no weights, but a file may hold them.
    live = {canonical_name(name) for name, _ in inner.named_buffers()}
    for weight in weights:
        live.update(base_name(name) for name in (weight.name, *weight.aliases))
    return under_live_names(inner, live, _stored(source))


def _anew(names: Collection[str], fresh: bool) -> Callable[[str], bool]:
    """Whether a name of the model is made, and not read."""
    if names and not fresh:
        raise ValueError("Weights that begin anew need fresh=, which makes their values.")
    return lambda name: fresh and (parse(name).is_adapter or base_name(name) in names)


def _match(
    model: nn.Module, weights: list[Weight], source: Pretrained, anew: Callable[[str], bool]
) -> Matched:
    matched: Matched = []
    used: set[str] = set()
    stored = _under_live_names(model, weights, source)
    for weight in weights:
        # A file holds a tied tensor once, under any of its names.
        names = [base_name(name) for name in (weight.name, *weight.aliases)]
        if anew(weight.name):
            # What the file holds under these names is no mistake, but for another head.
            if not parse(weight.name).is_adapter:
                used.update(names)
            matched.append((weight, None))
            continue
        used.update(names)
        found = next((stored[name] for name in names if name in stored), None)
        if found is None:
            raise ModelSourceError(
                f"Checkpoint {_where(source)} lacks tensor {names[0]!r} that the model needs."
            )
        _check_fit(weight, found)
        matched.append((weight, found))
    # Some files hold buffers that the model computes itself; those are neither read nor refused.
    computed = {canonical_name(name) for name, _ in unwrap(model).named_buffers()}
    extra = sorted(stored.keys() - used - computed)
    if extra:
        file = str(stored[extra[0]].file)
        raise ModelSourceError(
            f"File {file!r} has tensor {extra[0]!r}, which the model does not have."
        )
    return matched


def _check_fit(weight: Weight, stored: Stored) -> None:
    where = f"Tensor {stored.name!r} in {str(stored.file)!r}"
    if stored.shape != weight.shape:
        raise ModelSourceError(f"{where} has shape {stored.shape}; the model needs {weight.shape}.")
    if stored.dtype.is_floating_point != weight.dtype.is_floating_point:
        raise ModelSourceError(f"{where} is {stored.dtype}; the model needs {weight.dtype}.")


@torch.no_grad()
def _fill(matched: Matched, fresh: Fresh | None) -> None:
    by_file: dict[Path, list[tuple[Part, Weight, int]]] = {}
    made: tuple[str, Tensor] | None = None
    for weight, stored in matched:
        if stored is not None:
            at = 0
            for part in stored.parts(weight.start, weight.numel):
                by_file.setdefault(part.stored.file, []).append((part, weight, at))
                at += part.numel
        elif weight.numel:
            assert fresh is not None
            # The spans of one name follow each other: its value is made once for all of them.
            if made is None or made[0] != weight.name:
                made = (weight.name, fresh(weight.name, weight.shape).reshape(-1))
            weight.tensor.copy_(made[1][weight.start : weight.start + weight.numel])
    for path, rows in by_file.items():
        _fill_from(path, rows)
    # The parts of one weight may lie in several files, so that it is whole only now.
    for weight, _ in matched:
        weight.write_home()


def _fill_from(path: Path, rows: list[tuple[Part, Weight, int]]) -> None:
    """Read from one file, which is opened once, in the order of its bytes."""
    rows.sort(key=lambda row: row[0].offset)
    stored = rows[0][0].stored
    try:
        with path.open("rb", buffering=0) as file:
            for part, weight, at in rows:
                stored = part.stored
                _read(file, part, weight.tensor[at : at + part.numel])
    except OSError as error:
        raise stored.unreadable(error) from None


def _read(file: BinaryIO, part: Part, into: Tensor) -> None:
    stored = part.stored
    if into.dtype == stored.dtype and into.device.type == "cpu":
        stored.read_from(file, part.start, part.numel, into)
        return
    for first in range(0, part.numel, CHUNK):
        numel = min(CHUNK, part.numel - first)
        into[first : first + numel].copy_(stored.read_from(file, part.start + first, numel))


def _stored(source: Pretrained) -> Mapping[str, FileTensor]:
    files = _files(Path(source)) if isinstance(source, (str, Path)) else list(source)
    found: dict[str, FileTensor] = {}
    for file in files:
        found |= pickled_tensors(file) if file.suffix in SUFFIXES else stored_tensors(file)
    return found


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    pickled = [file for suffix in SUFFIXES for file in path.glob(f"*{suffix}")]
    # Beside safetensors they are the same weights in an older form, or others.
    if len(pickled) == 1 and not any(path.glob("*.safetensors")):
        return pickled
    return checkpoint_files(path)


def _where(source: Pretrained) -> str:
    return repr(str(source)) if isinstance(source, (str, Path)) else "of several files"
