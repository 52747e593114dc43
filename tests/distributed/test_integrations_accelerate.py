"""Accelerate in every mode: the script of the docs, its rates, its checkpoints, what is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DummyOptim, DummyScheduler

from dist_layerlr.errors import CheckpointError, ConfigError
from dist_layerlr.integrations import prepare_accelerate
from tests.support.cases import At, Cases, Outcomes
from tests.support.drivers import start_deepspeed
from tests.support.hf_trainer import fresh_accelerate
from tests.support.plugged import (
    CONFIG,
    HALF,
    STEPS,
    SWAPPED,
    Net,
    expected,
    farthest,
    fsdp_plugin,
    full,
    on_cpu,
    run_script,
    sgd,
    swapped,
    zero_plugin,
)
from tests.support.ranks import run_ranks

BAR = 1e-6
UNPATCHED = PartialState._prepare_backend
ACCUMULATE = 2
MODES: dict[str, Callable[[], dict[str, Any]]] = {
    "ddp": dict,
    "fsdp1": lambda: {"fsdp_plugin": fsdp_plugin(1, use_orig_params=True)},
    "fsdp1_flat": lambda: {"fsdp_plugin": fsdp_plugin(1, use_orig_params=False)},
    "fsdp2": lambda: {"fsdp_plugin": fsdp_plugin(2)},
    "zero 1": lambda: {"deepspeed_plugin": zero_plugin(1, ACCUMULATE)},
    "zero 2": lambda: {"deepspeed_plugin": zero_plugin(2, ACCUMULATE)},
    "zero 3": lambda: {"deepspeed_plugin": zero_plugin(3, ACCUMULATE)},
}
cases = Cases(2, start_deepspeed)


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    return cases.run(request)


def script(
    folder: Path,
    mode: dict[str, Any],
    accelerator: Any = on_cpu,
    *,
    steps: int,
    resume: bool = False,
    **more: Any,
) -> tuple[Any, str]:
    """The weights at the end, and what was printed."""
    mine = {
        "batches": [torch.zeros(2)] * (steps * ACCUMULATE),
        "loss_of": lambda model, batch: model(batch).mean(),
        "model": Net(seed=9 if resume else 0),
        "resume": resume,
        "steps": STEPS,
        **more,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerate, "Accelerator", lambda **given: accelerator(**given, **mode))
        space, printed = run_script("Accelerate", folder, **mine)
        return full(space["model"]), printed


def half_and(folder: Path, mode: str, **more: Any) -> Any:
    """Stop at half of the run, and go on from Accelerate's checkpoint with other weights."""
    with fresh_accelerate():
        script(folder, MODES[mode](), steps=HALF)
    with fresh_accelerate():
        return script(folder, MODES[mode](), steps=STEPS - HALF, resume=True, **more)


def case(mode: str) -> Callable[[At], None]:
    def body(at: At) -> None:
        with fresh_accelerate():
            trained, printed = script(at.folder / "whole", MODES[mode](), steps=STEPS)
        assert farthest(trained, expected()) < BAR
        assert printed.count("verified on 2 ranks") == (at.rank == 0)
        if mode.startswith("fsdp1"):
            with pytest.raises(ConfigError, match="Invalid resume under FSDP1"):
                half_and(at.folder / "parts", mode)
            return
        resumed, printed = half_and(at.folder / "parts", mode)
        assert farthest(resumed, expected()) < BAR
        assert printed.count("verified on 2 ranks") == 2 * (at.rank == 0)
        changed, printed = half_and(at.folder / "changed", mode, config=SWAPPED)
        assert farthest(changed, expected(then=swapped)) < BAR
        assert ("self_attn: lr 0.002..0.004 -> 0.001..0.002" in printed) == (at.rank == 0), printed

    body.__name__ = f"test_{mode.replace(' ', '')}_trains_and_resumes_at_the_plan"
    return body


for _mode in MODES:
    _test = cases(case(_mode))
    # Stage 2 is what stage 1 is, and more.
    globals()[_test.__name__] = pytest.mark.full(_test) if _mode == "zero 1" else _test


def prepared(mode: dict[str, Any], make: Any = sgd, *others: Any, **more: Any) -> Any:
    accelerator = on_cpu(**mode)
    return accelerator, prepare_accelerate(accelerator, CONFIG, Net(), make, *others, **more)


def torch_linear(optimizer: Any, total: int) -> Any:
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total)


@cases
def test_a_scheduler_of_torch_keeps_the_ratios_and_accelerates_pace(at: At) -> None:
    """Accelerate steps it once per process, so its users multiply its length."""
    with fresh_accelerate():
        _, (model, optimizer, loader, scheduler) = prepared(
            {},
            sgd,
            torch.utils.data.DataLoader(list(range(4 * STEPS)), 2),
            schedule=lambda o: torch_linear(o, 2 * (STEPS - 1)),
        )
        assert isinstance(loader, torch.utils.data.DataLoader) and len(loader) == STEPS
        for batch in loader:
            model(batch.float()).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        assert farthest(full(model), expected()) < BAR


def dropped() -> dict[str, Any]:
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    return {}


def zero(stage: int, **fields: Any) -> dict[str, Any]:
    return {"deepspeed_plugin": zero_plugin(stage, **fields)}


OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a_dummy_optimizer": (lambda: prepared({}, DummyOptim([])), "Invalid make: a DummyOptim"),
    "a_dummy_scheduler": (
        lambda: prepared({}, schedule=DummyScheduler(None)),
        "Invalid schedule: a DummyScheduler",
    ),
    "a_dummy_among_the_others": (
        lambda: prepared({}, sgd, DummyOptim([])),
        "a DummyOptim beside the planned optimizer",
    ),
    "an_optimizer_block": (lambda: prepared(zero(1, optimizer={"type": "Adam"})), "'optimizer'"),
    "a_scheduler_block": (
        lambda: prepared(zero(1, scheduler={"type": "WarmupLR"})),
        "'scheduler' block 'WarmupLR'",
    ),
    "cpu_offload": (
        lambda: prepared(zero(2, zero_optimization=OFFLOAD)),
        "offload_optimizer.device='cpu'",
    ),
    "fsdp_that_accelerate_drops": (lambda: prepared(dropped()), "Accelerate has dropped it"),
    "a_scheduler_that_flattens": (
        lambda: prepared({}, schedule=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1.0, 10)),
        "Invalid scheduler OneCycleLR",
    ),
    "an_optimizer_that_mixes_elements": (
        lambda: prepared(zero(1), torch.optim.Adafactor),
        "Invalid optimizer Adafactor",
    ),
}


def refusal(run: Callable[[], Any], text: str) -> Callable[[At], None]:
    def refused(at: At) -> None:
        with fresh_accelerate(), pytest.raises(ConfigError, match=text):
            run()

    return refused


for _label, _row in REFUSED.items():
    _body = refusal(*_row)
    _body.__name__ = f"test_{_label}_is_refused"
    globals()[_body.__name__] = cases(_body)


@cases
def test_deepspeed_that_counts_one_process_is_refused(at: At) -> None:
    with fresh_accelerate(), pytest.raises(ConfigError, match="knows of 1 processes"):
        PartialState._prepare_backend = UNPATCHED
        alone = accelerate.Accelerator(deepspeed_plugin=zero_plugin(1))
        prepare_accelerate(alone, CONFIG, Net(), sgd)


@cases
def test_a_checkpoint_of_another_model_or_of_rates_to_keep_is_refused(at: At) -> None:
    with fresh_accelerate():
        accelerator, _ = prepared({})
        accelerator.save_state(str(at.folder / "state"))
    with (
        fresh_accelerate(),
        pytest.raises(CheckpointError, match=r"it trained body.blocks.0.norm"),
    ):
        accelerator = on_cpu()
        smaller = Net()
        smaller.body.blocks[0].norm.requires_grad_(False)
        prepare_accelerate(accelerator, CONFIG, smaller, sgd)
        accelerator._optimizers.clear()  # Accelerate would stop at it first, in words of its own
        accelerator.load_state(str(at.folder / "state"))
    with fresh_accelerate(), pytest.raises(ConfigError, match="resume_lr='checkpoint' here"):
        block = {**SWAPPED["per_layer_lr"], "resume_lr": "checkpoint"}
        accelerator = on_cpu()
        prepare_accelerate(accelerator, {**SWAPPED, "per_layer_lr": block}, Net(), sgd)
        accelerator.load_state(str(at.folder / "state"))


def alone(rank: int, world_size: int, folder: Path) -> None:
    torch.distributed.destroy_process_group()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        del os.environ[name]
    trained, printed = script(folder, {}, accelerate.Accelerator, steps=STEPS)
    assert "verified on 1 rank (unsharded)" in printed
    assert farthest(trained, expected()) < BAR


def test_one_process_trains_at_the_plan(tmp_path: Path) -> None:
    run_ranks(alone, 1, tmp_path)
