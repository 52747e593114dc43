"""``memory.stagehand`` in the main job: the same weights as the resident run, under every sharder
that can offload."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dist_layerlr import plan_model
from dist_layerlr.errors import ConfigError
from dist_layerlr.offload import StreamPolicy
from dist_layerlr.weights.gather import LiveWeights
from launch import make_tiny_wan
from launch.trainer.data import open_dataset
from launch.trainer.engines import build_engine
from launch.trainer.engines.sharding import SHARDINGS, check_streaming
from launch.trainer.engines.zero import read_zero_config
from launch.trainer.families import get_family
from launch.trainer.job import Job
from launch.trainer.loop import train
from launch.trainer.metrics import MetricsFile
from launch.trainer.options import RunOptions, load_options
from launch.trainer.runtime import Runtime
from launch.trainer.weights import empty_model
from tests.support.jobs import ROOT, as_lora, call_of, largest_difference, run_in_ranks, weights
from tests.support.ranks import run_ranks

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
    return {
        **config,
        "train": {**config["train"], "steps": 3, "micro_batch": 2, "checkpointing": True},
    }


def with_stagehand(config: dict[str, Any], stagehand: dict[str, Any]) -> dict[str, Any]:
    return {**config, "memory": {"stagehand": stagehand}}


def train_one(
    sharding: str, options: RunOptions, runtime: Runtime, folder: Path, ds_config: Path | None
) -> Result:
    """Train as launch/train.py does, in this process."""
    check_streaming(options, SHARDINGS[sharding])
    family = get_family(options.model_type)
    model = empty_model(family, options)
    plan = plan_model(model, options.plan)
    config_file = None if ds_config is None else str(ds_config)
    engine = build_engine(SHARDINGS[sharding], model, plan, options, runtime, config_file)
    engine.prove(1.0, 0)
    metrics = MetricsFile(folder / f"{sharding}-{options.stream is not None}-{runtime.rank}.jsonl")
    job = Job(
        engine=engine,
        family=family,
        objective=family.objective(options.objective, Path(options.model_path)),
        data=open_dataset(options.data),
        options=options,
        runtime=runtime,
        folder=folder,
        run_id="",
    )
    outcome = train(job, metrics)
    proof = engine.prove(outcome.last_factor, outcome.steps)
    source = LiveWeights(engine.model)
    fetched = {name: source.fetch(name) for name, held in source.table.items() if held.trainable}
    final = {name: whole.float().numpy() for name, whole in fetched.items() if whole is not None}
    rows = [json.loads(line) for line in (Path(metrics._file.name)).read_text().splitlines()]
    return {"sharder": proof.sharder, "weights": final, "rows": rows, "offload": offloads(engine)}


def offloads(engine: Any) -> Any:
    """What the sharder's own objects say about their offload."""
    if hasattr(engine.model, "zero_offload_param"):
        zero = engine.model._config.zero_config
        devices = {p.ds_tensor.device.type for p in engine.model.module.parameters()}
        return (
            engine.model.zero_offload_param().device,
            zero.prefetch_bucket_size,
            zero.max_live_parameters,
            devices,
        )
    if hasattr(engine.model, "_get_fsdp_state"):
        states = [block._get_fsdp_state() for block in engine.model.blocks]
        # torch 2.10 keeps one group on each state, later releases a list.
        groups = [getattr(s, "_fsdp_param_groups", None) or [s._fsdp_param_group] for s in states]
        policies = {type(group[0].offload_policy).__name__ for group in groups}
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
    return [
        train_one("fsdp2", options, runtime, folder, None),
        train_one("zero", options, runtime, folder, zero3),
    ]


def difference(a: Result, b: Result) -> float:
    assert a["weights"].keys() == b["weights"].keys()
    return max(float(abs(a["weights"][n] - b["weights"][n]).max()) for n in a["weights"])


def test_fsdp2_and_zero3_take_the_window_over_and_end_in_the_weights_of_the_resident_run(
    lora: dict[str, Any], write_config: Callable[..., Path], tmp_path: Path
) -> None:
    lora["train"] = {**lora["train"], "steps": 1, "micro_batch": 4, "checkpointing": False}
    resident = str(write_config(lora, "resident.json"))
    offloaded = str(write_config(with_stagehand(lora, STAGEHAND), "offloaded.json"))
    (alone,) = run_ranks(on_one_rank, 1, [resident], tmp_path)[0]
    fsdp2, zero3 = run_ranks(on_two_ranks, 2, offloaded, tmp_path)[0]
    assert (fsdp2["sharder"], zero3["sharder"]) == ("fsdp2", "zero 3")
    assert difference(alone, fsdp2) <= 1e-5 and difference(alone, zero3) <= 1e-5
    assert fsdp2["offload"] == ({"CPUOffloadPolicy"}, [2, 2, 2, 2, 1, 0], [0, 1, 2, 2, 2, 2])
    device, bucket, live, devices = zero3["offload"]
    assert device == "cpu" and devices == {"cpu"} and live == bucket // WINDOW * (WINDOW + 2) > 0


def test_ddp_with_a_streamed_base_ends_in_the_weights_of_the_resident_run(
    lora: dict[str, Any], write_config: Callable[..., Path], tmp_path: Path
) -> None:
    streamed = with_stagehand(lora, OURS)
    mapped = with_stagehand(lora, {**OURS, "host": "file"})
    configs = [
        str(write_config(config, f"{i}.json")) for i, config in enumerate((lora, streamed, mapped))
    ]
    resident, alone, from_file = run_ranks(on_one_rank, 1, configs, tmp_path)[0]
    assert difference(resident, alone) == difference(resident, from_file) == 0.0
    (done,) = run_in_ranks(2, [call_of(streamed, tmp_path / "ddp", "--sharding", "ddp")])
    assert done.status == 0, done.complaint
    assert "verified on 2 ranks (ddp)" in done.said
    assert f"streaming {BLOCKS} of {BLOCKS} units through {WINDOW + 2} slots" in done.said
    final = {name: torch.from_numpy(value) for name, value in resident["weights"].items()}
    assert largest_difference(saved_names(final), weights(tmp_path / "ddp")) <= 1e-6
    rows = [
        json.loads(line)
        for line in (tmp_path / "ddp" / "out" / "metrics.jsonl").read_text().splitlines()
    ]
    predicted, first, *later = [rows[0]["prediction"], *rows[1:]]
    assert predicted["fetches"] == 2 * 2 * (BLOCKS - WINDOW - 2)  # two microbatches
    assert first["fetches"] == predicted["fetches"] + WINDOW + 2  # the ring is filled
    for row in later:
        assert all(row[key] == predicted[key] for key in ("fetches", "h2d_bytes", "d2h_bytes"))
        assert row["d2h_bytes"] == 0 and row["units_in_slots"] == WINDOW + 2


def saved_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As in adapter_model.safetensors."""
    return {
        "base_model.model." + name.replace(".default", ""): value for name, value in tensors.items()
    }


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_streamed_full_finetune_is_stepped_on_the_host_and_equals_the_resident_one(
    dtype: str,
    run_config: dict[str, Any],
    six_blocks: Path,
    write_config: Callable[..., Path],
    tmp_path: Path,
) -> None:
    # Without checkpointing autograd would keep what autocast made of the weights, and backward
    # fetch nothing.
    settings = {"steps": 3, "micro_batch": 4, "dtype": dtype, "checkpointing": dtype == "bf16"}
    run_config.update(model_path=str(six_blocks), train={**run_config["train"], **settings})
    configs = [run_config, with_stagehand(run_config, OURS)]
    files = [str(write_config(config, f"{i}.json")) for i, config in enumerate(configs)]
    resident, streamed = run_ranks(on_one_rank, 1, files, tmp_path)[0]
    assert difference(resident, streamed) == 0.0
    assert [r["fetches"] for r in streamed["rows"]] == [2 * (2 * BLOCKS - WINDOW - 2)] * 3
    assert all(r["d2h_bytes"] > 0 for r in streamed["rows"])


@pytest.mark.parametrize(
    "sharding, edit, words",
    [
        ("fsdp1", {}, ["--sharding fsdp1", "fsdp2", "zero3.json"]),
        ("fsdp1_flat", {}, ["--sharding fsdp1_flat", "fsdp2"]),
        ("fsdp2", {"mode": "layer"}, ["mode='layer'", "fsdp2", "remove it"]),
        ("zero", {"host": "file"}, ["host='file'", "remove it"]),
        ("ddp", {}, ["full finetune", "fsdp2"]),
    ],
)
def test_a_sharder_that_cannot_offload_as_asked_says_what_to_do(
    sharding: str,
    edit: dict[str, Any],
    words: list[str],
    run_config: dict[str, Any],
    write_config: Callable[..., Path],
) -> None:
    options = load_options(write_config(with_stagehand(run_config, {**STAGEHAND, **edit})))
    with pytest.raises(ConfigError) as caught:
        check_streaming(options, SHARDINGS[sharding])
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_zero_below_stage_3_is_refused_by_name(
    stage: int, run_config: dict[str, Any], write_config: Callable[..., Path]
) -> None:
    options = load_options(write_config(with_stagehand(run_config, STAGEHAND)))
    with pytest.raises(ConfigError, match=rf"zero{stage}.json \(ZeRO stage {stage}\).*zero3.json"):
        read_zero_config(str(ROOT / "ds_configs" / f"zero{stage}.json"), options, 2)


def test_stagehand_takes_the_policys_fields_and_refuses_others(
    run_config: dict[str, Any], write_config: Callable[..., Path]
) -> None:
    def read(**stagehand: Any) -> StreamPolicy | None:
        return load_options(write_config(with_stagehand(run_config, stagehand))).stream

    assert read(**STAGEHAND) == StreamPolicy(pinned_pool_mb=64, prefetch_window=2)
    assert read(enabled=True, resident_blocks="auto", host="file") == StreamPolicy(
        resident_blocks="auto", host="file"
    )
    assert read(enabled=False, prefetch_window=2) is None and read() is None
    with pytest.raises(ConfigError, match="memory.stagehand: Invalid prefetch_window=0"):
        read(enabled=False, prefetch_window=0)
    with pytest.raises(ConfigError, match="'prefetch_windw'.*Did you mean 'prefetch_window'"):
        read(prefetch_windw=2)


def test_the_shipped_config_streams_a_lora_and_trains_on_other_data_and_model(
    six_blocks: Path, run_config: dict[str, Any], write_config: Callable[..., Path], tmp_path: Path
) -> None:
    shipped = json.loads((ROOT / "launch" / "configs" / "wan_lora_streamed.json").read_text())
    smaller = {**shipped["train"], "steps": 2, "global_batch": 4}
    shipped |= {"model_path": str(six_blocks), "data": run_config["data"], "train": smaller}
    shipped["schedule"]["warmup_steps"] = 0
    shipped["memory"]["stagehand"]["min_numel"] = 1000
    resident = {key: value for key, value in shipped.items() if key != "memory"}
    configs = [
        str(write_config(config, f"{i}.json")) for i, config in enumerate((resident, shipped))
    ]
    whole, streamed = run_ranks(on_one_rank, 1, configs, tmp_path)[0]
    assert difference(whole, streamed) == 0.0  # bf16: what autocast rounds is stored rounded
    assert streamed["rows"][0]["h2d_bytes"] > 0
    assert "h2d_bytes" not in whole["rows"][0]


def run_main(rank: int, world_size: int, runs: list[list[str]]) -> list[int]:
    import torch.distributed as dist

    from launch import train as program

    dist.destroy_process_group()
    return [program.main(arguments) for arguments in runs]


@pytest.mark.full
def test_a_checkpoint_of_a_streamed_run_continues_with_or_without_streaming(
    lora: dict[str, Any], write_config: Callable[..., Path], tmp_path: Path
) -> None:
    lora["train"] = {**lora["train"], "steps": 4, "save_every": 2}
    resident = str(write_config(lora, "resident.json"))
    streamed = str(write_config(with_stagehand(lora, OURS), "streamed.json"))
    begun = tmp_path / "streamed"
    runs = [["--config", streamed, "--output-dir", str(begun)]]
    for config, name in ((resident, "resident"), (streamed, "again")):
        at_two = str(begun / "checkpoints" / "step_00000002")
        runs.append(["--config", config, "--output-dir", str(tmp_path / name), "--resume", at_two])
    assert run_ranks(run_main, 1, runs)[0] == [0, 0, 0]
    whole, *continued = [
        load_file(str(tmp_path / name / "final" / "adapter_model.safetensors"))
        for name in ("streamed", "resident", "again")
    ]
    assert [largest_difference(whole, other) for other in continued] == [0.0, 0.0]
