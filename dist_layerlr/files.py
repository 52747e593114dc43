"""Files that are whole or absent, and JSON that is read strictly. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dist_layerlr.errors import ConfigError


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
        loaded = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=unique)
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


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
