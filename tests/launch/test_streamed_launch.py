"""``memory.stagehand`` in the main job: the same weights as the resident run, under every sharder that can offload."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_world_size_invariance import as_lora

import make_tiny_wan
from dist_layerlr import plan_model
from parts.data import open_dataset
from parts.engines import build_engine
from parts.engines.streaming import check_streaming
from parts.families import get_family
from parts.loop import train
from parts.metrics import MetricsFile
from parts.options import RunOptions, load_options
from parts.runtime import Runtime
from parts.weights import check_weights, empty_model
from ranks import run_ranks

ROOT = Path(__file__).resolve().parent.parent.parent
BLOCKS, WINDOW = 6, 2
STAGEHAND = {"enabled": True, "pinned_pool_mb": 64, "prefetch_window": WINDOW}
OURS = {**STAGEHAND, "min_numel": 1000}
"""The test model's blocks are far smaller than what is streamed by default."""
Result = dict[str, Any]


@pytest.fixture(scope="module")
def six_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More blocks than slots, so that every step streams."""
    folder = tmp_path_factory.mktemp("six") / "wan"
    size = ["--layers", str(BLOCKS), "--heads", "2", "--head-dim", "16", "--freq-dim", "32"]
    assert make_tiny_wan.main([str(folder), *size]) == 0
    return folder


@pytest.fixture
def lora(run_config: dict[str, Any], six_blocks: Path) -> dict[str, Any]:
    config = as_lora({**run_config, "model_path": str(six_blocks)})
    return {**config, "train": {**config["train"], "steps": 3, "micro_batch": 2, "checkpointing": True}}


def with_stagehand(config: dict[str, Any], stagehand: dict[str, Any]) -> dict[str, Any]:
    return {**config, "memory": {"stagehand": stagehand}}


def train_one(sharding: str, options: RunOptions, runtime: Runtime, folder: Path, ds_config: Path | None) -> Result:
    """Train as launch/train.py does, in this process."""
    check_streaming(options, sharding)
    family = get_family(options.model_type)
    model = empty_model(family, options)
    plan = plan_model(model, options.plan)
    files = check_weights(model, options.model_path)
    engine = build_engine(sharding, model, plan, options, runtime, files, None if ds_config is None else str(ds_config))
    engine.prove(1.0)
    metrics = MetricsFile(folder / f"{sharding}-{options.stream is not None}-{runtime.rank}.jsonl")
    outcome = train(engine, family, open_dataset(options.data), options, runtime, metrics)
    proof = engine.prove(outcome.last_factor)
    final = {n: t.float().numpy() for n, t in engine.trained_tensors(keep=True)}
    rows = [json.loads(line) for line in (Path(metrics._file.name)).read_text().splitlines()]
    return {"sharder": proof.sharder, "weights": final, "rows": rows, "offload": offloads(engine)}


def offloads(engine: Any) -> Any:
    """What the sharder's own objects say about their offload."""
    if hasattr(engine.model, "zero_offload_param"):
        zero = engine.model._config.zero_config
        devices = {p.ds_tensor.device.type for p in engine.model.module.parameters()}
        return engine.model.zero_offload_param().device, zero.prefetch_bucket_size, zero.max_live_parameters, devices
    if hasattr(engine.model, "_get_fsdp_state"):
        states = [block._get_fsdp_state() for block in engine.model.blocks]
        policies = {type(s._fsdp_param_groups[0].offload_policy).__name__ for s in states}
        ahead = [len(s._states_to_forward_prefetch) for s in states]
        return policies, ahead, [len(s._states_to_backward_prefetch) for s in states]
    return None


def on_one_rank(rank: int, world_size: int, configs: list[str], folder: Path) -> list[Result]:
    runtime = Runtime(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    return [train_one("none", load_options(config), runtime, folder, None) for config in configs]


def on_two_ranks(rank: int, world_size: int, config: str, folder: Path) -> list[Result]:
    runtime = Runtime(rank=rank, world_size=world_size, local_rank=rank, device=torch.device("cpu"))
    options = load_options(config)
    zero3 = ROOT / "ds_configs" / "zero3.json"
    return [train_one("fsdp2", options, runtime, folder, None), train_one("zero", options, runtime, folder, zero3)]


def difference(a: Result, b: Result) -> float:
    assert a["weights"].keys() == b["weights"].keys()
    return max(float(abs(a["weights"][n] - b["weights"][n]).max()) for n in a["weights"])


def test_fsdp2_and_zero3_take_the_window_over_and_end_in_the_weights_of_the_resident_run(
    lora: dict[str, Any], write_config: Callable[..., Path], tmp_path: Path
) -> None:
    lora["train"] = {**lora["train"], "steps": 2, "micro_batch": 4, "checkpointing": False}
    resident = str(write_config(lora, "resident.json"))
    offloaded = str(write_config(with_stagehand(lora, STAGEHAND), "offloaded.json"))
    (alone,) = run_ranks(on_one_rank, 1, [resident], tmp_path)[0]
    fsdp2, zero3 = run_ranks(on_two_ranks, 2, offloaded, tmp_path)[0]
    assert (fsdp2["sharder"], zero3["sharder"]) == ("fsdp2", "zero 3")
    assert difference(alone, fsdp2) <= 1e-5 and difference(alone, zero3) <= 1e-5
    assert fsdp2["offload"] == ({"CPUOffloadPolicy"}, [2, 2, 2, 2, 1, 0], [0, 1, 2, 2, 2, 2])
    device, bucket, live, devices = zero3["offload"]
    assert device == "cpu" and devices == {"cpu"} and live == bucket // WINDOW * (WINDOW + 2) > 0
