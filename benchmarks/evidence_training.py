"""What the studies train with: every rate comes from a plan of the library, and is verified."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dist_layerlr
from dist_layerlr.optim import CellMetrics

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
    watch = _WATCHES[-1] if _WATCHES else None
    if watch is not None:
        watch.begin(plan, model, optimizer)
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of_step(step)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if watch is not None:
            watch.see(step, float(loss.detach()), schedule.factor)
        schedule.step()
    model.eval()


class Watch:
    """What the metrics of a run would hold, for ``advise``."""

    plan: dist_layerlr.Plan

    def __init__(self, every: int):
        """Measure one in so many steps."""
        self.rows: list[dict[str, Any]] = []
        self._every = every

    def begin(self, plan: dist_layerlr.Plan, model: nn.Module, optimizer: Any) -> None:
        """Watch the optimizer of a run, in place of an earlier one's."""
        self.plan, self.rows = plan, []
        self._cells = CellMetrics(plan, model, optimizer, every=self._every)

    def see(self, step: int, loss: float, factor: float) -> None:
        """Keep what a step was measured as, if it was."""
        reading = self._cells.read()
        if reading is not None:
            row = {"step": step, "loss": loss, "lr_factor": factor, "cells": reading.rows()}
            self.rows.append(row)


_WATCHES: list[Watch] = []


@contextmanager
def watched(every: int) -> Iterator[Watch]:
    """Watch the last training of what is done in here: pretraining comes before it."""
    _WATCHES.append(Watch(every))
    try:
        yield _WATCHES[-1]
    finally:
        _WATCHES.pop()


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
