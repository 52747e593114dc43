"""Every optimizer either trains as it does unsharded, or is refused before training.

No list of names decides: classes of other packages, subclasses, wrappers and users' own are given
to `attach`, or to `initialize_deepspeed` and to DeepSpeed by hand, and the weights after training
are compared with one unsharded process that uses no code of ours.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import dist_layerlr
from dist_layerlr.errors import ConfigError, PlanMismatch
from tests.support.cases import At, Outcomes, items_of, run_bodies
from tests.support.drivers import start_deepspeed
from tests.support.naive import CONFIG, backward, batch, farthest, make_model, naive_groups
from tests.support.naive_deepspeed import ds_config, masters, run, silence, start
from tests.support.naive_torch import fsdp1_flat, fsdp1_orig, fsdp2, whole
from tests.support.optimizers import USERS, Make, all_optimizers, is_installed, package_of

STEPS = 4
BAR = 1e-5
"""Largest difference of any weight, of weights that move by about 1e-2."""
REFUSED = (ConfigError, PlanMismatch)
OPTIMIZERS = all_optimizers()
SHORT = (
    *USERS,
    "torch AdamW",
    "torch ASGD",
    "torch RMSprop, centered",
    "transformers Adafactor",
    "lion_pytorch Lion",
    "prodigyopt Prodigy",
    "schedulefree AdamW",
    "came_pytorch CAME",
    "pytorch_optimizer LaProp",
    "pytorch_optimizer SOAP",
    "pytorch_optimizer StableAdamW",
)
"""Every kind of behaviour once; the others run with ``-m full``."""
MUST_TRAIN = (
    "a subclass of AdamW",
    "AdamW named Muon",
    "a wrapper of AdamW",
    "torch AdamW",
    "torch RMSprop, centered",
    "lion_pytorch Lion",
)
"""A refusal of everything would pass the matrix; these are elementwise by their formula."""


class Cell(NamedTuple):
    """One optimizer under one sharder."""

    sharder: str
    optimizer: str

    @property
    def id(self) -> str:
        return f"{self.sharder}: {self.optimizer}"


Groups = list[dict[str, Any]]


class Reference(NamedTuple):
    """One process on the global batch, its groups written by hand."""

    weights: dict[str, torch.Tensor]
    bar: float
    """Largest difference that counts as the same training."""


def seed() -> None:
    """Some optimizers draw numbers: torch's, numpy's or Python's."""
    torch.manual_seed(0)
    numpy.random.seed(0)
    random.seed(0)


def unsharded(make: Make) -> Reference:
    """Trained twice: the second time the gradient is the mean of two halves', as two ranks sum it.

    Where the optimizer turns that rounding into more (signs of tiny gradients), it is the bar.
    """
    ends = [trained_alone(make, halves) for halves in (1, 2)]
    left = torch.get_rng_state()
    seed()
    if not torch.equal(torch.get_rng_state(), left):
        # It deals out the numbers that it draws in the order of its parameters: the plan's.
        ends = [trained_alone(make, halves, as_planned) for halves in (1, 2)]
    return Reference(ends[0], max(BAR, 4 * farthest(*ends)))


def trained_alone(
    make: Make, halves: int, sort: Callable[[nn.Module, Groups], Groups] = lambda _, groups: groups
) -> dict[str, torch.Tensor]:
    """Weights after all steps in one process."""
    model = make_model()
    groups = sort(model, naive_groups(model.named_parameters()))
    seed()
    optimizer = make(groups)
    for step in range(STEPS):
        for x, y in zip(*(part.chunk(halves) for part in batch(step)), strict=True):
            (F.mse_loss(model(x), y) / halves).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def as_planned(model: nn.Module, groups: Groups) -> Groups:
    """The same groups, each with its own rates, in the order in which a plan has the names."""
    named = dict(model.named_parameters())
    order = [named[n] for g in dist_layerlr.plan_model(model, CONFIG).groups for n in g.names]
    place = {id(param): number for number, param in enumerate(order)}
    for group in groups:
        group["params"].sort(key=lambda param: place[id(param)])
    return sorted(groups, key=lambda group: place[id(group["params"][0])])


def natively(wrap: Callable[[nn.Module], nn.Module], make: Make, at: At, emission: str) -> Any:
    model = make_model()
    plan = dist_layerlr.plan_model(model, CONFIG)
    sharded = wrap(model)
    optimizer = dist_layerlr.attach(plan, sharded, make, emission=emission)
    dist_layerlr.verify(plan, sharded, optimizer)
    rank = at.rank if sharded is not model else None
    seed()
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
    seed()
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
        off = farthest(got, wanted.weights)
        assert off < wanted.bar, (
            f"{cell.id}: ends {off:.2e} from its unsharded run, and was not refused"
        )
        return "trains"

    return train_or_refuse


def _marks(sharder: str, name: str) -> list[pytest.MarkDecorator]:
    # Stage 1 hands over what stage 2 does.
    return [] if name in SHORT and not sharder.startswith("zero 1") else [pytest.mark.full]


CELLS = [
    pytest.param(Cell(sharder, name), marks=_marks(sharder, name))
    for sharder in SHARDERS
    for name in OPTIMIZERS
]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[Outcomes]:
    chosen = {item.callspec.params["cell"].id for item in items_of(request)}
    cells = [param.values[0] for param in CELLS]
    bodies = {cell.id: body(cell) for cell in cells if cell.id in chosen}
    yield run_bodies(bodies, 2, start_deepspeed)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.id)
def test_it_ends_where_its_unsharded_run_ends_or_is_refused(cell: Cell, outcomes: Outcomes) -> None:
    by_rank = outcomes.settle(cell.id)
    print(cell.id, "-", by_rank[0])
    assert {text.partition(":")[0] for text in by_rank} in ({"trains"}, {"refused"})
    if cell.optimizer in MUST_TRAIN:
        assert by_rank[0] == "trains"
