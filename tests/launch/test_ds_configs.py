"""Every shipped ds_config is accepted, and trains: fp32 ones end in the weights of the unsharded
run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_layerlr import plan_model
from dist_layerlr.files import read_json
from dist_layerlr.optim import check_ds_config
from dist_layerlr.sharders import sharder_of
from dist_layerlr.sharders.ranges import flat_ranges
from dist_layerlr.weights.gather import LiveWeights
from launch.trainer.data import open_dataset
from launch.trainer.engines import build_engine
from launch.trainer.engines.sharding import SHARDINGS
from launch.trainer.engines.zero import read_zero_config
from launch.trainer.families import get_family
from launch.trainer.job import Job
from launch.trainer.loop import train
from launch.trainer.options import RunOptions, load_options
from launch.trainer.runtime import Runtime
from launch.trainer.weights import empty_model
from tests.support.ranks import run_ranks

FOLDER = Path(__file__).resolve().parent.parent.parent / "ds_configs"
FILES = sorted(FOLDER.glob("*.json"))
ZERO_ALIGN = 2


def is_fp32(file: Path) -> bool:
    return "bf16" not in file.stem


class Losses:
    """Stands in for the metrics file."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def write(self, row: dict[str, Any]) -> None:
        self.values.append(row["loss"])


Result = dict[str, Any]


def run_one(sharding: str, options: RunOptions, runtime: Runtime, ds_config: Path | None) -> Result:
    """Train as launch/train.py does. Returns losses, the sharder that was proved, and the final
    weights (rank 0)."""
    family = get_family(options.model_type)
    model = empty_model(family, options)
    plan = plan_model(model, options.plan)
    config_file = None if ds_config is None else str(ds_config)
    engine = build_engine(SHARDINGS[sharding], model, plan, options, runtime, config_file)
    engine.prove(1.0, 0)
    losses = Losses()
    job = Job(
        engine=engine,
        family=family,
        objective=family.objective(options.objective, Path(options.model_path)),
        data=open_dataset(options.data),
        options=options,
        runtime=runtime,
        folder=Path(),
        run_id="",
    )
    outcome = train(job, losses)  # type: ignore[arg-type]
    proof = engine.prove(outcome.last_factor, outcome.steps)
    source = LiveWeights(engine.model)
    gathered = {name: source.fetch(name) for name, held in source.table.items() if held.trainable}
    weights = {name: whole.numpy() for name, whole in gathered.items() if whole is not None}
    return {
        "sharder": proof.sharder,
        "ranks": proof.ranks,
        "losses": losses.values,
        "weights": weights,
        "watched": len(outcome.observed),
        "flat": flat_problems(engine.model, runtime) if ds_config else [],
    }


def flat_problems(engine: Any, runtime: Runtime) -> list[str]:
    """Where ZeRO-1 and -2 put their elements, against the ranges that benchmarks/simulate.py
    computes."""
    if engine.zero_optimization_stage() not in (1, 2):
        return []
    flats: dict[int, list[Any]] = {}
    for piece in sharder_of(engine).pieces(None).pieces:
        flats.setdefault(id(piece.owner), []).append(piece)
    sizes = {n: p.numel() for n, p in engine.module.named_parameters()}
    problems = []
    for pieces in flats.values():
        wanted = flat_ranges(
            [sizes[p.name] for p in pieces], runtime.world_size, runtime.rank, align=ZERO_ALIGN
        )
        problems += [p.name for p, w in zip(pieces, wanted, strict=True) if (p.start, p.numel) != w]
    return problems


def train_all(rank: int, world_size: int, config: str, files: list[Path]) -> list[Result]:
    runtime = Runtime(rank=rank, world_size=world_size, local_rank=rank, device=torch.device("cpu"))
    if world_size == 1:
        return [run_one("none", load_options(config), runtime, None)]
    results = []
    for file in files:
        dtype = "fp32" if is_fp32(file) else "bf16"
        results.append(
            run_one("zero", load_options(config, [f"train.dtype={dtype}"]), runtime, file)
        )
        dist.barrier()
    return results


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_shipped_config_is_accepted_and_leaves_rates_alone(
    file: Path, run_config: dict[str, Any], write_config: Callable[..., Path]
) -> None:
    raw = read_json(file)
    check_ds_config(raw)
    assert raw["gradient_clipping"] == 0.0
    assert not raw.keys() & {
        "scheduler",
        "optimizer",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
    }
    run_config["train"].update(dtype="fp32" if is_fp32(file) else "bf16", micro_batch=2)
    filled = read_zero_config(str(file), load_options(write_config(run_config)), 2)
    assert filled["train_batch_size"] == 8
    assert filled["train_micro_batch_size_per_gpu"] * filled["gradient_accumulation_steps"] * 2 == 8
    assert filled["gradient_clipping"] == 1.0
    assert filled["zero_force_ds_cpu_optimizer"] is False
    assert str(raw["zero_optimization"]["stage"]) in file.stem


def test_readme_says_what_each_config_is_for() -> None:
    text = (FOLDER / "README.md").read_text()
    assert [f.name for f in FILES if f"| `{f.name}` |" not in text] == []


def test_every_shipped_config_trains_to_the_weights_of_the_unsharded_run(
    run_config: dict[str, Any], write_config: Callable[..., Path], tmp_path: Path
) -> None:
    run_config["train"].update(steps=2, micro_batch=2)
    config = str(write_config(run_config))
    files = [*FILES, everything_gathered(tmp_path)]
    (alone,) = run_ranks(train_all, 1, config, [])[0]
    together = run_ranks(train_all, 2, config, files)[0]
    for file, result in zip(files, together, strict=True):
        stage = read_json(file)["zero_optimization"]["stage"]
        assert (result["sharder"], result["ranks"]) == (f"zero {stage}", 2)
        assert len(result["losses"]) == 2 and all(map(math.isfinite, result["losses"]))
        assert result["watched"] > 0, file.stem
        assert result["flat"] == [], file.stem
        assert result["weights"].keys() == alone["weights"].keys()
        for name, wanted in alone["weights"].items():
            # bf16: 8 bits of mantissa, and two AdamW steps at up to 4e-4 whose signs may differ.
            bar = 1e-5 if is_fp32(file) else 2**-8 * abs(wanted) + 2e-3
            assert (abs(result["weights"][name] - wanted) <= bar).all(), f"{file.stem}: {name}"


def everything_gathered(folder: Path) -> Path:
    """zero3_offload.json for a model whose every layer is large: nothing is small enough to stay
    whole on the ranks."""
    config = read_json(FOLDER / "zero3_offload.json")
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = folder / "zero3_offload_gathered.json"
    path.write_text(json.dumps(config))
    return path
