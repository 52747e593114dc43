"""An average of weights follows names, whatever becomes of the optimizer's groups."""

from __future__ import annotations

import pytest
import torch

from dist_layerlr import attach, plan_model
from dist_layerlr.optim import WeightAverage
from dist_layerlr.proof import steer
from tests.support.toys import Toy

FLAT = {
    "per_layer_lr": {
        "enabled": True,
        "default_lr": 1e-3,
        "component_lr": {"self_attn": 1e-3},
        "depth_strategy": "flat",
    }
}


@pytest.mark.parametrize("emission", ["groups", "segmented"])
def test_each_weight_keeps_its_own_average_when_a_steered_group_parts(emission: str) -> None:
    torch.manual_seed(0)
    model = Toy()
    plan = plan_model(model, FLAT)
    optimizer = attach(plan, model, torch.optim.AdamW, emission=emission)
    average = WeightAverage(model, optimizer)
    by_hand = {name: param.detach().clone() for name, param in model.named_parameters()}
    for step in range(4):
        if step == 2:
            changes = {"scale": [{"match": "blocks.1.mlp", "by": 0.5}, {"match": "emb", "by": 0.3}]}
            plan = steer(plan, model, optimizer, changes=changes)
            # A checkpoint is written right after the change.
            with average.in_state():
                pass
        model(torch.randn(4, 7)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(0.5)
        for name, param in model.named_parameters():
            by_hand[name].lerp_(param.detach(), 0.5)
    with average.swapped():
        for name, param in model.named_parameters():
            assert torch.equal(param, by_hand[name]), name
