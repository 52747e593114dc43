"""The validation loss of every kind of objective: alike on one rank and on two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.tiny import write
from tests.families.test_llm import text_data
from tests.families.test_rfdetr import coco
from tests.families.test_training import prepare
from tests.families.test_vit import folders
from tests.support.sharders import folder_of, shipped, train_all

CASES = ("sd15", "ltx2", "llm_full", "vit", "rfdetr")
LEVELS = ["val_loss/0.2", "val_loss/0.9"]
NOISY = ("sd15", "ltx2")


def config_of(name: str, root: Path) -> dict[str, Any]:
    model, held = root / name, {"count": 1, "every": 2}
    if name in NOISY:
        prepare(name, root)
        config = shipped(name, model / "model", {"kind": "cached", "folder": str(model / "cache")})
        config.pop("memory", None)
        return {**config, "samples": {"count": 0}, "validation": {**held, "levels": [0.2, 0.9]}}
    write({"llm_full": "llm"}.get(name, name), model)
    if name == "llm_full":
        data, held["count"] = text_data(root, model, pack=False), 5
    elif name == "vit":
        data = {"kind": "classes", "folder": str(folders(root, 3))}
    else:
        data = {"kind": "coco", "folder": str(coco(root, 3))}
    config = shipped(name, model, data)
    config["objective"] = {"classes": 3} if name == "vit" else {}
    return {**config, "validation": held}


@pytest.fixture(scope="module")
def readings(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    root = tmp_path_factory.mktemp("held")
    cases = {name: config_of(name, root) for name in CASES}
    runs = train_all(root, cases, {})
    found: dict[tuple[str, str], Any] = {}
    for (case, sharder), ended in runs.ended.items():
        assert ended.status == 0, (case, sharder, ended.complaint)
        rows = (folder_of(root, case, sharder) / "out" / "metrics.jsonl").read_text().splitlines()
        found[case, sharder] = [row for row in map(json.loads, rows) if "val_loss" in row]
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_reading_does_not_depend_on_ranks_or_sharder(
    case: str, readings: dict[tuple[str, str], Any]
) -> None:
    alone = readings[case, "none"]
    assert [row["step"] for row in alone] == [1, 2]
    assert [key for key in alone[0] if "/" in key] == (LEVELS if case in NOISY else [])
    for sharder in ("ddp", "fsdp2", "zero 2"):
        for mine, right in zip(readings[case, sharder], alone, strict=True):
            assert mine == pytest.approx(right, rel=1e-4), sharder
