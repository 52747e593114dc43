"""``train.epochs``: a length that follows from the data set, its repeats and the global batch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_layerlr.errors import ConfigError
from launch.trainer.data.cached import CachedDataset
from launch.trainer.data.digits import MovingDigits
from launch.trainer.epochs import steps_of
from launch.trainer.options import load_options
from tests.support.jobs import call_of, run_in_ranks, weights
from tests.support.latents import write_sample

EPOCHS = {"epochs": 1.5, "global_batch": 8, "grad_clip": 1.0}
"""Of 20 samples: 30 of them, which are 4 steps."""


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / "metrics.jsonl").open()]


def test_epochs_are_the_steps_that_they_take_and_the_rest_of_them_with_another_batch(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    steps = {**run_config, "data": {"kind": "digits", "clips": 20}}
    steps["train"] = {**EPOCHS, "steps": 4}
    del steps["train"]["epochs"]
    epochs = {**steps, "train": {**EPOCHS, "save_every": 2}}
    saved = tmp_path / "epochs" / "out" / "checkpoints" / "step_00000002"
    # 16 of the 30 samples are seen: 14 are left, which are 4 steps of 4.
    smaller = {**epochs, "train": {**EPOCHS, "global_batch": 4}}
    too_few = {**epochs, "train": {**EPOCHS, "epochs": 0.2}}
    calls = [
        call_of(steps, tmp_path / "steps"),
        call_of(epochs, tmp_path / "epochs"),
        call_of(smaller, tmp_path / "smaller", "--resume", str(saved)),
        call_of(too_few, tmp_path / "few", "--resume", str(saved)),
        call_of(epochs, tmp_path / "epochs", "--resume", "latest"),
    ]
    plain, same, rest, refused, again = run_in_ranks(1, calls)
    assert (plain.status, same.status, rest.status) == (0, 0, 0), same.complaint
    assert "finished 4 steps" in same.said and "finished 6 steps" in rest.said
    one, other = weights(tmp_path / "steps"), weights(tmp_path / "epochs")
    assert all(torch.equal(one[name], other[name]) for name in one)
    factors = [row["lr_factor"] for row in rows_of(tmp_path / "epochs")]
    assert factors == [row["lr_factor"] for row in rows_of(tmp_path / "steps")]
    # The schedule is as long as the run: it ends at its floor.
    assert factors[-1] == pytest.approx(0.1)
    assert rows_of(tmp_path / "smaller")[-1]["lr_factor"] == pytest.approx(0.1)
    assert refused.status == 2 and refused.complaint.count("\n") == 1
    assert "train.epochs=0.2: must be at least 0.8" in refused.complaint
    assert again.status == 0 and "nothing to train" in again.said
    written = json.loads((tmp_path / "epochs" / "out" / "resolved_config.json").read_text())
    assert written["train"]["epochs"] == 1.5 and "steps" not in written["train"]


def test_an_epoch_counts_repeats_and_what_fills_up_the_batches_of_a_bucket(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    for folder, count, side in (("often", 3, 8), ("once", 5, 12)):
        (tmp_path / folder).mkdir()
        for index in range(count):
            write_sample(tmp_path / folder / f"{index}.safetensors", torch.zeros(1, 5, side, side))
    (tmp_path / "config.json").write_text(json.dumps(run_config))
    options = load_options(tmp_path / "config.json")
    data = CachedDataset(str(tmp_path), repeats={"often": 2})
    # Buckets of 6 and 5 samples: 2 batches of 4 each.
    for epochs, steps in ((1.0, 4), (2.0, 8), (0.25, 1), (0.1, 1)):
        train = replace(options.train, epochs=epochs, global_batch=4)
        assert steps_of(replace(options, train=train), data, 0, 0) == steps
    # 1.1 * 30 is above 33 in binary.
    train = replace(options.train, epochs=1.1, global_batch=1)
    assert steps_of(replace(options, train=train), MovingDigits(clips=30), 0, 0) == 33


def test_a_length_given_twice_or_not_at_all_or_shorter_than_its_warmup_is_refused(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    calls = []
    for name, length in (
        ("both", {"steps": 3, "epochs": 1}),
        ("none", {}),
        ("zero", {"epochs": 0}),
    ):
        config = {**run_config, "train": {"global_batch": 8, **length}}
        calls.append(call_of(config, tmp_path / name))
    both = {**run_config, "train": {"global_batch": 8, "steps": 3, "epochs": 1}}
    calls.append(call_of(both, tmp_path / "cut", "--max-steps", "1"))
    short = {**run_config, "data": {"kind": "digits", "clips": 20}, "train": EPOCHS}
    short["schedule"] = {"type": "linear", "warmup_steps": 5}
    calls.append(call_of(short, tmp_path / "short"))
    wanted = (
        "Invalid train.steps=3 with train.epochs=1: each says how long the run is",
        "train.steps",
        "train.epochs=0.0: must be a finite number > 0",
        "Invalid train.steps=3 with train.epochs=1",
        "schedule.warmup_steps=5: must be an integer in [0, 4], the steps of train.epochs=1.5",
    )
    for ended, words in zip(run_in_ranks(1, calls), wanted, strict=True):
        assert (ended.status, ended.complaint.count("\n")) == (2, 1), ended.complaint
        assert words in ended.complaint


def test_max_steps_cuts_epochs_short(run_config: dict[str, Any], tmp_path: Path) -> None:
    config = {**run_config, "train": EPOCHS}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="train.epochs=-1"):
        load_options(tmp_path / "config.json", ["train.epochs=-1"], max_steps=2)
    options = load_options(tmp_path / "config.json", max_steps=2)
    assert (options.train.steps, options.train.epochs) == (2, None)
    with pytest.raises(ConfigError, match=r"train\.epochs='two'"):
        load_options(tmp_path / "config.json", ["train.epochs=two"])
