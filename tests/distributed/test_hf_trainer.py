"""transformers' Trainer in every mode: its rates, its own checkpoints, and what is refused.

The reference is one plain process with groups, decay and schedule written by hand: no code of ours,
none of the Trainer's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import Trainer

import dist_layerlr
from dist_layerlr.errors import CheckpointError, ConfigError, PlanMismatch
from dist_layerlr.integrations import LayerLRCallback, LayerLRTrainer
from dist_layerlr.plan import plan_diff
from dist_layerlr.plan.diff import read_rows
from tests.support.cases import At, Cases, Outcomes
from tests.support.drivers import start_deepspeed
from tests.support.hf_trainer import (
    CONFIG,
    DEEPSPEED,
    STEPS,
    OnCpu,
    Ours,
    Weights,
    arguments,
    farthest,
    fresh_accelerate,
    full,
    make_model,
    oracle,
    samples,
)

BAR = 1e-6
"""Largest difference of any weight; each of them moves by about 1e-3."""
OLD = int(transformers.__version__.partition(".")[0]) < 5
HALF = f"checkpoint-{STEPS // 2}"
LAYERS = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}


def fsdp(version: int, **fields: Any) -> dict[str, Any]:
    # Without an accelerator torch empties full weights that it offloads, and Accelerate cannot tell
    # where to send those that one rank has.
    on_cpu = {"state_dict_type": "SHARDED_STATE_DICT", "sync_module_states": False}
    return {"fsdp": True, "fsdp_config": {"version": version, **on_cpu, **LAYERS, **fields}}


def zero(stage: int, **fields: Any) -> dict[str, Any]:
    return {"deepspeed": {**DEEPSPEED, "zero_optimization": {"stage": stage}, **fields}}


MODES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp1": fsdp(1, use_orig_params=True),
    "fsdp1_flat": fsdp(1, use_orig_params=False),
    "fsdp2": fsdp(2),
    "zero 1": zero(1),
    "zero 2": zero(2),
    "zero 3": zero(3),
}
RESUMED = ("ddp", "fsdp2", "zero 1", "zero 2", "zero 3")
SWAPPED = copy.deepcopy(CONFIG)
"""Groups of equal size trade their rates: state that is loaded by group would trade places."""
SWAPPED["per_layer_lr"]["component_lr"] = {"self_attn": 2e-3, "ffn": 4e-3, "norm": 5e-4}
cases = Cases(2, start_deepspeed)


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    return cases.run(request)


def build(folder: Path, mode: dict[str, Any], **more: Any) -> Ours:
    settings: dict[str, Any] = {"layer_lr": CONFIG, "model": make_model(), **more}
    args = arguments(folder, copy.deepcopy(mode), **settings.pop("args", {}))
    return Ours(args=args, train_dataset=samples(), **settings)


def run(folder: Path, mode: dict[str, Any], half: Path | None = None, **more: Any) -> Weights:
    """Train to the end, or from a checkpoint of half way, which must bring every weight."""
    if half is not None:
        more["model"] = make_model(seed=9)
    with fresh_accelerate() as said:
        trainer = build(folder, mode, **more)
        trainer.train(None if half is None else str(half))
        assert len(trainer.layer_lr_callback.proofs) == 2
        if trainer.is_world_process_zero():
            assert said.getvalue().count("verified on 2 ranks") == 2
        return full(trainer)


def training_case(label: str) -> Callable[[At], None]:
    def train_and_resume(at: At) -> None:
        if label != "ddp" and OLD:
            pytest.skip("the harness drives transformers 5 on CPU ranks; 4.x is run under DDP")
        mode, here = MODES[label], at.folder / "run"
        trained = run(here, mode)
        assert farthest(trained, oracle()) < BAR
        half = here / HALF
        if label not in RESUMED:
            with pytest.raises(ConfigError, match="FSDP1"):
                run(here, mode, half)
            return
        assert farthest(run(at.folder / "again", mode, half), trained) < BAR
        changed = run(at.folder / "changed", mode, half, layer_lr=SWAPPED)
        assert farthest(changed, oracle(then=SWAPPED)) < BAR
        assert farthest(changed, trained) > 100 * BAR
        rows = read_rows(half)
        assert rows is not None and plan_diff(
            rows, read_rows(at.folder / "changed" / "checkpoint-4")
        )

    train_and_resume.__name__ = f"test_{label.replace(' ', '')}_trains_and_resumes_at_the_plan"
    return train_and_resume


for _label in MODES:
    _test = cases(training_case(_label))
    globals()[_test.__name__] = _test


@cases
def test_a_resume_under_resume_lr_checkpoint_keeps_the_checkpoints_rates(at: At) -> None:
    trained = run(at.folder / "run", {})
    block = {**SWAPPED["per_layer_lr"], "resume_lr": "checkpoint"}
    kept = run(at.folder / "kept", {}, at.folder / "run" / HALF, layer_lr={"per_layer_lr": block})
    assert farthest(kept, trained) < BAR


class Injecting(OnCpu):
    """A trainer that puts adapters into the model itself, as TRL's do."""

    def __init__(self, model: Any, **kwargs: Any):
        torch.manual_seed(3)
        config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        super().__init__(model=get_peft_model(model, config), **kwargs)


class OursInjecting(LayerLRTrainer, Injecting):
    pass


@cases
def test_adapters_that_the_trainer_injects_are_planned_and_resumed(at: At) -> None:
    ended = []
    for half in (None, str(at.folder / "run" / HALF)):
        with fresh_accelerate():
            args = arguments(at.folder / ("run" if half is None else "again"), {})
            trainer = OursInjecting(
                make_model(), args=args, train_dataset=samples(), layer_lr=CONFIG
            )
            entries = trainer.layer_lr_plan.entries
            assert len(entries) == 8 and all("lora_" in name for name in entries)
            trainer.train(half)
            named = trainer.model.named_parameters()
            ended.append({n: p.detach().clone() for n, p in named if p.requires_grad})
    assert farthest(*ended) < BAR


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "an_optimizer_block": (zero(1, optimizer={"type": "AdamW"}), {}, "'optimizer' block"),
    "a_scheduler_block": (zero(1, scheduler={"type": "WarmupLR"}), {}, "lr_scheduler_type"),
    "cpu_offload": (
        {
            "deepspeed": {
                **DEEPSPEED,
                "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
            }
        },
        {},
        "offload_optimizer.device='cpu'",
    ),
    "a_factory_of_optimizers": (
        {},
        {"optimizer_cls_and_kwargs": (lambda: lambda model: None, {})},
        "groups of its own",
    ),
    "a_scheduler_that_raises_rates": (
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1.0}},
        {},
        "Invalid scheduler",
    ),
    "a_misspelt_config": ({}, {"layer_lr": {"per_layer_lrs": {}}}, "per_layer_lr"),
}


def refusal_case(mode: dict[str, Any], more: dict[str, Any], text: str) -> Callable[[At], None]:
    def refused(at: At) -> None:
        with fresh_accelerate(), pytest.raises(ConfigError, match=text):
            build(at.folder, mode, **more).train()

    return refused


for _label, _row in REFUSED.items():
    _body = refusal_case(*_row)
    _body.__name__ = f"test_{_label}_is_refused"
    globals()[_body.__name__] = cases(_body)


@cases
def test_fsdp_that_accelerate_drops_is_refused(at: At) -> None:
    class Dropped(LayerLRTrainer, Trainer):
        pass

    with fresh_accelerate(), pytest.raises(ConfigError, match="Accelerate has dropped it"):
        Dropped(model=make_model(), args=arguments(at.folder, fsdp(2)), layer_lr=CONFIG)


@cases
def test_a_given_optimizer_is_refused(at: At) -> None:
    model = make_model()
    given = (torch.optim.SGD(model.parameters(), lr=1e-3), None)
    with fresh_accelerate(), pytest.raises(ConfigError, match=r"optimizers=\(SGD"):
        build(at.folder, {}, model=model, optimizers=given)


@cases
def test_a_checkpoint_of_another_trainer_or_model_is_refused(at: At) -> None:
    with fresh_accelerate():
        stock = OnCpu(model=make_model(), args=arguments(at.folder, {}), train_dataset=samples())
        stock.train()
    half = at.folder / HALF
    with pytest.raises(ConfigError, match="no LayerLRTrainer wrote it"):
        run(at.folder / "ours", {}, half)
    run(at.folder / "run", {})
    with fresh_accelerate(), pytest.raises(CheckpointError, match="it trained model.embed_tokens"):
        smaller = make_model()
        smaller.model.embed_tokens.requires_grad_(False)
        build(at.folder, {}, model=smaller).train(str(at.folder / "run" / HALF))


@cases
def test_the_callback_alone_audits_a_trainer_that_flattens_rates(at: At) -> None:
    with fresh_accelerate():
        stock = OnCpu(model=make_model(), args=arguments(at.folder, {}), train_dataset=samples())
        with pytest.raises(ConfigError, match="LayerLRCallback"):
            LayerLRCallback(stock)
        plan = dist_layerlr.plan_model(stock.model, CONFIG)
        stock.add_callback(LayerLRCallback(stock, plan))
        with pytest.raises(PlanMismatch, match="planned lr 0.004, live 5e-05"):
            stock.train()
