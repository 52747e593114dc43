"""``launch/train.py`` with Muon for the matrices and AdamW for the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.jobs import ROOT, call_of, run_in_ranks

MUON = {"muon": {"adjust_lr": "match_rms_adamw"}, "adamw": "rest"}
ZERO2 = str(ROOT / "ds_configs" / "zero2.json")


def test_a_run_says_who_stepped_what_under_each_sharder(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    config = {**run_config, "optimizers": MUON}
    flags = {"fsdp2": ["--sharding", "fsdp2"], "zero2": ["--deepspeed_config", ZERO2]}
    calls = [call_of(config, tmp_path / name, *given) for name, given in flags.items()]
    for name, ended in zip(flags, run_in_ranks(2, calls), strict=True):
        assert ended.status == 0, ended.complaint
        assert " by Muon; " in ended.said
        proof = json.loads((tmp_path / name / "out" / "final" / "verify.json").read_text())
        text = json.dumps(proof)
        assert '"Muon"' in text and '"AdamW"' in text


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"optimizers": {"lion": {}, "adamw": "rest"}}, "Invalid optimizers"),
        ({"optimizers": {"muon": {}, "sgd": "rest"}}, "optimizer.type='adamw'"),
        ({"optimizers": {"muon": {"matrices": False}, "adamw": "rest"}}, "muon.matrices"),
        ({"optimizers": MUON, "memory": {"stagehand": {"enabled": True}}}, "Switch streaming off"),
    ],
)
def test_what_the_trainer_cannot_build_is_refused_in_one_line(
    changes: dict[str, Any], said: str, run_config: dict[str, Any], tmp_path: Path
) -> None:
    (ended,) = run_in_ranks(1, [call_of({**run_config, **changes}, tmp_path)])
    assert ended.status != 0
    assert said in ended.complaint
