"""Files that are whole or absent, JSON, YAML and TOML read strictly, headers of safetensors files.

No torch.
"""

from __future__ import annotations

import json
import os
import re
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from dist_layerlr.errors import ConfigError, ModelSourceError

HEADER_LENGTH = struct.Struct("<Q")
"""The first bytes of a safetensors file: how long the JSON header after them is."""
_MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library. A damaged length must not become an allocation."""
_BITS = re.compile(r"[A-Z]+(\d+)")
"""The bits of one element, in its type's name: F32, BF16, F8_E4M3, I64, C64; not in BOOL."""


@contextmanager
def whole_file(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Give the caller a temporary path to write, which takes the place of ``path`` afterwards.

    ::

        with whole_file(path) as temporary:
            save(temporary)

    A reader sees the earlier file or the complete new one, also after a crash. If the block raises,
    the earlier file stays and the temporary one is removed. The new name itself survives a power
    cut only after ``sync_folder``.

    Args:
        path: the file; its folder exists.
        shared: whether several processes may write ``path`` at a time; the last one wins.

    Raises:
        OSError: no room, no rights.
    """
    # A killed process leaves its temporary file behind. The next writer overwrites it, except where
    # the name carries a process id so that two writers do not rename each other's half.
    name = f".{path.name}.{os.getpid()}.tmp" if shared else f"{path.name}.tmp"
    temporary = path.with_name(name)
    try:
        yield temporary
        # The bytes must be on disk before the rename is: some file systems write the rename first,
        # and a crash between the two would leave an empty file under the final name.
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is whole or absent, and wait until its bytes are on disk.

    Raises:
        OSError: no room, no rights.
    """
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that it is whole or absent.

    Raises:
        OSError: no room, no rights.
    """
    write_text(path, json.dumps(value, indent=1) + "\n")


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on disk: files made, renamed or removed in it."""
    _sync(folder)


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object from a file, refusing duplicate keys.

    Raises:
        ConfigError: missing file, not JSON, not an object, or a key given twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # json keeps the last of two equal keys without a word: one of two rates would be lost.
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise ConfigError(
                    f"Invalid config file {str(path)!r}: key {key!r} is given twice. Keep one."
                )
            seen[key] = value
        return seen

    try:
        loaded = json.loads(_text(path), object_pairs_hook=unique)
    except OSError as error:
        raise ConfigError(f"Cannot read config file {str(path)!r}: {error.strerror}.") from None
    except ConfigError:
        raise
    # RecursionError: JSON nested deeper than Python's stack.
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"Invalid config file {str(path)!r}: not JSON ({error}).") from None
    if not isinstance(loaded, dict):
        raise ConfigError(
            f"Invalid config file {str(path)!r}: must hold a JSON object, got"
            f" {type(loaded).__name__}."
        )
    return loaded


def read_config(path: str | Path) -> dict[str, Any]:
    """Read a training config: YAML or TOML where the file's name ends so, else JSON.

    All three mean the same: `1e-4` is a number, only `true` and `false` are booleans, and a key
    that is given twice is refused.

    Raises:
        ConfigError: missing file, bad syntax, no mapping, or a key given twice.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".yaml", ".yml", ".toml"):
        return read_json(path)
    try:
        text = _text(path)
    except OSError as error:
        raise ConfigError(f"Cannot read config file {str(path)!r}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"Invalid config file {str(path)!r}: not UTF-8 ({error}).") from None
    kind = "TOML" if suffix == ".toml" else "YAML"
    try:
        loaded = _from_toml(text) if suffix == ".toml" else _from_yaml(text)
    except _BadKey as error:
        raise ConfigError(f"Invalid config file {str(path)!r}: {error}.") from None
    # RecursionError: nested deeper than Python's stack.
    except (ValueError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"Invalid config file {str(path)!r}: not {kind} ({said}).") from None
    if not isinstance(loaded, dict):
        got = "nothing" if loaded is None else type(loaded).__name__
        raise ConfigError(
            f"Invalid config file {str(path)!r}: must hold a mapping of keys, got {got}. Begin with"
            " KEY: VALUE lines, such as learning_rate: 1e-4."
        )
    return loaded


def _text(path: str | Path) -> str:
    # With the mark that editors on Windows write before UTF-8; PyYAML alone would skip it.
    return Path(path).read_text(encoding="utf-8-sig")


class _BadKey(ValueError):
    """A key of a YAML mapping that JSON could not have, or would refuse."""


def _from_toml(text: str) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


def _from_yaml(text: str) -> Any:
    """YAML by the core schema of YAML 1.2, which JSON's values are.

    PyYAML follows 1.1, in which `1e-4` is a string, `no` is false and `1:30` is 90.
    """
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """A class of its own: resolvers belong to a class, and others use PyYAML's."""

        yaml_implicit_resolvers: dict[Any, Any] = {}
        # Explicit tags of dates, bytes and sets would build what JSON has not.
        yaml_constructors: dict[Any, Any] = {
            None: yaml.SafeLoader.construct_undefined,
            "tag:yaml.org,2002:str": yaml.SafeLoader.construct_scalar,
            "tag:yaml.org,2002:seq": lambda loader, node: loader.construct_sequence(
                node, deep=True
            ),
        }

    def unique(loader: Any, node: Any) -> dict[str, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise ValueError(f"!!map before {node.value!r}, which is no mapping")
        seen: set[str] = set()
        for key, _ in node.value:
            name = loader.construct_object(key, deep=True)
            if not isinstance(name, str):
                raise _BadKey(f"key {name!r} is no text. Quote it")
            if name in seen:
                raise _BadKey(f"key {name!r} is given twice. Keep one")
            seen.add(name)
        loader.flatten_mapping(node)  # `<<`, whose keys the mapping's own ones may override
        found: dict[str, Any] = loader.construct_mapping(node, deep=True)
        return found

    for tag, (pattern, first, build) in _YAML_SCALARS.items():
        name = f"tag:yaml.org,2002:{tag}"
        Loader.add_implicit_resolver(name, pattern, first)
        # `construct_scalar` refuses a list or a mapping behind an explicit tag.
        Loader.add_constructor(
            name, lambda loader, node, build=build: build(loader.construct_scalar(node))
        )
    # `<<` is resolved as text otherwise, and would be a key like any other.
    Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile("^<<$"), ["<"])
    Loader.add_constructor("tag:yaml.org,2002:merge", lambda _, node: node.value)
    Loader.add_constructor("tag:yaml.org,2002:map", unique)
    try:
        return yaml.load(text, Loader=Loader)  # noqa: S506
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


_YAML_SCALARS: Mapping[str, tuple[re.Pattern[str], list[str], Callable[[str], Any]]] = {
    "null": (re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""], lambda _: None),
    "bool": (
        re.compile(r"^(true|True|TRUE|false|False|FALSE)$"),
        list("tTfF"),
        lambda text: text.lower() == "true",
    ),
    "int": (re.compile(r"^[-+]?\d+$"), list("-+0123456789"), int),
    "float": (
        re.compile(r"^[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?$"),
        list("-+.0123456789"),
        float,
    ),
}
"""{tag: (what text is one, its first characters, how it is read)}; in this order, int first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """What the header of a safetensors file says of one tensor."""

    shape: tuple[int, ...]
    dtype: str
    """As the format spells it: F32, BF16, F8_E4M3."""
    offset: int
    """First byte in the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetensorsHeader:
    """What a safetensors file says of itself before its data."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def read_safetensors_header(path: str | Path) -> SafetensorsHeader:
    """Read what a safetensors file holds, and where: its header, once, and nothing else.

    The format: 8 bytes of header length, a JSON header ``{name: {"dtype", "shape",
    "data_offsets"}}``, the raw data. The safetensors library reads it too, but does not tell where
    a tensor lies.

    Raises:
        ModelSourceError: missing, truncated or corrupt.
    """
    try:
        with Path(path).open("rb") as file:
            start = file.read(HEADER_LENGTH.size)
            length = int.from_bytes(start, "little")
            if len(start) == HEADER_LENGTH.size and length > _MAX_HEADER:
                raise ValueError(f"its header of {length} bytes is too large")
            text = file.read(length)
            if len(start) < HEADER_LENGTH.size or len(text) < length:
                raise ValueError("it ends within the header")
            size = os.fstat(file.fileno()).st_size
        rows = json.loads(text)
        metadata = rows.pop("__metadata__", None)
        first = HEADER_LENGTH.size + length
        _check_offsets(rows, size - first)
        return SafetensorsHeader(
            # By name, as the library lists them: a writer sorts by type first, for alignment.
            tensors={name: _stored_tensor(rows[name], first) for name in sorted(rows)},
            metadata=dict(metadata or {}),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        # The header is input like any other: whatever does not fit its schema is a damaged file.
        raise ModelSourceError(
            f"Cannot read safetensors file {str(path)!r}: {error}. It may be truncated; copy or"
            " download it again."
        ) from None


def _stored_tensor(row: Mapping[str, Any], first: int) -> StoredTensor:
    return StoredTensor(
        shape=tuple(row["shape"]), dtype=row["dtype"], offset=first + row["data_offsets"][0]
    )


def _check_offsets(rows: Mapping[str, Any], size: int) -> None:
    """Refuse a header whose tensors do not fill the data bytes one after the other.

    Raises:
        ValueError: a gap, an overlap, a negative size, or data that end before or after it.
    """
    end = 0
    for name, row in sorted(rows.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = row["data_offsets"]
        whole = all(isinstance(number, int) and number >= 0 for number in (*row["shape"], stop))
        bits = _BITS.match(row["dtype"])
        # Elements of less than a byte are packed.
        packed = prod(row["shape"]) * (int(bits[1]) if bits else 8)
        if not whole or start != end or (stop - start) * 8 != packed:
            raise ValueError(f"the offsets of tensor {name!r} are wrong")
        end = stop
    if end != size:
        raise ValueError(f"it holds {size} bytes of data, its header describes {end}")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
