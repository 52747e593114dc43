"""``checkpoint.json``: what a checkpoint is of, readable by people and sealed by a checksum.

Pure.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dist_layerlr import fields
from dist_layerlr.checkpoint.folders import MANIFEST
from dist_layerlr.checkpoint.schema import Parser, checked, checksum, count, damaged, each, record
from dist_layerlr.errors import CheckpointError
from dist_layerlr.files import write_text
from dist_layerlr.plan.names import without_rank

FORMAT = 1
SHOWN = 5
"""Names in an error."""
_PAIRS = "__pairs__"


@dataclass(frozen=True, kw_only=True)
class TensorRecord:
    """One parameter or persistent buffer of the saved model."""

    shape: tuple[int, ...]
    dtype: str
    """As torch spells it, without ``torch.``."""
    trainable: bool
    aliases: tuple[str, ...] = ()
    """Other names tied to it."""
    saved: bool = True
    """Whether its values are here; the frozen base under adapters is told by samples alone."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Content of ``checkpoint.json``."""

    step: int
    """Optimizer steps done."""
    factor: float
    """Schedule multiplier in force."""
    digest: str
    """Of the plan."""
    sharder: str
    ranks: int
    optimizer: str
    """Class of the optimizer that steps the elements."""
    parameters: Mapping[str, TensorRecord]
    extra: Mapping[str, Any] = field(default_factory=dict)
    """The caller's."""
    objects: tuple[str, ...] = ()
    """Keys of ``extra`` whose values are states of objects."""
    sharder_state: Mapping[str, Any] = field(default_factory=dict)
    """Counters and loss scale of DeepSpeed."""
    files: Mapping[str, int] = field(default_factory=dict)
    """CRC-32 of the other JSON files."""
    optimizers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """{class: names that it steps}, where the plan names several; empty: ``optimizer`` steps all.
    Left out of the file when empty, so that older versions read what they can."""

    def stepper_of(self, name: str) -> str:
        """Class of the optimizer that stepped a saved name."""
        return self._steppers.get(name, self.optimizer)

    @cached_property
    def _steppers(self) -> dict[str, str]:
        return {name: kind for kind, names in self.optimizers.items() for name in names}

    def with_files(self, files: Mapping[str, int]) -> Manifest:
        """A copy that seals other files, too."""
        return replace(self, files=files)

    def write(self, folder: Path) -> None:
        """Write ``checkpoint.json`` to disk."""
        content = {"format": FORMAT, **asdict(self), "extra": packed(self.extra)}
        if not self.optimizers:
            del content["optimizers"]
        text = json.dumps({"crc32": zlib.crc32(_canonical(content)), "content": content}, indent=1)
        write_text(folder / MANIFEST, text + "\n")

    def name_of(self, name: str, aliases: tuple[str, ...] = ()) -> str | None:
        """The saved name of a live parameter, which may be tied under another.

        None: not in this checkpoint.
        """
        return next((self._known[n] for n in (name, *aliases) if n in self._known), None)

    @cached_property
    def _known(self) -> dict[str, str]:
        known: dict[str, str] = {}
        for name, row in self.parameters.items():
            known |= dict.fromkeys(row.aliases, name)
            own = without_rank(name)
            if own is not None:
                # Saved once for each rank: any of them tells the shape.
                known.setdefault(own, name)
        # Names come last: a name of its own is no alias of another tensor.
        return known | dict(zip(self.parameters, self.parameters, strict=True))


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``checkpoint.json``.

    Raises:
        CheckpointError: missing, damaged, of another format, or with a field that is missing or
            wrong.
    """
    path = folder / MANIFEST
    try:
        sealed = json.loads(path.read_text(encoding="utf-8"))
        content = sealed["content"]
        intact = sealed["crc32"] == zlib.crc32(_canonical(content))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from None
    if not intact:
        raise damaged(path, "its checksum is wrong")
    with checked(path):
        # The format comes first: another one has other fields.
        found = fields.mapping("content", content).get("format")
        if found != FORMAT:
            raise CheckpointError(
                f"Checkpoint {str(folder)!r} has format {found!r}; this version reads format"
                f" {FORMAT}."
            )
        row = record("content", {"optimizers": {}, **content}, _CONTENT)
        del row["format"]
        return Manifest(**row)


def read_sealed(folder: Path, name: str, manifest: Manifest) -> Any:
    """A JSON file of the checkpoint, checked against the manifest.

    Raises:
        CheckpointError: missing or damaged.
    """
    path = folder / name
    if name not in manifest.files:
        raise damaged(folder / MANIFEST, f"Invalid content.files: {name!r} is missing")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise damaged(path, str(error.strerror)) from None
    if zlib.crc32(data) != manifest.files[name]:
        raise damaged(path, "its checksum is wrong")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from None


def packed(value: Any) -> Any:
    """As JSON can hold it: numbers that are keys, which it would turn into text, become pairs."""
    if isinstance(value, (list, tuple)):
        return [packed(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    row = {key: packed(item) for key, item in value.items()}
    numbered = any(isinstance(key, (int, float)) for key in row)
    scalars = all(isinstance(key, (str, int, float)) for key in row)
    return {_PAIRS: list(map(list, row.items()))} if numbered and scalars else row


def unpacked(value: Any) -> Any:
    """Inverse of ``packed``, but for tuples, which have become lists."""
    if isinstance(value, list):
        return list(map(unpacked, value))
    if not isinstance(value, dict):
        return value
    pairs = value[_PAIRS] if value.keys() == {_PAIRS} else value.items()
    return {key: unpacked(item) for key, item in pairs}


def model_problem(
    manifest: Manifest, live: Mapping[str, tuple[tuple[int, ...], tuple[str, ...]]]
) -> str | None:
    """What makes the live model another one than the saved: names or shapes; None: the same.

    Args:
        manifest: of the checkpoint.
        live: {name: (shape, aliases)} of every parameter and persistent buffer.
    """
    matched: dict[str, str | None] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (shape, aliases) in live.items():
        matched[name] = manifest.name_of(name, aliases)
        shapes[name] = shape
    lacking = [name for name, saved in matched.items() if saved is None]
    known, extra = set(matched.values()), []
    for name, row in manifest.parameters.items():
        # A saved tensor of which another name is live is not extra: the model ties it otherwise.
        if name not in known and not live.keys() & set(row.aliases):
            extra.append(name)
    if lacking or extra:
        parts = [f"it lacks {_some(lacking)}"] if lacking else []
        if extra:
            parts.append(f"it has {_some(extra)}, which the model does not have")
        return "; ".join(parts)
    return _untied(matched) or _shape_problem(manifest, shapes, matched)


def plan_problem(manifest: Manifest, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """What makes a plan one of another model than the saved; None: nothing.

    Args:
        manifest: of the checkpoint.
        shapes: {name: shape} of what trains.
    """
    matched = {name: manifest.name_of(name) for name in shapes}
    lacking = [name for name, saved in matched.items() if saved is None]
    return f"it lacks {_some(lacking)}" if lacking else _shape_problem(manifest, shapes, matched)


def _untied(matched: Mapping[str, str | None]) -> str | None:
    first: dict[str | None, str] = {}
    for name, saved in matched.items():
        if first.setdefault(saved, name) != name:
            return (
                f"{first[saved]} and {name} are one tied tensor in it, and two in the model"
                " (model.tie_weights()?)"
            )
    return None


def _shape_problem(
    manifest: Manifest, shapes: Mapping[str, tuple[int, ...]], matched: Mapping[str, str | None]
) -> str | None:
    for name, shape in shapes.items():
        row = manifest.parameters[str(matched[name])]
        if row.shape != tuple(shape):
            return f"{name} has shape {row.shape} in the checkpoint, {tuple(shape)} in the model"
    return None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _canonical(content: Any) -> bytes:
    """The bytes that are sealed: sorted, so that reformatting by an editor does not break it."""
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _shape(where: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise fields.invalid(where, value, "a list of sizes")
    return tuple(count(f"{where}[{place}]", size) for place, size in enumerate(value))


def _record(where: str, value: object) -> TensorRecord:
    return TensorRecord(**record(where, value, _RECORD))


def _extra(where: str, value: object) -> Mapping[str, Any]:
    try:
        return fields.mapping(where, unpacked(fields.mapping(where, value)))
    except (TypeError, ValueError):  # pairs that are no pairs, or whose keys cannot be keys
        raise fields.invalid(where, value, "as save_checkpoint wrote it") from None


_RECORD: dict[str, Parser] = {
    "shape": _shape,
    "dtype": fields.text,
    "trainable": fields.boolean,
    "aliases": fields.strings,
    "saved": fields.boolean,
}
_CONTENT: dict[str, Parser] = {
    "format": fields.integer(FORMAT),
    "step": count,
    "factor": fields.number(0.0),
    "digest": fields.text,
    "sharder": fields.text,
    "ranks": fields.integer(1),
    "optimizer": fields.text,
    "parameters": each(_record),
    "extra": _extra,
    "objects": fields.strings,
    "sharder_state": fields.mapping,
    "files": each(checksum),
    "optimizers": each(fields.strings),
}
"""Every field of ``checkpoint.json``."""
