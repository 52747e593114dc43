"""The frozen base of a LoRA stays in 16 bits as its files, and not a bit of the LoRA changes."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from dist_layerlr import plan_model
from launch import train
from launch.trainer.engines import build_engine, native
from launch.trainer.engines.sharding import SHARDINGS
from launch.trainer.families import get_family
from launch.trainer.options import load_options
from launch.trainer.runtime import Runtime
from launch.trainer.weights import empty_model
from tests.support.faults import rows
from tests.support.jobs import as_lora, call_of, weights
from tests.support.ranks import run_ranks

WEIGHTS = "diffusion_pytorch_model.safetensors"
KINDS = ("bf16", "fp16", "fp32")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Bytes = dict[str, int]
"""Of the frozen layers' weights, and of all other parameters."""


@pytest.fixture
def models(tiny_wan: Path, tmp_path: Path) -> dict[str, str]:
    """The tiny checkpoint in each precision."""
    made = {}
    for kind, dtype in DTYPES.items():
        shutil.copytree(tiny_wan, tmp_path / kind)
        tensors = load_file(tiny_wan / WEIGHTS)
        save_file({name: t.to(dtype) for name, t in tensors.items()}, tmp_path / kind / WEIGHTS)
        made[kind] = str(tmp_path / kind)
    return made


def held(
    rank: int, world_size: int, sharding: str, file: str, overrides: list[list[str]]
) -> list[Bytes]:
    """What this rank holds under each set of overrides."""
    runtime = Runtime(rank=rank, world_size=world_size, local_rank=rank, device=torch.device("cpu"))
    found = []
    for override in overrides:
        options = load_options(file, override)
        model = empty_model(get_family(options.model_type), options)
        plan = plan_model(model, options.plan)
        engine = build_engine(SHARDINGS[sharding], model, plan, options, runtime, None)
        count = {"layers": 0, "others": 0}
        for module in engine.model.modules():
            for param in module.parameters(recurse=False):
                local: Any = param.to_local() if hasattr(param, "to_local") else param
                layer = isinstance(module, (nn.Linear, nn.Conv3d)) and not param.requires_grad
                count["layers" if layer else "others"] += local.numel() * local.element_size()
        found.append(count)
    return found


@pytest.mark.parametrize("sharding", ["none", "ddp", "fsdp2"])
def test_a_rank_holds_half_the_bytes_of_the_base_where_the_files_are_16_bits(
    sharding: str, run_config: dict[str, Any], models: dict[str, str], tmp_path: Path
) -> None:
    _, _, _, file, *_ = call_of(as_lora(run_config), tmp_path, "--sharding", "none")
    cases = [(kind, "bf16") for kind in KINDS] + [("bf16", "fp32")]
    overrides = [[f"model_path={models[kind]}", f"train.dtype={dtype}"] for kind, dtype in cases]
    for found in run_ranks(held, 1 if sharding == "none" else 2, sharding, file, overrides):
        bf16, fp16, fp32, computed_in_fp32 = found
        assert bf16 == fp16 == {**fp32, "layers": fp32["layers"] // 2}
        assert computed_in_fp32 == fp32
        assert bf16["layers"] > bf16["others"] > 0


def train_all(rank: int, world_size: int, calls: list[list[str]], held: list[bool]) -> list[str]:
    """Run each call, with the base in its files' precision or in fp32. Returns what went wrong."""
    train.stop = lambda: None
    keep, said = native.hold_in_16_bits, []
    for call, in_16_bits in zip(calls, held, strict=True):
        native.hold_in_16_bits = keep if in_16_bits else lambda *_: None
        complaint = io.StringIO()
        with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(io.StringIO()):
            status = train.main(call)
        said.append("" if status == 0 else complaint.getvalue())
        dist.barrier()
    return said


def test_losses_and_lora_are_bitwise_those_of_a_base_in_fp32(
    run_config: dict[str, Any], models: dict[str, str], tmp_path: Path
) -> None:
    config = as_lora(run_config)
    config["train"] = {**config["train"], "steps": 2, "dtype": "bf16"}
    calls, held_in_16_bits, pairs = [], [], []
    for sharding, kind in (("ddp", "bf16"), ("fsdp2", "fp16")):
        pair = [tmp_path / f"{sharding}-{kind}-{name}" for name in ("held", "cast")]
        for folder in pair:
            flags = ["--sharding", sharding]
            calls.append(call_of({**config, "model_path": models[kind]}, folder, *flags))
        held_in_16_bits += [True, False]
        pairs.append(pair)
    for complaints in run_ranks(train_all, 2, calls, held_in_16_bits):
        assert complaints == [""] * len(calls)
    for one, other in pairs:
        a, b = weights(one), weights(other)
        assert all(torch.equal(a[name], b[name]) for name in a.keys() | b.keys()), one.name
        losses = [[row["loss"] for row in rows(folder / "out")] for folder in (one, other)]
        assert losses[0] == losses[1] and len(losses[0]) == 2
