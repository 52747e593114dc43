"""Lightning under each strategy: the script of the docs, its checkpoints, what is refused."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import pytorch_lightning
import torch
from lightning.fabric import strategies as fabric_strategies
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
)
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from dist_layerlr import PlanSchedule, Schedule, attach, plan_model, verify
from dist_layerlr.errors import ConfigError
from dist_layerlr.integrations import LayerLRLightning
from dist_layerlr.integrations.attached import Attached
from dist_layerlr.integrations.lightning_checks import lost_under_fsdp1
from tests.support.cases import At, Cases, Outcomes
from tests.support.drivers import start_deepspeed
from tests.support.plugged import (
    CONFIG,
    HALF,
    STEPS,
    SWAPPED,
    Block,
    Net,
    expected,
    farthest,
    full,
    run_script,
    sgd,
    swapped,
)
from tests.support.ranks import run_ranks

BAR = 1e-6


class OnCpu(DeepSpeedStrategy):
    """It asks for CUDA before anything else; the rest runs on gloo ranks."""

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)  # DeepSpeed is told its number


class FsdpOnCpu(FSDPStrategy):
    """Lightning asks for CUDA where this very class is given, and torch where no device is."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FSDP(model, device_id=torch.device("cpu"), **self.kwargs)


def zero(stage: int) -> OnCpu:
    return OnCpu(
        config={
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": stage},
            "steps_per_print": 10**9,
        }
    )


def fsdp1(*, original: bool) -> FsdpOnCpu:
    return FsdpOnCpu(
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        use_orig_params=original,
        state_dict_type="sharded",
    )


STRATEGIES: dict[str, Callable[[], Any]] = {
    "ddp": DDPStrategy,
    "fsdp1": lambda: fsdp1(original=True),
    "fsdp1_flat": lambda: fsdp1(original=False),
    "fsdp2": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
    "zero 1": lambda: zero(1),
    "zero 2": lambda: zero(2),
    "zero 3": lambda: zero(3),
}


def shard(module: nn.Module) -> None:
    """As a user does under ModelParallelStrategy, and only there."""
    mesh = getattr(module, "_device_mesh", None)
    if mesh is not None:
        for block in module.net.body.blocks:
            fully_shard(block, mesh=mesh["data_parallel"])
        fully_shard(module, mesh=mesh["data_parallel"])


def launched() -> None:
    """What torchrun says, and Lightning's own words left out."""
    start_deepspeed()
    os.environ["TORCHELASTIC_RUN_ID"] = "tests"
    os.environ["MASTER_PORT"] = "29500"
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)


cases = Cases(2, launched)


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    return cases.run(request)


def settings(strategy: Any) -> dict[str, Any]:
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    return {"accelerator": "cpu", "devices": 2, "strategy": strategy, **quiet}


def script(folder: Path, strategy: Any, **more: Any) -> tuple[Any, str]:
    """The weights at the end, and what was printed."""
    mine = {
        "Net": Net,
        "batches": torch.utils.data.DataLoader(torch.zeros(2 * 2 * STEPS), 2),
        "last": STEPS,
        "settings": settings(strategy),
        "shard": shard,
        "start_from": None,
        "steps": STEPS,
        **more,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        space, printed = run_script("Lightning", folder, **mine)
    named = full(space["trainer"].strategy.model)
    return {n.removeprefix("net."): v for n, v in named.items()}, printed


def half_and(folder: Path, make: Callable[[], Any], **more: Any) -> Any:
    script(folder, make(), last=HALF)
    return script(folder, make(), start_from="last.ckpt", Net=lambda: Net(seed=9), **more)


def case(label: str) -> Callable[[At], None]:
    def body(at: At) -> None:
        make = STRATEGIES[label]
        trained, printed = script(at.folder / "whole", make())
        assert farthest(trained, expected()) < BAR
        assert printed.count("verified on 2 ranks") == 2 * (at.rank == 0)
        resumed, printed = half_and(at.folder / "parts", make)
        assert farthest(resumed, expected()) < BAR
        assert printed.count("verified on 2 ranks") == 2 * (at.rank == 0)
        changed, printed = half_and(at.folder / "changed", make, config=SWAPPED)
        assert farthest(changed, expected(then=swapped)) < BAR

    body.__name__ = f"test_{label.replace(' ', '')}_trains_and_resumes_at_the_plan"
    return body


for _label in STRATEGIES:
    _test = cases(case(_label))
    # Stage 2 is what stage 1 is, and more.
    globals()[_test.__name__] = pytest.mark.full(_test) if _label == "zero 1" else _test


@cases
def test_whole_checkpoints_of_fsdp1_are_refused(at: At) -> None:
    """Without an accelerator torch cannot even write one."""
    plan, model = plan_model(Net(), CONFIG), FSDP(Net(), device_id=torch.device("cpu"))
    found = Attached(plan, model, attach(plan, model, sgd))
    found.accept(found.rows(), fsdp1=lost_under_fsdp1(at.folder))
    with pytest.raises(ConfigError, match="wrong first moments.*state_dict_type='sharded'"):
        found.accept(found.rows(), fsdp1=lost_under_fsdp1(__file__))


class Stock(lightning.LightningModule):
    """Trains at one rate."""

    def __init__(self, made: Callable[[Any], Any]):
        super().__init__()
        self.net, self.made = Net(), made

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return self.net(batch).mean()

    def configure_optimizers(self) -> Any:
        return self.made(self)


def fit(made: Callable[[Any], Any], rates: LayerLRLightning | None, **more: Any) -> Any:
    callbacks = [] if rates is None else [rates]
    given = settings(more.pop("strategy", DDPStrategy()))
    steps = more.pop("steps", 2)
    trainer = lightning.Trainer(max_steps=steps, callbacks=callbacks, **given)
    batches = torch.utils.data.DataLoader(torch.zeros(2 * 2 * STEPS), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Stock(made), batches, **more)
    return trainer


@cases
def test_what_would_train_without_the_plan_is_refused(at: At) -> None:
    stock = lambda module: sgd(module.parameters())  # noqa: E731
    with pytest.raises(ConfigError, match="does not return LayerLRLightning.optimizers"):
        fit(stock, LayerLRLightning(CONFIG))
    with pytest.raises(ConfigError, match="no LayerLRLightning among its callbacks"):
        fit(lambda _: LayerLRLightning(CONFIG).optimizers(sgd), None)
    blocks = {"optimizer": {"type": "Adam"}, "train_micro_batch_size_per_gpu": 2}
    rates = LayerLRLightning(CONFIG)
    with pytest.raises(ConfigError, match="'optimizer' block"):
        fit(lambda _: rates.optimizers(sgd), rates, strategy=OnCpu(config=blocks))
    one_cycle = lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1.0, 10)  # noqa: E731
    with pytest.raises(ConfigError, match="Invalid scheduler OneCycleLR"):
        fit(lambda _: rates.optimizers(sgd, one_cycle), rates)


@cases
def test_a_checkpoint_without_a_plan_or_of_rates_to_keep_is_refused(at: At) -> None:
    file = str(at.folder / "stock.ckpt")
    fit(lambda module: sgd(module.parameters()), None, steps=1).save_checkpoint(file)
    rates = LayerLRLightning(CONFIG)
    with pytest.raises(ConfigError, match="it has no plan"):
        fit(lambda _: rates.optimizers(sgd), rates, ckpt_path=file)
    fit(lambda _: rates.optimizers(sgd), rates, steps=1).save_checkpoint(file)
    block = {**SWAPPED["per_layer_lr"], "resume_lr": "checkpoint"}
    kept = LayerLRLightning({**SWAPPED, "per_layer_lr": block})
    with pytest.raises(ConfigError, match="resume_lr='checkpoint' here"):
        fit(lambda _: kept.optimizers(sgd), kept, ckpt_path=file)


@cases
def test_the_older_package_of_the_same_name_trains_and_resumes_at_the_plan(at: At) -> None:
    """Its classes are others; the script is the same but for the import."""
    quiet = {**settings(None), "strategy": pytorch_lightning.strategies.DDPStrategy()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "lightning", pytorch_lightning)
        trained, _ = script(at.folder, None, settings=quiet)
    assert farthest(trained, expected()) < BAR


FABRIC: dict[str, Callable[[], Any]] = {
    "ddp": lambda: "ddp",
    "fsdp2": lambda: fabric_strategies.ModelParallelStrategy(
        parallelize, data_parallel_size=2, tensor_parallel_size=1
    ),
}


def parallelize(model: Any, mesh: Any) -> Any:
    for block in model.body.blocks:
        fully_shard(block, mesh=mesh["data_parallel"])
    return fully_shard(model, mesh=mesh["data_parallel"])


@cases
def test_names_are_found_under_the_prefix_of_fabric(at: At) -> None:
    for strategy in FABRIC.values():
        fabric = lightning.Fabric(accelerator="cpu", devices=2, strategy=strategy())
        fabric.launch()
        model = Net()
        plan = plan_model(model, CONFIG)
        wrapped = fabric.setup_module(model)
        optimizer = fabric.setup_optimizers(attach(plan, wrapped, sgd))
        schedule = PlanSchedule(optimizer, Schedule(kind="linear", total_steps=STEPS))
        for _ in range(STEPS):
            fabric.backward(wrapped(torch.zeros(2)).mean())
            optimizer.step()
            optimizer.zero_grad()
            verify(plan, wrapped, optimizer)
            schedule.step()
        assert farthest(full(wrapped._forward_module), expected()) < BAR


def alone(rank: int, world_size: int, folder: Path) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        os.environ.pop(name, None)
    torch.distributed.destroy_process_group()
    quiet = {**settings("auto"), "devices": 1}
    batches = torch.utils.data.DataLoader(torch.zeros(2 * STEPS), 2)
    trained, printed = script(folder, None, settings=quiet, batches=batches)
    assert printed.count("verified on 1 rank (unsharded)") == 2
    assert farthest(trained, expected()) < BAR


def test_one_process_trains_at_the_plan(tmp_path: Path) -> None:
    run_ranks(alone, 1, tmp_path)
