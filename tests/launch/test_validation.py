"""The validation loss of samples that are held out, and the end of a run that it decides."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors import safe_open

from dist_layerlr.errors import ConfigError
from launch.trainer.data.cached import CachedDataset
from launch.trainer.data.digits import MovingDigits
from launch.trainer.data.held import split
from launch.trainer.objectives.classes import Classification
from launch.trainer.options import load_options
from launch.trainer.seeds import TRAIN_STREAM, VALIDATION_STREAM, mix_seed
from launch.trainer.team import Team
from launch.trainer.validation import Validation, check_levels
from launch.trainer.validation_options import EarlyStop, ValidationOptions
from tests.support.jobs import ROOT, as_lora, call_of, run_in_ranks, weights
from tests.support.latents import write_sample

STREAMED = {"enabled": True, "pinned_pool_mb": 64, "prefetch_window": 1, "min_numel": 100}
MODES = {
    **{name: ["--sharding", name] for name in ("ddp", "fsdp1_flat", "fsdp2")},
    **{f"zero{n}": ["--deepspeed_config", f"{ROOT}/ds_configs/zero{n}.json"] for n in (2, 3)},
    "streamed": ["--sharding", "ddp"],
}
HELD = {"count": 5, "levels": [0.2, 0.8], "batch": 2}
DATA = {"kind": "digits", "clips": 60}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / "metrics.jsonl").open()]


def readings(folder: Path) -> list[dict[str, Any]]:
    return [row for row in rows_of(folder) if "val_loss" in row]


def held_out(config: dict[str, Any], every: int, **more: Any) -> dict[str, Any]:
    train = {**config["train"], "steps": 3, "save_every": 2, **more}
    # A dropout draws from the generator that a reading must leave alone.
    return {**config, "data": DATA, "train": train, "validation": {**HELD, "every": every}}


def test_readings_change_no_weight_and_are_the_same_under_every_sharder(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    lora = as_lora(run_config)
    lora["adapter"]["dropout"] = 0.5
    calls = {}
    for mode, flags in MODES.items():
        config = {**lora, "memory": {"stagehand": STREAMED}} if mode == "streamed" else lora
        for every in (1, 1000):
            folder = tmp_path / f"{mode}-{every}"
            calls[folder.name] = call_of(held_out(config, every), folder, *flags)
    alone = call_of(held_out(lora, 1), tmp_path / "none")
    (one,) = run_in_ranks(1, [alone])
    assert one.status == 0, one.complaint
    for name, ended in zip(calls, run_in_ranks(2, list(calls.values())), strict=True):
        assert ended.status == 0, f"{name}:\n{ended.said}\n{ended.complaint}"
    right = readings(tmp_path / "none")
    assert [row["step"] for row in right] == [0, 1, 2]
    for mode in MODES:
        often, once = tmp_path / f"{mode}-1", tmp_path / f"{mode}-1000"
        first, second = weights(often), weights(once)
        assert all(torch.equal(first[name], second[name]) for name in first), mode
        assert readings(often)[-1:] == readings(once), mode
        for found, wanted in zip(readings(often), right, strict=True):
            assert found == pytest.approx(wanted, rel=1e-5), mode


def noisy(clean: torch.Tensor, key: str, level: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What a held out sample is trained towards, by the formulas alone."""
    digest = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
    seed = mix_seed(mix_seed(VALIDATION_STREAM), TRAIN_STREAM, digest)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    return (1 - level) * clean + level * noise, noise - clean


def test_a_reading_is_the_loss_of_the_weights_that_are_saved_over_samples_that_never_train(
    run_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "read"
    get = MovingDigits.__getitem__

    def logged(data: MovingDigits, index: int) -> Any:
        with log.open("a") as file:
            file.write(f"{index}\n")
        return get(data, index)

    monkeypatch.setattr(MovingDigits, "__getitem__", logged)
    (done,) = run_in_ranks(1, [call_of(held_out(run_config, 2), tmp_path)])
    assert done.status == 0, done.complaint
    assert "step 2 of 3: validation loss" in done.said and "5 samples held out" in done.said
    data = MovingDigits(clips=60)
    keys = [repr(data.clip(index)) for index in range(60)]
    ranked = sorted(set(keys), key=lambda key: hashlib.sha256(key.encode()).hexdigest())
    read = [int(line) for line in log.read_text().split()]
    # One reading after 2 steps and one after 3: each reads five samples once, for all levels.
    evaluated = [index for index in read if keys[index] in ranked[:5]]
    assert len(evaluated) == 10 and len(set(evaluated)) == 5
    model = WanTransformer3DModel.from_pretrained(tmp_path / "out" / "final").eval()
    reading = readings(tmp_path)[-1]
    means = []
    for level in HELD["levels"]:
        losses = []
        for index in set(evaluated):
            sample = get(data, index)
            given, wanted = noisy(sample["latents"], keys[index], level)
            time = torch.tensor([level * 1000.0])
            with torch.no_grad():
                found = model(given[None], time, sample["prompt_embeds"][None]).sample[0]
            losses.append(float((found - wanted).square().mean()))
        means.append(sum(losses) / len(losses))
        assert reading[f"val_loss/{level}"] == pytest.approx(means[-1], rel=1e-4)
    assert reading["val_loss"] == pytest.approx(sum(means) / 2, rel=1e-4)


def test_samples_are_held_out_by_name_with_all_their_copies(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        for index in range(20):
            path = tmp_path / folder / f"{index}.safetensors"
            write_sample(path, torch.full((1, 1, 4, 4), float(index)), caption="the same")
    data = CachedDataset(str(tmp_path), repeats={"a": 3})
    training, held = split(data, ValidationOptions(share=0.3))
    assert held is not None
    paths = [data.key(index) for index in range(len(data))]
    kept = [training.key(index) for index in range(len(training))]
    out = [held.key(index) for index in range(len(held))]
    assert 5 < len(out) == len(set(out)) < 20 and not set(out) & set(kept)
    assert sorted([path for path in paths if path not in out]) == sorted(kept)
    # Whatever is added later, these are held out.
    for index in range(20, 60):
        write_sample(tmp_path / "b" / f"{index}.safetensors", torch.zeros(1, 1, 4, 4))
    _, more = split(CachedDataset(str(tmp_path)), ValidationOptions(share=0.3))
    assert more is not None
    assert set(out) < {more.key(index) for index in range(len(more))}
    counted, five = split(data, ValidationOptions(count=5))
    assert five is not None and len(five) == 5
    assert torch.equal(five[0]["latents"], data[paths.index(five.key(0))]["latents"])
    assert len(counted) == 80 - sum(paths.count(five.key(index)) for index in range(5))
    _, one = split(data, ValidationOptions(share=1e-9))
    assert one is not None and len(one) == 1
    for options, words in (
        (ValidationOptions(count=40), r"validation\.count=40: must be below 40"),
        (ValidationOptions(share=1.0), r"validation\.share=1\.0: must be a share that leaves"),
    ):
        with pytest.raises(ConfigError, match=words):
            split(data, options)


def test_a_run_ends_early_on_all_ranks_with_a_whole_result_and_resumes_to_that_end(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    # No reading is 1000 better than the first, so that the third is the second bad one.
    stop = {"patience": 2, "min_delta": 1000}
    config = held_out(run_config, 1, steps=9, save_every=2, early_stop=stop)
    saved = tmp_path / "early" / "out" / "checkpoints" / "step_00000002"
    sharded = ["--sharding", "fsdp2"]
    patient = held_out(run_config, 1, steps=4, early_stop={**stop, "patience": 4})
    calls = [
        call_of(config, tmp_path / "early", *sharded),
        call_of(config, tmp_path / "later", "--sharding", "ddp", "--resume", str(saved)),
        call_of(patient, tmp_path / "patient", *sharded),
        call_of(config, tmp_path / "early", *sharded, "--resume", "latest"),
    ]
    early, later, whole, again = run_in_ranks(2, calls)
    for ended in (early, later, again):
        assert ended.status == 0, ended.complaint
        assert "ended early after 3 steps" in ended.said
    assert "train.early_stop: 2 readings are no better than" in early.said
    assert "finished 4 steps" in whole.said
    assert [row["step"] for row in readings(tmp_path / "early")] == [0, 1, 2]
    assert [row["step"] for row in readings(tmp_path / "later")] == [2]
    out = tmp_path / "early" / "out"
    with safe_open(str(min((out / "final").glob("*.safetensors"))), framework="pt") as file:
        assert file.metadata()["step"] == "3"
    assert json.loads((out / "verify.json").read_text())["end"]["parameters"] > 0
    assert (out / "page.html").exists() and (out / "checkpoints" / "step_00000003").is_dir()


def test_a_run_without_one_finite_reading_ends_early_too() -> None:
    train = SimpleNamespace(early_stop=EarlyStop(patience=2), steps=9, save_every=None)
    said: list[str] = []
    job = SimpleNamespace(
        options=SimpleNamespace(train=train, validation=ValidationOptions()),
        runtime=SimpleNamespace(say=said.append),
        held=None,
    )
    held = Validation(cast(Team, SimpleNamespace(face=job)), {})
    for done in (1, 2):
        rows = [{"step": done - 1, "val_loss": math.nan}]
        held._judge(rows)
        held._say(done, rows)
    assert held.enough
    assert said[-1] == "train.early_stop: 2 readings are no number"


def test_what_cannot_be_read_is_refused_before_training(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(run_config))
    for told, words in (
        (["train.early_stop.patience=2"], r"train\.early_stop without a validation loss"),
        (["train.early_stop.patience=0"], r"train\.early_stop\.patience=0"),
        (["validation.every=5"], r"validation\.every without samples that are held out"),
        (["validation.share=0.1", "validation.count=3"], "remove one of them"),
        (["validation.share=1.5"], r"validation\.share=1\.5: must be a number in \(0, 1\]"),
        (["validation.count=3", "validation.levels=[2]"], r"validation\.levels"),
        (["validation.count=3", "validation.levels=[0.3,0.5,0.3000001]"], "0.3 is there twice"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_options(tmp_path / "config.json", told)
    asked = ValidationOptions(count=1, levels=(0.5,))
    with pytest.raises(ConfigError, match="trained without noise"):
        check_levels(asked, Classification(predict=lambda model, batch: torch.zeros(1)))
    unset = load_options(tmp_path / "config.json")
    assert not unset.validation.on and unset.train.early_stop is None
