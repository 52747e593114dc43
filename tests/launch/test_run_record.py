"""What a run folder keeps of how its run came about, and what a run says of itself."""

from __future__ import annotations

import json
import platform
import re
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from launch.trainer import progress
from launch.trainer.options import TrainOptions, load_options, resolved
from launch.trainer.runlog import RunLog
from tests.support.jobs import as_lora, call_of, run_in_ranks

KEPT = ("run.json", "resolved_config.json", "train.log")


def test_a_run_keeps_config_command_versions_and_log_of_every_start(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    run_config["train"].update(steps=3, micro_batch=2, save_every=2)
    call = call_of(run_config, tmp_path, "--sharding", "ddp", "--resume", "latest")
    first, second, refused = run_in_ranks(
        2, [[*call, "--max-steps", "2"], call, [*call, "--max-steps", "1"]]
    )
    assert (first.status, second.status, refused.status) == (0, 0, 2)
    out = tmp_path / "out"
    begun, resumed = json.loads((out / "run.json").read_text())["starts"]
    assert (begun["from_step"], resumed["from_step"]) == (0, 2)
    assert begun["run"] != resumed["run"]
    assert begun["versions"]["python"] == platform.python_version()
    for package in ("torch", "deepspeed", "accelerate", "safetensors", "dist_layerlr"):
        assert begun["versions"][package] == version(package)
    assert (begun["ranks"], begun["sharder"], begun["device"]) == (2, "ddp", "cpu")
    assert begun["config"]["train"]["steps"] == 2 and len(begun["command"]) >= 2
    assert json.loads((out / "resolved_config.json").read_text()) == resumed["config"]
    log = (out / "train.log").read_text()
    for said in (first.said, second.said):
        # With the time in front of each; the last lines come when the log is long open.
        assert [line for line in said.splitlines() if line not in log] == []
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d no checkpoint in", log)
    line = "training on 2 ranks, device cpu: 1000 samples, global batch 8 (each rank 2 x 2), steps"
    assert f"{line} 1 to 2\n" in first.said and f"{line} 3 to 3\n" in second.said
    assert f"saved checkpoint {out}/checkpoints/step_00000003 after 3 steps\n" in second.said


@pytest.mark.parametrize("method", ["fine_tune", "lora", "streamed"])
def test_the_resolved_config_has_every_default_and_is_read_as_the_same_options(
    method: str, run_config: dict[str, Any], tmp_path: Path
) -> None:
    config = run_config if method == "fine_tune" else as_lora(run_config)
    if method == "streamed":
        config["memory"] = {"stagehand": {"enabled": True, "prefetch_window": 2}}
    (tmp_path / "given.json").write_text(json.dumps(config))
    options = load_options(tmp_path / "given.json", ["train.log_every=7"])
    full = resolved(options)
    assert full["train"]["log_every"] == 7 and full["train"]["dtype"] == "fp32"
    (tmp_path / "resolved.json").write_text(json.dumps(full))
    again = load_options(tmp_path / "resolved.json")
    given = replace(again.adapter, target_modules=options.adapter.target_modules)
    assert replace(again, raw=options.raw, adapter=given) == options
    assert resolved(again) == full


def test_lines_before_the_log_is_open_are_in_it_and_a_refused_run_writes_none(
    tmp_path: Path,
) -> None:
    log = RunLog()
    log.write("one\ntwo")
    assert list(tmp_path.iterdir()) == []
    log.open(tmp_path / "train.log", kept=False)
    log.write("three")
    log.close()
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["one", "two", "three"]


@pytest.mark.parametrize(("every", "lines"), [(None, (1, 10, 20, 25)), (7, (1, 7, 14, 21, 25))])
def test_progress_in_a_file_is_a_line_now_and_then(
    every: int | None, lines: tuple[int, ...]
) -> None:
    class Rank:
        is_main = True
        said: list[str] = []

        def say(self, line: str) -> None:
            self.said.append(line)

    rank = Rank()
    train = TrainOptions(steps=25, global_batch=1, log_every=every)
    rank.said.clear()
    with progress.progress(train, 0, rank) as show:  # type: ignore[arg-type]
        for step in range(25):
            row = {"step": step, "loss": 0.5, "s_per_step": 1.0, "peak_memory_gb": 2.0}
            show({**row, "eta_s": 65.2})
    assert rank.said == [
        f"step {done} of 25: loss 0.5000, 1.000 s/step, 2.00 GiB, 0:01:05 left" for done in lines
    ]
