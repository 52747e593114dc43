"""What a plan reads off a live model: names behind wrappers, shapes that are not there yet."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dist_layerlr as dl
from tests.support.naive import CONFIG, fill_grads, make_model


class _FabricModule(nn.Module):
    """What Lightning's Fabric puts around a model; the package itself is not installed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._forward_module = model


@pytest.mark.parametrize("wrap", [nn.DataParallel, _FabricModule])
def test_names_are_those_of_the_model_inside(wrap: type[nn.Module]) -> None:
    model = make_model()
    plan = dl.plan_model(model, CONFIG)
    wrapped = wrap(model)
    assert dl.plan_model(wrapped, CONFIG).digest == plan.digest
    optimizer = dl.attach(plan, wrapped, torch.optim.AdamW)
    dl.verify(plan, wrapped, optimizer)
    fill_grads(model)
    with dl.effect_check(plan, wrapped, optimizer) as observed:
        optimizer.step()
    assert observed.keys() == plan.entries.keys()


def test_a_lazy_layer_is_asked_to_run_one_batch_first() -> None:
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(dl.PlanMismatch, match="'0.weight' of Sequential.*Run one batch"):
        dl.plan_model(model, CONFIG)
    model(torch.ones(2, 3))
    dl.plan_model(model, CONFIG)
