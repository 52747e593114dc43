"""The torch optimizer inside the wrappers of trainers and engines: what is stepped, and planned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer
from torch.optim import AdamW, Optimizer

import dist_layerlr as dl
from dist_layerlr.optim.groups import base_lr, default_lr
from dist_layerlr.sharders.base import innermost
from tests.support.naive import CONFIG, make_model


class Engines(DeepSpeedOptimizer):
    """What every optimizer of DeepSpeed is: no torch optimizer, but the groups of one."""

    def __init__(self, inner: Optimizer):
        self.optimizer = inner

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups


def look_ahead(inner: Optimizer) -> Any:
    return pytest.importorskip("pytorch_optimizer").Lookahead(inner)


def timms_look_ahead(inner: Optimizer) -> Any:
    return pytest.importorskip("timm.optim").Lookahead(inner)


WRAPPERS = {
    "Accelerate": (AcceleratedOptimizer,),
    "DeepSpeed": (Engines,),
    "Accelerate for DeepSpeed": (Engines, DeepSpeedOptimizerWrapper),
    "two of Accelerate's": (AcceleratedOptimizer, AcceleratedOptimizer),
}
LOOK_AHEADS = {"pytorch_optimizer": look_ahead, "timm": timms_look_ahead}


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def wrapped(optimizer: Any, wrappers: tuple[Any, ...]) -> Any:
    for wrapper in wrappers:
        optimizer = wrapper(optimizer)
    return optimizer


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("ahead", [None, *LOOK_AHEADS])
@pytest.mark.parametrize("wrappers", WRAPPERS)
def test_wrappers_are_looked_through_and_a_look_ahead_is_not(wrappers: str, ahead: str | None):
    model = make_model()
    plan = dl.plan_model(model, CONFIG)

    def make(groups: Any) -> Any:
        return LOOK_AHEADS[ahead](AdamW(groups)) if ahead else AdamW(groups)

    live = dl.attach(plan, model, make)
    outer = wrapped(live, WRAPPERS[wrappers])
    assert innermost(outer) is live
    # Absolute rates of schedulers are relative to what attach told this optimizer.
    assert default_lr(outer) == base_lr(plan)


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(dl.ConfigError, match="give the torch optimizer that is stepped"):
        innermost(torch.nn.Linear(1, 1))
