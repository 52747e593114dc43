"""What a run measures: cells of the grid, speeds, curves in a real tracker, lines in a file."""

from __future__ import annotations

import json
import math
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_layerlr import cli
from launch.trainer import trackers
from launch.trainer.trackers import Trackers
from tests.support.jobs import ROOT, as_lora, call_of, run_in_ranks

SHARDED = {
    "none": (1, []),
    "fsdp2": (2, ["--sharding", "fsdp2"]),
    "zero3": (2, ["--deepspeed_config", str(ROOT / "ds_configs" / "zero3.json")]),
}
MEASURED = {
    "train.cells_every": 2,
    "train.log_every": 3,
    "per_layer_lr.log_grad_norms": "true",
}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / "metrics.jsonl").open()]


def measured(more: dict[str, Any]) -> list[str]:
    pairs = [f"{key}={value}" for key, value in {**MEASURED, **more}.items()]
    return [word for pair in pairs for word in ("--set", pair)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("measured")
    return {name: root / name for name in (*SHARDED, "lora", "off")}


@pytest.fixture
def runs(run_config: dict[str, Any], folders: dict[str, Path]) -> dict[str, Path]:
    """Runs of 5 steps, made by the first test that asks."""
    if (folders["none"] / "said").exists():
        return folders
    told = ["--set", 'train.report_to=["tensorboard"]']
    alone = {
        "none": call_of(run_config, folders["none"], *measured({}), *told),
        "lora": call_of(as_lora(run_config), folders["lora"], *measured({})),
        "off": call_of(run_config, folders["off"]),
    }
    shared = {
        name: call_of(run_config, folders[name], *measured({}), *flags)
        for name, (ranks, flags) in SHARDED.items()
        if ranks > 1
    }
    for ranks, calls in ((1, alone), (2, shared)):
        for name, ended in zip(calls, run_in_ranks(ranks, list(calls.values())), strict=True):
            assert ended.status == 0, ended.complaint
            (folders[name] / "said").write_text(ended.said)
    return folders


def test_cells_are_measured_when_asked_and_alike_under_every_sharder(runs: dict[str, Path]) -> None:
    assert not any("cells" in row for row in rows_of(runs["off"]))
    assert [row["step"] for row in rows_of(runs["off"])] == [0, 1, 2, 3, 4]
    wanted = rows_of(runs["none"])
    # Every third step has a row, and every second one its cells; the last has both.
    assert [row["step"] for row in wanted] == [0, 2, 3, 4]
    assert [row["step"] for row in wanted if "cells" in row] == [0, 2, 4]
    for name in ("fsdp2", "zero3"):
        for mine, right in zip(rows_of(runs[name]), wanted, strict=True):
            for cell, values in right.get("cells", {}).items():
                # Two ranks round otherwise than one, and Adam divides by gradients near 0.
                assert mine["cells"][cell] == pytest.approx(values, rel=2e-3), (name, cell)


def test_the_norm_of_all_cells_is_the_clipped_global_norm(runs: dict[str, Path]) -> None:
    for name in ("none", "lora", "fsdp2", "zero3"):
        for row in rows_of(runs[name]):
            if "cells" in row:
                together = math.hypot(*(values[1] for values in row["cells"].values()))
                # train.grad_clip is 1; the row's own norm is the one before clipping.
                assert together == pytest.approx(min(row["grad_norm"], 1.0), rel=1e-4)


def test_advise_reads_what_a_run_has_left(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["advise", str(runs["zero3"] / "out"), "--json"]) == 4
    found = json.loads(capsys.readouterr().out)
    assert (found["enough_rows"], found["steps"]) == (False, [0, 2, 4])
    parts = {(pool["component"], pool["third"]) for pool in found["pools"]}
    assert {("self_attn", "first third"), ("default", "outside blocks")} <= parts
    assert cli.main(["advise", str(runs["off"] / "out")]) == 2
    assert "log_grad_norms=true" in capsys.readouterr().err


def test_rates_of_cells_are_those_of_the_plan_times_the_schedule(runs: dict[str, Path]) -> None:
    plan = json.loads((runs["none"] / "out" / "plan.json").read_text())["parameters"]
    lr = plan["blocks.1.attn1.to_q.weight"]["lr"]
    for row in rows_of(runs["none"]):
        if "cells" in row:
            wanted = pytest.approx(lr * row["lr_factor"], rel=1e-5)
            assert row["cells"]["blocks.001.self_attn"][0] == wanted


def test_speeds_add_up(runs: dict[str, Path]) -> None:
    for name in ("none", "fsdp2"):
        for row in rows_of(runs[name]):
            assert row["samples_per_s"] == pytest.approx(8 / row["s_per_step"])
            # A clip of digits is 5 frames of 12 x 12, and the tiny model's patch is 12 x 12.
            assert row["tokens_per_s"] / row["samples_per_s"] == pytest.approx(5)
            assert 0 < row["data_wait_s"] < row["s_per_step"]
            assert (row["eta_s"] == 0) == (row["step"] == 4)


def test_a_tracker_gets_a_fixed_number_of_curves_and_the_config(runs: dict[str, Path]) -> None:
    place = runs["none"] / "out" / "trackers"
    events = [path for path in place.rglob("events.*") if path.parent.name == trackers.PROJECT]
    found = EventAccumulator(str(events[0].parent)).Reload()
    tags = found.Tags()["scalars"]
    rows = rows_of(runs["none"])
    assert [event.value for event in found.Scalars("loss")] == [
        pytest.approx(row["loss"]) for row in rows
    ]
    norms = [values[1] for cell, values in rows[1]["cells"].items() if cell.endswith(".ffn")]
    drawn = found.Scalars("grad_norm/ffn/max")[1]
    assert (drawn.step, drawn.value) == (2, pytest.approx(max(norms)))
    components = {cell.rsplit(".", 1)[1] for cell in rows[1]["cells"]}
    assert len([tag for tag in tags if "/" in tag]) == len(components) * 4 * 3


def test_a_log_file_has_a_line_each_log_every_steps_and_no_carriage_return(
    runs: dict[str, Path],
) -> None:
    for name, steps in (("none", ["1", "3", "5"]), ("off", ["1", "5"])):
        said = (runs[name] / "said").read_text()
        lines = [line for line in said.splitlines() if line.startswith("step ")]
        assert [line.split()[1] for line in lines] == steps
        assert "\r" not in said and " left" in lines[0]


def test_a_run_ends_with_a_page_of_what_it_measured(runs: dict[str, Path]) -> None:
    for name, frames in (("none", 3), ("zero3", 3), ("off", 0)):
        page = runs[name] / "out" / "page.html"
        (text,) = re.findall(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL)
        data = json.loads(text)
        assert (len(data["frames"]), data["loss"][-1][0]) == (frames, 4)
        said = "\n".join(data["panels"][0]["cells"][0]["lines"])
        assert "rule: " in said and " x base 0.00" in said
        assert {"Proof, start", "Proof, end", "Config"} <= {table[0] for table in data["tables"]}
        assert str(page) in (runs[name] / "said").read_text()


def test_the_result_has_a_model_card_and_says_in_its_header_how_it_was_trained(
    runs: dict[str, Path],
) -> None:
    final = runs["lora"] / "out" / "final"
    card = (final / "README.md").read_text()
    assert card.startswith("---\n# written by the trainer of dist_layerlr")
    assert "library_name: peft" in card and "A LoRA of rank 4" in card
    assert "5 steps of\n8 samples, 40 samples of a data set of 1,000" in card
    verified, *_ = re.findall(r"^\[per_layer_lr\] verified on .*$", card, re.MULTILINE)
    proof = json.loads((final / "verify.json").read_text())["end"]
    assert verified.endswith(proof["digest"]) and "x 0.1 (schedule)" in verified
    assert "blocks.000-002.self_attn" in card and " --resume latest" in card
    assert f"| torch | {version('torch')} |" in card
    for file in final.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found = opened.metadata()
        assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("4", "4.0")
        assert (found["modelspec.architecture"], found["ss_steps"]) == ("wan/lora", "5")
        # self_attn's 4e-4, times lora_plus_ratio.
        assert float(found["ss_learning_rate"]) == pytest.approx(16e-4)
    full = (runs["zero3"] / "out" / "final" / "README.md").read_text()
    assert "A full finetune" in full and "library_name: diffusers" in full


class Broken:
    """A tracker whose service is down."""

    requires_logging_directory = False

    def __init__(self, project: str) -> None: ...

    def start(self) -> None: ...

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        assert values["train.steps"] == 3 and values["data.sizes"] == "[1, 2]"

    def log(self, values: dict[str, float], step: int) -> None:
        raise ConnectionError("no route\nto host")


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Broken)
    said: list[str] = []
    config = {"train": {"steps": 3}, "data": {"sizes": [1, 2]}}
    told = Trackers(["wandb"], tmp_path, config, said.append)
    told.log({"loss": 1.0}, 0)
    told.log({"loss": 1.0}, 1)
    told.close()
    assert said == [
        "train.report_to: wandb failed (ConnectionError: no route); the run goes on without it, and"
        " metrics.jsonl holds every number"
    ]


def test_a_tracker_that_is_not_there_is_refused_before_training(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    unknown, absent = (
        call_of(run_config, tmp_path, "--set", f'train.report_to=["{name}"]')
        for name in ("tensorbord", "aim")
    )
    first, second = run_in_ranks(1, [unknown, absent])
    assert (first.status, second.status) == (2, 2)
    assert "tensorboard" in first.complaint and "train.report_to[0]" in first.complaint
    assert "the package of aim is not installed" in second.complaint
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
