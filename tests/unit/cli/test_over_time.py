"""The picture of rates over a run: grey where a name is held, one colour where nothing changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_layerlr import build_plan, cli
from dist_layerlr.errors import ConfigError
from dist_layerlr.plan import ParamInfo
from dist_layerlr.report import draw_over_time
from dist_layerlr.report.over_time import columns

image = pytest.importorskip("matplotlib.image", reason="needs the plot extra")
NAMES = [f"blocks.{i}.{part}.weight" for i in range(4) for part in ("attn1.to_q", "ffn.net.2")]


def config_of(*timing: dict[str, Any]) -> dict[str, Any]:
    block = {"enabled": True, "component_lr": {}, "depth_strategy": "flat", "timing": list(timing)}
    return {"learning_rate": 1e-4, "per_layer_lr": block}


def drawn(path: Path, *timing: dict[str, Any], steps: int = 100) -> Any:
    plan = build_plan([ParamInfo(name=n, shape=(8, 8)) for n in NAMES], config_of(*timing))
    draw_over_time(plan, path, steps)
    return (255 * image.imread(path)[..., :3]).round().astype(int)


def grey(picture: Any) -> Any:
    """Where the background of the panels shows; 0.88 of 255."""
    return (picture == 224).all(axis=-1)


def test_what_is_held_is_grey_in_its_share_of_the_steps(tmp_path: Path) -> None:
    # The edges of letters have a few such points.
    assert grey(drawn(tmp_path / "all.png")).sum() < 200
    whole = grey(drawn(tmp_path / "held.png", {"from": 100})).sum()
    # Three quarters of a run, of all; then of half of the rows.
    late = grey(drawn(tmp_path / "late.png", {"from": 75})).sum()
    assert late == pytest.approx(0.75 * whole, rel=0.02)
    part = grey(drawn(tmp_path / "part.png", {"components": ["ffn"], "until": 25})).sum()
    assert part == pytest.approx(0.75 * whole / 2, rel=0.03)
    # Block by block from the last: a staircase, of which the upper left is held.
    stairs = grey(drawn(tmp_path / "stairs.png", {"unfreeze": {"every": 25, "start": "last"}}))
    assert stairs.sum() == pytest.approx(whole * (0 + 25 + 50 + 75) / 400, rel=0.03)
    # Rows with a few such points are letters. The first block is held in three quarters.
    held = np.flatnonzero(stairs.sum(axis=1) > 50)
    top, bottom = (int(stairs[row].sum()) for row in (held[0], held[-1]))
    assert top == pytest.approx(3 * bottom, rel=0.05)


def test_a_long_run_is_drawn_at_as_many_steps_as_there_is_room_for() -> None:
    assert columns(3) == [0, 1, 2]
    found = columns(1_000_000)
    assert len(found) == 400 and found[0] == 0 and found[-1] < 1_000_000


def test_plot_writes_it_and_refuses_what_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, config = tmp_path / "model.tsv", tmp_path / "config.json"
    model.write_text("".join(f"{name}\t8,8\n" for name in NAMES))
    config.write_text(json.dumps(config_of({"from": 10, "ramp": 5})))
    output = tmp_path / "time.png"
    command = ["plot", str(model), "--config", str(config), "--output", str(output)]
    assert cli.main([*command, "--over-time", "60", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"wrote": [str(output)]}
    assert image.imread(output).shape[1] == 1200
    assert cli.main([*command, "--over-time", "0"]) == 2
    assert "--over-time" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"must end in \.png"):
        drawn(tmp_path / "time.jpg")
    with pytest.raises(ConfigError, match="steps"):
        drawn(tmp_path / "time.png", steps=0)
