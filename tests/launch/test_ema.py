"""The average of the trained weights: on shards, in checkpoints, and as the result of a run.

The reference is computed here from the weights that each run has saved after each of its steps.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dist_layerlr.errors import ConfigError
from dist_layerlr.export.saved import SavedWeights
from launch.trainer.options import load_options
from tests.support.jobs import ROOT, as_lora, call_of, run_in_ranks, weights

DECAY, STEPS = 0.6, 3
CLOSE = 1e-6
"""A few roundings of fp32; the weights are below 1, and the average is further than 1e-4 away."""
MODES = {
    **{name: ["--sharding", name] for name in ("ddp", "fsdp1", "fsdp1_flat", "fsdp2")},
    **{f"zero{n}": ["--deepspeed_config", f"{ROOT}/ds_configs/zero{n}.json"] for n in (1, 2, 3)},
}
EMA = {"decay": DECAY, "warmup": False}


def with_ema(config: dict[str, Any], **ema: Any) -> dict[str, Any]:
    train = {**config["train"], "steps": STEPS, "save_every": 1}
    return {**config, "train": train, "ema": {**EMA, **ema}}


def saved(folder: Path, step: int) -> dict[str, Tensor]:
    """The weights of a checkpoint, without the average."""
    found = SavedWeights(folder / "out" / "checkpoints" / f"step_{step:08d}")
    names = [name for name, row in found.table.items() if row.trainable]
    # PEFT leaves the adapter's own name out of its files.
    parts = [[part for part in name.split(".") if part != "default"] for name in names]
    plain = map(".".join, parts)
    return {file: found.fetch(name).double() for file, name in zip(plain, names, strict=True)}


def average_of(begin: dict[str, Tensor], folder: Path, *kept: float) -> dict[str, Tensor]:
    """What the average after each step is, with the share that the steps keep."""
    found = begin
    for step, share in enumerate(kept, 1):
        now = saved(folder, step)
        found = {name: share * found[name].double() + (1 - share) * now[name] for name in now}
    return found


def difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    named = {name.removeprefix("base_model.model."): one for name, one in found.items()}
    assert wanted.keys() <= named.keys()
    return max(float((named[name].double() - wanted[name]).abs().max()) for name in wanted)


@pytest.fixture(scope="module")
def begin(tiny_wan: Path) -> dict[str, Tensor]:
    return load_file(min(tiny_wan.rglob("*.safetensors")))


def check(folder: Path, begin: dict[str, Tensor], label: str) -> None:
    wanted = average_of(begin, folder, *[DECAY] * STEPS)
    assert difference(weights(folder), wanted) <= CLOSE, label
    assert difference(weights(folder), saved(folder, STEPS)) > 1e-4, label


def test_the_result_is_the_unsharded_average_under_every_sharder_and_after_a_resume(
    run_config: dict[str, Any], begin: dict[str, Tensor], tmp_path: Path
) -> None:
    config = with_ema(run_config)
    flags = {**MODES, "resumed": [*MODES["zero2"], "--resume", checkpoint(tmp_path / "fsdp2", 2)]}
    calls = [call_of(config, tmp_path / mode, *told) for mode, told in flags.items()]
    for mode, ended in zip(flags, run_in_ranks(2, calls), strict=True):
        assert ended.status == 0, f"{mode}:\n{ended.said}\n{ended.complaint}"
    for mode in MODES:
        check(tmp_path / mode, begin, mode)
    elsewhere = ["--resume", checkpoint(tmp_path / "zero3", 2)]
    (alone,) = run_in_ranks(1, [call_of(config, tmp_path / "alone", *elsewhere)])
    assert alone.status == 0, alone.complaint
    for resumed, first in (("resumed", "fsdp2"), ("alone", "zero3")):
        two = average_of(begin, tmp_path / first, DECAY, DECAY)
        last = saved(tmp_path / resumed, STEPS)
        wanted = {name: DECAY * two[name] + (1 - DECAY) * last[name] for name in last}
        assert difference(weights(tmp_path / resumed), wanted) <= CLOSE, resumed


def checkpoint(folder: Path, step: int) -> str:
    return str(folder / "out" / "checkpoints" / f"step_{step:08d}")


def test_an_average_changes_no_training_and_is_resumed_to_the_last_bit(
    run_config: dict[str, Any], begin: dict[str, Tensor], tmp_path: Path
) -> None:
    plain = with_ema(run_config)
    del plain["ema"]
    read = {"validation": {"count": 2, "every": 1, "levels": [0.5]}}
    config = {**with_ema(run_config), **read}
    lora = as_lora(with_ema(run_config))
    seldom = with_ema(run_config, every=2, warmup=True, device="host", decay=0.9)
    two = ["--resume", checkpoint(tmp_path / "ema", 2)]
    calls = {
        "ema": call_of(config, tmp_path / "ema"),
        "plain": call_of({**plain, **read}, tmp_path / "plain"),
        "resumed": call_of(config, tmp_path / "resumed", *two),
        "without": call_of({**plain, **read}, tmp_path / "without", *two),
        "begun": call_of(config, tmp_path / "begun", "--resume", checkpoint(tmp_path / "plain", 2)),
        "lora": call_of(lora, tmp_path / "lora"),
        "seldom": call_of(seldom, tmp_path / "seldom"),
    }
    for name, ended in zip(calls, run_in_ranks(1, list(calls.values())), strict=True):
        assert ended.status == 0, f"{name}:\n{ended.said}\n{ended.complaint}"
    check(tmp_path / "ema", begin, "ema")
    card = (tmp_path / "ema" / "out" / "final" / "README.md").read_text()
    assert "The weights are their exponential moving average over the steps (decay" in card
    one, other = weights(tmp_path / "ema"), weights(tmp_path / "resumed")
    assert all(torch.equal(one[name], other[name]) for name in one)
    trained = saved(tmp_path / "plain", STEPS)
    for name in ("ema", "resumed"):
        assert difference(saved(tmp_path / name, STEPS), trained) == 0, name
    # A checkpoint with an average goes on without, and one without begins an average there.
    assert difference(weights(tmp_path / "without"), trained) == 0
    at_two = saved(tmp_path / "plain", 2)
    wanted = {name: DECAY * at_two[name] + (1 - DECAY) * trained[name] for name in trained}
    assert difference(weights(tmp_path / "begun"), wanted) <= CLOSE
    # lora_B begins at 0, and lora_A is drawn: of the latter the first step is enough to tell.
    halves = [name for name in saved(tmp_path / "lora", 1) if ".lora_B." in name]
    zero = {name: torch.zeros(1) for name in saved(tmp_path / "lora", 1)}
    found = average_of(zero, tmp_path / "lora", *[DECAY] * STEPS)
    assert difference(weights(tmp_path / "lora"), {name: found[name] for name in halves}) <= CLOSE
    # After two steps (1 + 2) / (10 + 2), twice; the third step has no update.
    quarter = {
        name: 0.0625 * begin[name].double() + 0.9375 * value
        for name, value in saved(tmp_path / "seldom", 2).items()
    }
    assert difference(weights(tmp_path / "seldom"), quarter) <= CLOSE


def test_settings_without_an_average_are_refused(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(run_config))
    for told, words in (
        ("ema.every=2", r"ema\.every without an average: add ema\.decay"),
        ("ema.decay=1.5", r"ema\.decay=1\.5: must be a number in \[0, 1\]"),
        ("ema.device=disk", r"ema\.device='disk': must be one of device, host"),
        ("ema.decay=1.0 ema.warmup=false", r"ema\.warmup=false: the average would never move"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_options(tmp_path / "config.json", told.split())
    # With warmup it is the plain mean of all steps.
    assert load_options(tmp_path / "config.json", ["ema.decay=1.0"]).ema.kept(90) == 0.91
