"""A small transformer, the groups a user would write for it by hand, and many cases in one set of
ranks."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ranks import run_ranks

# Odd on purpose: no size divides by two ranks.
WIDTH, HIDDEN, BLOCKS = 19, 37, 3
RATES = {"self_attn": 4e-3, "ffn": 1e-3, "default": 3e-4}
BLOCK = {
    "enabled": True,
    "component_lr": {"self_attn": RATES["self_attn"], "ffn": RATES["ffn"]},
    "default_lr": RATES["default"],
    "depth_strategy": "flat",
    "unmatched": "default",
}
DEADLINE_S = 300.0  # for all cases of a file; they need 20 on idle cores
CONFIG = {"per_layer_lr": BLOCK}
"""The same three rates that `naive_groups` gives to an unwrapped model."""


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(WIDTH, WIDTH)
        self.to_k = nn.Linear(WIDTH, WIDTH, bias=False)
        self.to_out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_out(torch.tanh(self.to_q(x)) * torch.sigmoid(self.to_k(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Linear(7, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(BLOCKS)])
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.emb(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def make_model() -> Model:
    torch.manual_seed(0)
    return Model()


def config(**changes: Any) -> dict[str, Any]:
    """CONFIG with some fields of its block changed."""
    return {"per_layer_lr": {**BLOCK, **changes}}


def naive_component(name: str) -> str:
    """What a user writes who has seen the names of the unwrapped model."""
    if ".attn." in name:
        return "self_attn"
    return "ffn" if ".mlp." in name else "default"


def naive_groups(named: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """Groups by substrings of whatever names are there; groups without members are left out."""
    groups: dict[str, list[nn.Parameter]] = {key: [] for key in RATES}
    for name, param in named:
        if param.requires_grad:
            groups[naive_component(name)].append(param)
    return [
        {"params": params, "lr": RATES[key], "name": key}
        for key, params in groups.items()
        if params
    ]


def adamw(groups: Any) -> torch.optim.Optimizer:
    """No weight decay, so the first update of each element is its learning rate."""
    return torch.optim.AdamW(groups, lr=1.0, weight_decay=0.0)


def sgd(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=1.0)


def batch(
    step: int, rank: int | None = None, world_size: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """The global batch of a step, or the part of one rank."""
    generator = torch.Generator().manual_seed(1000 + step)
    x, y = torch.randn(8, 7, generator=generator), torch.randn(8, 3, generator=generator)
    if rank is None:
        return x, y
    part = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    return x[part], y[part]


def backward(model: nn.Module, step: int, rank: int | None = None) -> None:
    x, y = batch(step, rank)
    F.mse_loss(model(x), y).backward()


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, rank: int | None = None, steps: int = 1
) -> None:
    for step in range(steps):
        backward(model, step, rank)
        optimizer.step()
        optimizer.zero_grad()


def fill_grads(model: nn.Module) -> None:
    """Gradients without a backward pass, which a process that will fork must not run."""
    generator = torch.Generator().manual_seed(7)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator)


Weights = dict[str, torch.Tensor]


def copy_of(model: nn.Module) -> Weights:
    """Weights of an unsharded model."""
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def movement(before: Weights, after: Weights) -> dict[str, float]:
    """Largest change of each name."""
    assert before.keys() == after.keys()
    return {name: float((after[name] - before[name]).abs().max()) for name in before}


def observed_rates(before: Weights, after: Weights) -> dict[str, float]:
    """The learning rate that the first AdamW step really used: the median change of each name."""
    assert before.keys() == after.keys()
    return {name: float((after[name] - before[name]).abs().median()) for name in before}


def wanted_rates(model: nn.Module | None = None) -> dict[str, float]:
    """Learning rate of each name, as `naive_groups` and CONFIG both mean it."""
    return {
        name: RATES[naive_component(name)] for name, _ in (model or make_model()).named_parameters()
    }


def close(got: dict[str, float], wanted: dict[str, float], rel: float = 2e-2) -> bool:
    return got == pytest.approx(wanted, rel=rel)


def farthest(a: Weights, b: Weights) -> float:
    """Largest difference of any element."""
    return max(movement(a, b).values())


class At(NamedTuple):
    """Where a case runs."""

    rank: int
    world_size: int
    folder: Path
    """Empty, the same on all ranks."""


Body = Callable[[At], None]
Outcome = tuple[str, str]
"""("passed" | "failed" | "skipped" | "not run", text)."""


class Outcomes:
    """What became of each case on each rank."""

    def __init__(self, by_rank: list[dict[str, Outcome]]):
        self._by_rank = by_rank

    def settle(self, name: str) -> None:
        """Fail or skip as the ranks did."""
        found = [(rank, *outcomes[name]) for rank, outcomes in enumerate(self._by_rank)]
        for rank, kind, text in found:
            if kind in ("failed", "not run"):
                pytest.fail(f"{kind} on rank {rank}\n{text}", pytrace=False)
        for _, kind, text in found:
            if kind == "skipped":
                pytest.skip(text)


class Cases:
    """Functions that become one test each, but run in one set of ranks.

    >>> cases = Cases()
    >>> @cases
    ... def test_that_something_holds(at: At) -> None: ...
    >>> @pytest.fixture(scope="module")
    ... def outcomes(request): return cases.run(request)
    """

    def __init__(self, world_size: int = 2, before: Callable[[], None] | None = None):
        self._world_size = world_size
        self._before = before
        self._bodies: dict[str, Body] = {}

    def __call__(self, body: Body) -> Callable[[Outcomes], None]:
        """Register a body, and return the test that reports it."""
        name = body.__name__
        self._bodies[name] = body

        def test(outcomes: Outcomes) -> None:
            outcomes.settle(name)

        test.__name__ = test.__qualname__ = name
        test.__module__ = body.__module__
        return test

    def run(self, request: pytest.FixtureRequest) -> Outcomes:
        """Run the selected cases on fresh ranks."""
        chosen = {
            item.name
            for item in request.session.items
            if getattr(item, "module", None) is request.module
        }
        names = [name for name in self._bodies if name in chosen]
        with tempfile.TemporaryDirectory() as folder:
            return Outcomes(
                run_ranks(self._on_rank, self._world_size, names, folder, deadline_s=DEADLINE_S)
            )

    def _on_rank(
        self, rank: int, world_size: int, names: list[str], folder: str
    ) -> dict[str, Outcome]:
        if self._before is not None:
            self._before()
        outcomes: dict[str, Outcome] = {}
        for name in names:
            at = At(rank, world_size, Path(folder) / name)
            at.folder.mkdir(exist_ok=True)
            outcomes[name] = _attempt(self._bodies[name], at)
            if not _together(name, at, outcomes[name][0]):
                gone = ("not run", f"the ranks parted in {name}")
                return {**{n: gone for n in names}, **outcomes}
        return outcomes


def _attempt(body: Body, at: At) -> Outcome:
    try:
        body(at)
    except pytest.skip.Exception as reason:
        return "skipped", str(reason)
    except BaseException:
        return "failed", traceback.format_exc()
    return "passed", ""


def _together(name: str, at: At, kind: str) -> bool:
    """Whether all ranks ended this case alike; if not, their next collectives would not fit
    together."""
    store = dist.distributed_c10d._get_default_store()
    store.set(f"case/{name}/{at.rank}", kind)
    keys = [f"case/{name}/{rank}" for rank in range(at.world_size)]
    try:
        store.wait(keys, timedelta(seconds=15))
    except RuntimeError:  # the other rank waits in a collective of this case, or is gone
        return False
    return len({store.get(key) for key in keys}) == 1
