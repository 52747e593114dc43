"""A segmented run under the tools that torch and DeepSpeed users already have: state dicts, DCP,
exports, universal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import dist_layerlr as dl
from tests.support.cases import At, Cases, Outcomes
from tests.support.drivers import need_cpu_adam, start_deepspeed
from tests.support.naive import CONFIG, backward, farthest, make_model
from tests.support.toys import Block

STEPS = 3
cases = Cases(before=start_deepspeed)


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    return cases.run(request)


def adamw(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, weight_decay=0.1, fused=True)


def reference_moments(key: str) -> dict[str, torch.Tensor]:
    """A moment of an unsharded run on the global batch, by name."""
    model = make_model()
    optimizer = adamw(dl.optim.param_groups(dl.plan_model(model, CONFIG), model))
    for step in range(STEPS):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    return {name: optimizer.state[p][key] for name, p in model.named_parameters()}


def shard(sharder: str) -> tuple[dl.Plan, nn.Module, torch.optim.Optimizer]:
    model: Any = make_model()
    plan = dl.plan_model(model, CONFIG)
    if sharder == "fsdp2":
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    else:
        policy = torch.distributed.fsdp.wrap.ModuleWrapPolicy({Block})
        orig = sharder == "fsdp1"
        model = FSDP(
            model, auto_wrap_policy=policy, use_orig_params=orig, device_id=torch.device("cpu")
        )
    return plan, model, dl.attach(plan, model, adamw, emission="segmented")


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: range) -> None:
    for step in steps:
        backward(model, step, rank)
        optimizer.step()
        optimizer.zero_grad()


def weights(model: Any) -> dict[str, torch.Tensor]:
    if isinstance(model, FSDP):
        with FSDP.summon_full_params(model, writeback=False):
            return {n: p.detach().clone() for n, p in model.named_parameters()}
    return {n: p.full_tensor().detach().clone() for n, p in model.named_parameters()}


def distance(state: dict[str, Any], key: str) -> float:
    """How far a moment is from the reference, relative to its largest element."""
    reference = reference_moments(key)
    whole = {
        n: s[key].full_tensor() if isinstance(s[key], DTensor) else s[key] for n, s in state.items()
    }
    return farthest(whole, reference) / max(float(v.abs().max()) for v in reference.values())


def assert_state_is_the_references(state: dict[str, Any]) -> None:
    assert distance(state, "exp_avg") <= 1e-5
    assert distance(state, "exp_avg_sq") <= 1e-5
    assert {float(s["step"]) for s in state.values()} == {float(STEPS)}


@cases
def test_torchs_optimizer_state_dict_holds_every_name_and_goes_through_dcp(at: At) -> None:
    plan, model, optimizer = shard("fsdp2")
    train(model, optimizer, at.rank, range(STEPS))
    state = get_optimizer_state_dict(model, optimizer)
    assert_state_is_the_references(state["state"])
    dcp.save({"model": model.state_dict(), "optimizer": state}, checkpoint_id=at.folder / "saved")
    train(model, optimizer, at.rank, range(STEPS, STEPS + 2))

    plan, again, second = shard("fsdp2")
    stored = {"model": again.state_dict(), "optimizer": get_optimizer_state_dict(again, second)}
    dcp.load(stored, checkpoint_id=at.folder / "saved")
    again.load_state_dict(stored["model"])
    set_optimizer_state_dict(again, second, stored["optimizer"])
    dl.verify(plan, again, second)
    train(again, second, at.rank, range(STEPS, STEPS + 2))
    assert farthest(weights(model), weights(again)) == 0.0


@cases
def test_flat_fsdp1s_optimizer_state_dict_saves_and_loads(at: At) -> None:
    plan, model, optimizer = shard("fsdp1_flat")
    train(model, optimizer, at.rank, range(STEPS))
    saved = FSDP.optim_state_dict(model, optimizer)
    assert_state_is_the_references(saved["state"])
    before = {n: v.clone() for n, v in model.state_dict().items()}
    train(model, optimizer, at.rank, range(STEPS, STEPS + 2))

    plan, again, second = shard("fsdp1_flat")
    again.load_state_dict(before)
    second.load_state_dict(FSDP.optim_state_dict_to_load(again, second, saved))
    dl.verify(plan, again, second)
    train(again, second, at.rank, range(STEPS, STEPS + 2))
    assert farthest(weights(model), weights(again)) == 0.0


@cases
def test_fsdp1_with_original_parameters_loses_first_moments_in_its_state_dict_and_ours_does_not(
    at: At,
) -> None:
    """torch 2.13 on gloo, with any optimizer: exp_avg comes out wrong, exp_avg_sq right. Nothing is
    raised."""
    _, model, _ = shard("fsdp1")
    naive = torch.optim.AdamW(model.parameters())
    train(model, naive, at.rank, range(1))
    pieces = dl.optim.optimizer_state(model, naive)
    saved = FSDP.optim_state_dict(model, naive)["state"]
    wrong = [
        not torch.allclose(
            saved[name]["exp_avg"].reshape(-1)[piece.start :][: len(moment)], moment, atol=1e-6
        )
        for name, found in pieces.items()
        for piece in found
        for moment in [piece.tensors["exp_avg"]]
    ]
    assert any(wrong), "torch has mended it: say so in docs/checkpoints.md"

    _, model, optimizer = shard("fsdp1")
    train(model, optimizer, at.rank, range(STEPS))
    for key in ("exp_avg", "exp_avg_sq"):
        reference = reference_moments(key)
        for name, found in dl.optim.optimizer_state(model, optimizer).items():
            for piece in found:
                wanted = reference[name].reshape(-1)[piece.start :][: len(piece.tensors[key])]
                torch.testing.assert_close(piece.tensors[key], wanted, rtol=1e-4, atol=1e-7)


def engine(
    stage: int, make: Any = adamw, emission: str = "segmented", **fields: Any
) -> tuple[dl.Plan, Any]:
    import deepspeed

    model = make_model()
    plan = dl.plan_model(model, CONFIG)
    optimizer = dl.attach(plan, model, make, emission=emission)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
        **fields,
    }
    made = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    if emission == "segmented":
        dl.bind(plan, made)
    return plan, made


def drive(made: Any, rank: int, steps: range) -> None:
    import torch.nn.functional as F

    from tests.support.naive import batch

    for step in steps:
        x, y = batch(step, rank)
        made.backward(F.mse_loss(made(x), y))
        made.step()


def masters(made: Any) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    return {n: safe_get_full_fp32_param(p).clone() for n, p in made.module.named_parameters()}


def zero_tools(at: At, stage: int) -> None:
    """zero_to_fp32 gives the masters; a universal checkpoint resumes, once the rates are put back
    on by name."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    _, first = engine(stage)
    drive(first, at.rank, range(STEPS))
    first.save_checkpoint(str(at.folder / "saved"), tag="t")
    dist.barrier()
    exported = get_fp32_state_dict_from_zero_checkpoint(str(at.folder / "saved"), tag="t")
    assert farthest({n: v.clone() for n, v in exported.items()}, masters(first)) == 0.0
    if at.rank == 0:
        _to_universal(at.folder / "saved" / "t")
    dist.barrier()
    drive(first, at.rank, range(STEPS, STEPS + 2))

    plan, second = engine(stage, checkpoint={"load_universal": True})
    second.load_checkpoint(str(at.folder / "saved"), tag="t_universal")
    dl.proof.reapply(plan, second)
    dl.verify(plan, second)
    drive(second, at.rank, range(STEPS, STEPS + 2))
    assert farthest(masters(first), masters(second)) <= 1e-7


def _to_universal(folder: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "deepspeed.checkpoint.ds_to_universal",
        "--inject_missing_state",
    ]
    target = folder.with_name("t_universal")
    subprocess.run(
        [*command, "--input_folder", folder, "--output_folder", target],
        check=True,
        capture_output=True,
    )


@cases
def test_zero_1_exports_and_universal_checkpoints_work(at: At) -> None:
    zero_tools(at, 1)


@cases
def test_zero_2_exports_and_universal_checkpoints_work(at: At) -> None:
    zero_tools(at, 2)


@cases
def test_zero_3_exports_and_universal_checkpoints_work(at: At) -> None:
    zero_tools(at, 3)


@cases
def test_deepspeeds_cpu_adam_steps_slices_like_groups(at: At) -> None:
    need_cpu_adam()
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    offload = {"offload_optimizer": {"device": "cpu"}}
    for stage in (2, 3):
        trained = []
        for emission in ("groups", "segmented"):
            fields = {
                "zero_optimization": {"stage": stage, **offload},
                "zero_force_ds_cpu_optimizer": False,
            }
            plan, made = engine(
                stage, lambda g: DeepSpeedCPUAdam(g, weight_decay=0.1), emission, **fields
            )
            drive(made, at.rank, range(STEPS))
            dl.verify(plan, made)
            trained.append(masters(made))
        assert farthest(*trained) <= 1e-6
