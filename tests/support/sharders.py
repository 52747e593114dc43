"""The four ways in which each family is trained, and what all of them must leave behind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.jobs import (
    ROOT,
    Config,
    Ended,
    call_of,
    largest_difference,
    run_in_ranks,
    weights,
)

CONFIGS = ROOT / "launch" / "configs"
ZERO2 = str(ROOT / "ds_configs" / "zero2.json")
SHARDERS: dict[str, tuple[int, list[str]]] = {
    "none": (1, []),
    "ddp": (2, ["--sharding", "ddp"]),
    "fsdp2": (2, ["--sharding", "fsdp2"]),
    "zero 2": (2, ["--deepspeed_config", ZERO2]),
}


@dataclass(frozen=True, kw_only=True)
class Runs:
    """What the runs of some configs have left."""

    root: Path
    ended: Mapping[tuple[str, str], Ended]
    """(case, sharder) -> how it ended."""

    def folder(self, case: str, sharder: str = "none") -> Path:
        return folder_of(self.root, case, sharder)

    def final(self, case: str, sharder: str = "none") -> Path:
        return self.folder(case, sharder) / "out" / "final"

    def check(self, case: str, sharder: str) -> None:
        """It trained, and the rates were proven before and after, and in the first step."""
        ended = self.ended[case, sharder]
        assert ended.status == 0, ended.complaint
        assert "[per_layer_lr] verified on" in ended.said
        proof = json.loads((self.final(case, sharder) / "verify.json").read_text())
        assert proof["first_step_lr"]

    def differ(self, case: str, sharder: str) -> float:
        """The largest difference of a weight from the run in one process."""
        alone = weights(self.folder(case))
        return largest_difference(alone, weights(self.folder(case, sharder)))


def folder_of(root: Path, case: str, sharder: str) -> Path:
    return root / f"{case}-{sharder.replace(' ', '')}"


def train_all(root: Path, cases: Mapping[str, Config], alone: Mapping[str, Config]) -> Runs:
    """Train every case under every sharder, and those of ``alone`` in one process only."""
    ended: dict[tuple[str, str], Ended] = {}
    for world_size in (1, 2):
        calls, keys = [], []
        for sharder, (ranks, flags) in SHARDERS.items():
            both = {**cases, **alone} if sharder == "none" else cases
            for case, config in both.items() if ranks == world_size else ():
                calls.append(call_of(config, folder_of(root, case, sharder), *flags))
                keys.append((case, sharder))
        ended.update(zip(keys, run_in_ranks(world_size, calls), strict=True))
    return Runs(root=root, ended=ended)


def shipped(name: str, model: Path, data: dict[str, Any], **train: Any) -> Config:
    """A shipped config, pointed at a tiny model, for three steps."""
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    steps = {"steps": 3, "global_batch": 2, "seed": 0, **train}
    return {**config, "model_path": str(model), "data": data, "train": steps}


def losses(folder: Path) -> list[float]:
    """Of each step of a run."""
    rows = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, rows) if "loss" in row]


EVERY_SHARDER = pytest.mark.parametrize("sharder", SHARDERS)
SHARED = pytest.mark.parametrize("sharder", [name for name in SHARDERS if name != "none"])
