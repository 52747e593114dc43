"""How a run came about: ``run.json`` and ``resolved_config.json`` in its folder."""

from __future__ import annotations

import platform
import socket
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dist_layerlr.errors import ConfigError
from dist_layerlr.files import read_json, write_json
from launch.trainer.job import Job
from launch.trainer.options import resolved
from launch.trainer.runlog import timestamp
from launch.trainer.state import Position

RECORD, RESOLVED = "run.json", "resolved_config.json"
_PACKAGES = (
    "dist_layerlr",
    "torch",
    "deepspeed",
    "accelerate",
    "safetensors",
    "diffusers",
    "transformers",
    "peft",
)


def previous_config(folder: Path) -> dict[str, Any]:
    """The config of the run that wrote last into a folder; empty where there was none."""
    starts = _earlier(folder / RECORD)
    last = starts[-1] if starts and isinstance(starts[-1], dict) else {}
    found = last.get("config")
    return found if isinstance(found, dict) else {}


def write_record(
    job: Job, begin: Position, *, sharder: str, kept: bool, previous: dict[str, Any]
) -> None:
    """Write how this start of the run was made.

    Args:
        job: What is trained.
        begin: Where it begins or continues.
        sharder: What was found around the model.
        kept: Whether earlier starts stay in the list: the run goes on.
        previous: Config of the run before, to be compared with.

    Raises:
        OSError: no room, no rights.
    """
    config = resolved(job.options)
    before = _earlier(job.folder / RECORD) if kept else []
    now = {
        "run": job.run_id,
        "from_step": begin.step,
        "started": timestamp(),
        "host": socket.gethostname(),
        "command": [sys.executable, *sys.argv],
        "sharder": sharder,
        "ranks": job.runtime.world_size,
        "device": str(job.runtime.device),
        "versions": versions(),
        "config": config,
    }
    write_json(job.folder / RESOLVED, config)
    record: dict[str, Any] = {"starts": [*before, now]}
    # A run that goes on has its earlier configs among its starts.
    if previous and not before:
        record["previous"] = previous
    write_json(job.folder / RECORD, record)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide how training runs."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _earlier(path: Path) -> list[Any]:
    """Earlier starts; none where the file is missing or somebody else's."""
    try:
        starts = read_json(path).get("starts")
    except ConfigError:
        return []
    return starts if isinstance(starts, list) else []
