"""What the studies train with: every rate comes from a plan of the library, and is verified."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dist_layerlr

Config = dict[str, Any]
WARMUP_SHARE = 0.1


def block(rate: float, **fields: Any) -> Config:
    """A config at one base rate for all components, shaped by the given fields."""
    shape = {"enabled": True, "component_lr": {}, "default_lr": rate, "unmatched": "default"}
    return {"learning_rate": rate, "per_layer_lr": {"depth_strategy": "flat", **shape, **fields}}


def only(rate: float, *matches: str) -> Config:
    """A config under which what matches trains at the rate, and all else is held still."""
    regions = [{"match": match, "lr": rate} for match in matches]
    return {**block(rate, default_lr=0.0, regions=regions)}


def train(
    model: nn.Module,
    config: Config,
    loss_of_step: Callable[[int], Tensor],
    steps: int,
    weight_decay: float = 0.01,
) -> None:
    """Train at the rates that the library plans: AdamW, warmup, then a cosine to a tenth."""
    plan = dist_layerlr.plan_model(model, config)
    make = partial(torch.optim.AdamW, weight_decay=weight_decay, betas=(0.9, 0.95), fused=True)
    optimizer = dist_layerlr.attach(plan, model, make)
    warmup = math.ceil(WARMUP_SHARE * steps)
    cosine = dist_layerlr.Schedule(
        kind="cosine", warmup_steps=warmup, total_steps=steps, min_ratio=0.1
    )
    schedule = dist_layerlr.PlanSchedule(optimizer, cosine)
    dist_layerlr.verify(plan, model, optimizer, factor=schedule.factor)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of_step(step)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def pretrained(file: Path, model: nn.Module, pretrain: Callable[[], None]) -> None:
    """Load the weights that an earlier run of this seed pretrained, or pretrain and keep them."""
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return
    pretrain()
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.new.{os.getpid()}")
    torch.save(model.state_dict(), new)
    # Whole or not at all: a run that is killed here must not leave half a file to the next.
    os.replace(new, file)
