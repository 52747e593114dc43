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

from dist_layerlr.checkpoint.folders import MANIFEST
from dist_layerlr.errors import CheckpointError
from dist_layerlr.files import write_text

FORMAT = 1
SHOWN = 5
_PAIRS = "__pairs__"


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One parameter or persistent buffer of the saved model."""

    shape: tuple[int, ...]
    dtype: str
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
    parameters: Mapping[str, Stored]
    extra: Mapping[str, Any] = field(default_factory=dict)
    """The caller's."""
    objects: tuple[str, ...] = ()
    """Keys of ``extra`` whose values are states of objects."""
    sharder_state: Mapping[str, Any] = field(default_factory=dict)
    """Counters and loss scale of DeepSpeed."""
    files: Mapping[str, int] = field(default_factory=dict)
    """CRC-32 of the other JSON files."""

    def with_files(self, files: Mapping[str, int]) -> Manifest:
        """A copy that seals other files, too."""
        return replace(self, files=files)

    def write(self, folder: Path) -> None:
        """Write ``checkpoint.json`` to disk."""
        content = {"format": FORMAT, **asdict(self), "extra": packed(self.extra)}
        text = json.dumps({"crc32": zlib.crc32(_canonical(content)), "content": content}, indent=1)
        write_text(folder / MANIFEST, text + "\n")

    def name_of(self, name: str, aliases: tuple[str, ...] = ()) -> str | None:
        """The saved name of a live parameter, which may be tied under another.

        None: not in this checkpoint.
        """
        return next((self._known[n] for n in (name, *aliases) if n in self._known), None)

    @cached_property
    def _known(self) -> dict[str, str]:
        aliases = {alias: name for name, row in self.parameters.items() for alias in row.aliases}
        return aliases | {name: name for name in self.parameters}


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``checkpoint.json``.

    Raises:
        CheckpointError: missing, damaged, or of another format.
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
    found = content.pop("format")
    if found != FORMAT:
        raise CheckpointError(
            f"Checkpoint {str(folder)!r} has format {found}; this version reads format {FORMAT}."
        )
    parameters = {
        name: Stored(**{**row, "shape": tuple(row["shape"]), "aliases": tuple(row["aliases"])})
        for name, row in content.pop("parameters").items()
    }
    objects = tuple(content.pop("objects", ()))
    return Manifest(
        parameters=parameters, extra=unpacked(content.pop("extra")), objects=objects, **content
    )


def read_sealed(folder: Path, name: str, manifest: Manifest) -> Any:
    """A JSON file of the checkpoint, checked against the manifest.

    Raises:
        CheckpointError: missing or damaged.
    """
    path = folder / name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise damaged(path, str(error.strerror)) from None
    if zlib.crc32(data) != manifest.files[name]:
        raise damaged(path, "its checksum is wrong")
    return json.loads(data)


def packed(value: Any) -> Any:
    """As JSON can hold it: numbers that are keys, which it would turn into text, become pairs."""
    if isinstance(value, (list, tuple)):
        return [packed(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    row = {key: packed(item) for key, item in value.items()}
    numbered = any(isinstance(key, (int, float)) for key in row)
    scalars = all(isinstance(key, (str, int, float)) for key in row)
    return {_PAIRS: [[key, item] for key, item in row.items()]} if numbered and scalars else row


def unpacked(value: Any) -> Any:
    """Inverse of ``packed``, but for tuples, which have become lists."""
    if isinstance(value, list):
        return [unpacked(item) for item in value]
    if not isinstance(value, dict):
        return value
    pairs = value[_PAIRS] if value.keys() == {_PAIRS} else value.items()
    return {key: unpacked(item) for key, item in pairs}


def damaged(path: Path, reason: str) -> CheckpointError:
    """The one wording of a broken file."""
    return CheckpointError(
        f"Checkpoint file {str(path)!r} is damaged or incomplete: {reason}. "
        "Restore it, or resume from another checkpoint."
    )


def model_problem(
    manifest: Manifest, live: Mapping[str, tuple[tuple[int, ...], tuple[str, ...]]]
) -> str | None:
    """What makes the live model another one than the saved: names or shapes; None: the same.

    Args:
        manifest: of the checkpoint.
        live: {name: (shape, aliases)} of every parameter and persistent buffer.
    """
    matched = {name: manifest.name_of(name, aliases) for name, (_, aliases) in live.items()}
    lacking = [name for name, saved in matched.items() if saved is None]
    extra = [name for name in manifest.parameters if name not in set(matched.values())]
    extra = [name for name in extra if not set(manifest.parameters[name].aliases) & live.keys()]
    if lacking or extra:
        parts = [f"it lacks {_some(lacking)}"] if lacking else []
        parts += [f"it has {_some(extra)}, which the model does not have"] if extra else []
        return "; ".join(parts)
    untied = _untied(matched)
    return untied or _shape_problem(
        manifest, {name: shape for name, (shape, _) in live.items()}, matched
    )


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
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
