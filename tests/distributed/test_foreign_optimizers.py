"""Every optimizer either trains as it does unsharded, or is refused before training.

No list of names decides: classes of other packages, subclasses, wrappers and users' own are given
to `attach`, or to `initialize_deepspeed` and to DeepSpeed by hand, and the weights after training
are compared with one unsharded process that uses no code of ours.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import dist_layerlr
from dist_layerlr.errors import ConfigError, PlanMismatch
from tests.support.cases import At, Outcomes, items_of, run_bodies
from tests.support.drivers import start_deepspeed
from tests.support.naive import CONFIG, backward, make_model, naive_groups, train
from tests.support.naive_deepspeed import ds_config, masters, run, silence, start
from tests.support.naive_torch import fsdp1_flat, fsdp1_orig, fsdp2, whole
from tests.support.optimizers import Make, all_optimizers, is_installed, package_of

STEPS = 4
BAR = 1e-5
"""Largest difference of any weight, of weights that move by about 1e-2."""
REFUSED = (ConfigError, PlanMismatch)
OPTIMIZERS = all_optimizers()
MUST_TRAIN = ("torch AdamW", "torch SGD, momentum", "lion_pytorch Lion", "a subclass of AdamW")
"""A refusal of everything would pass the matrix; these are elementwise by their formula."""
MUST_TRAIN_MORE = ("AdamW named Muon", "a wrapper of AdamW", "torch RMSprop, centered")


class Cell(NamedTuple):
    """One optimizer under one sharder."""

    sharder: str
    optimizer: str

    @property
    def id(self) -> str:
        return f"{self.sharder}: {self.optimizer}"


def unsharded(make: Make) -> dict[str, torch.Tensor]:
    """Weights of one process on the global batch, its groups written by hand."""
    model = make_model()
    optimizer = make(naive_groups(model.named_parameters()))
    train(model, optimizer, steps=STEPS)
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def natively(wrap: Callable[[nn.Module], nn.Module], make: Make, at: At, emission: str) -> Any:
    model = make_model()
    plan = dist_layerlr.plan_model(model, CONFIG)
    sharded = wrap(model)
    optimizer = dist_layerlr.attach(plan, sharded, make, emission=emission)
    dist_layerlr.verify(plan, sharded, optimizer)
    rank = at.rank if sharded is not model else None
    for step in range(STEPS):
        backward(sharded, step, rank)
        optimizer.step()
        optimizer.zero_grad()
    dist_layerlr.verify(plan, sharded, optimizer)
    return whole(sharded)


def by_deepspeed(stage: int, make: Make, at: At, emission: str) -> Any:
    model = make_model()
    plan = dist_layerlr.plan_model(model, CONFIG)
    # Small sub-groups, so that stage 3 takes several turns a step.
    settings = ds_config(stage, {"sub_group_size": 2000} if stage == 3 else None)
    if emission == "segmented":
        engine = dist_layerlr.initialize_deepspeed(plan, model, make, settings)[0]
    else:
        engine = start(model, dist_layerlr.attach(plan, model, make), settings)
    dist_layerlr.verify(plan, engine)
    run(engine, at, STEPS)
    return masters(engine)


SHARDERS: dict[str, Callable[[Make, At], Any]] = {
    "none": lambda make, at: natively(lambda model: model, make, at, "auto"),
    "ddp": lambda make, at: natively(DDP, make, at, "auto"),
    "fsdp1": lambda make, at: natively(fsdp1_orig, make, at, "auto"),
    "fsdp1_flat": lambda make, at: natively(fsdp1_flat, make, at, "auto"),
    "fsdp2": lambda make, at: natively(fsdp2, make, at, "auto"),
    "fsdp2, groups": lambda make, at: natively(fsdp2, make, at, "groups"),
    **{
        f"zero {stage}, {emission}": lambda make, at, s=stage, e=emission: by_deepspeed(
            s, make, at, e
        )
        for stage in (1, 2, 3)
        for emission in ("groups", "segmented")
    },
}


def never_trains(cell: Cell, make: Make, at: At, kind: type[Exception]) -> str:
    """What cannot train these groups unsharded is refused, or raises what it raises there."""
    try:
        SHARDERS[cell.sharder](make, at)
    except (*REFUSED, kind) as error:
        return f"refused: {error}"
    raise AssertionError(f"{cell.id} trains, which it cannot do unsharded")


def body(cell: Cell) -> Callable[[At], str]:
    def train_or_refuse(at: At) -> str:
        if not is_installed(package_of(cell.optimizer)):
            pytest.skip(f"{package_of(cell.optimizer)} is not installed")
        warnings.simplefilter("ignore")
        make = OPTIMIZERS[cell.optimizer]
        with silence():
            try:
                wanted = unsharded(make)
            except Exception as error:
                return never_trains(cell, make, at, type(error))
            try:
                got = SHARDERS[cell.sharder](make, at)
            except REFUSED as error:
                return f"refused: {error}"
        off = max(float((got[name] - wanted[name]).abs().max()) for name in wanted)
        assert off < BAR, f"{cell.id}: ends {off:.2e} from its unsharded run, and was not refused"
        return "trains"

    return train_or_refuse


CELLS = [Cell(sharder, name) for sharder in SHARDERS for name in OPTIMIZERS]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[Outcomes]:
    chosen = {item.callspec.params["cell"].id for item in items_of(request)}
    bodies = {cell.id: body(cell) for cell in CELLS if cell.id in chosen}
    yield run_bodies(bodies, 2, start_deepspeed)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.id)
def test_it_ends_where_its_unsharded_run_ends_or_is_refused(cell: Cell, outcomes: Outcomes) -> None:
    by_rank = outcomes.settle(cell.id)
    print(cell.id, "-", by_rank[0])
    assert {text.partition(":")[0] for text in by_rank} in ({"trains"}, {"refused"})
    if cell.optimizer in (*MUST_TRAIN, *MUST_TRAIN_MORE):
        assert by_rank[0] == "trains"
