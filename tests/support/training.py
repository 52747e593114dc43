"""Train the same model resident and streamed, and compare everything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_layerlr.offload import Handle, StreamPolicy
from dist_layerlr.offload.device import Backend, accelerator
from dist_layerlr.offload.streaming import stream_on
from tests.support.adversary import Adversary
from tests.support.families import FAMILIES, MIN_NUMEL, add_lora

STEPS = 3
RATES = (4e-3, 3e-3, 2e-3, 1e-3, 7e-4, 5e-4, 3e-4)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One corner of the matrix."""

    family: str = "toy"
    lora: bool = True
    reentrant: bool | None = None
    accumulation: int = 1
    window: int = 1
    mode: str = "block"

    def __str__(self) -> str:
        kind = "lora" if self.lora else "full"
        recompute = {None: "plain", True: "reentrant", False: "nonreentrant"}[self.reentrant]
        run = f"{self.family}-{kind}-{recompute}"
        return f"{run}-acc{self.accumulation}-window{self.window}-{self.mode}"

    def model(self, **kwargs: Any) -> nn.Module:
        family = FAMILIES[self.family]
        model = family.make(reentrant=self.reentrant, **kwargs)
        return add_lora(model, *family.targets) if self.lora else model

    def policy(self, **changes: Any) -> StreamPolicy:
        settings = {"mode": self.mode, "prefetch_window": self.window, "min_numel": MIN_NUMEL}
        return StreamPolicy(**{**settings, **changes})


def backend_of(device: str) -> Backend:
    if device == "races":
        from tests.support.races import Detector  # registers `sim`

        return Detector()
    return accelerator(torch.device("cuda")) if device == "cuda" else Adversary(device)


def attach(model: nn.Module, case: Case, device: str, **changes: Any) -> Handle:
    return stream_on(backend_of(device), model, case.policy(**changes))


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Seven groups in turn, each with its own learning rate."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": trainable[i :: len(RATES)], "lr": rate} for i, rate in enumerate(RATES)]
    return torch.optim.AdamW(groups, weight_decay=0.1, foreach=False)


def loss_of(model: nn.Module, case: Case, step: int, device: str) -> Tensor:
    """Mean square of the output, on a batch whose input needs a gradient, as reentrant
    checkpointing asks."""
    batch = {
        k: v.to(device) if isinstance(v, Tensor) else v
        for k, v in FAMILIES[case.family].batch(step).items()
    }
    first = next(iter(batch))
    batch[first] = batch[first].requires_grad_()
    output = model(**batch)
    return (output[0] if isinstance(output, tuple) else output).square().mean()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    case: Case,
    device: str,
    *,
    steps: int = STEPS,
    after_step: Callable[[], None] = lambda: None,
) -> list[float]:
    """Returns the losses."""
    losses = []
    for step in range(steps):
        for micro in range(case.accumulation):
            loss = loss_of(model, case, step * case.accumulation + micro, device)
            losses.append(float(loss.detach().cpu()))
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after_step()
    return losses


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters()}


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state by name."""
    state = {n: optimizer.state[p] for n, p in model.named_parameters() if p in optimizer.state}
    return {
        f"{n}.{key}": value.detach().cpu().clone()
        for n, held in state.items()
        for key, value in held.items()
    }


def exact(case: Case, device: str) -> bool:
    """Streamed full finetuning steps on the CPU, whose AdamW is not CUDA's to the last bit."""
    return case.lora or device != "cuda"


def assert_equal(got: dict[str, Tensor], wanted: dict[str, Tensor], *, exact: bool = True) -> None:
    """Bit for bit, or to 1e-6."""
    assert got.keys() == wanted.keys()
    same = torch.equal if exact else lambda a, b: torch.allclose(a, b, rtol=0, atol=1e-6)
    differ = [name for name in wanted if not same(got[name], wanted[name])]
    assert not differ, f"{len(differ)} of {len(wanted)} differ: {differ[:4]}"


def resident(
    case: Case, device: str, **kwargs: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """Weights, moments and losses of the model that stays on the device."""
    model = case.model(**kwargs).to(device)
    optimizer = make_optimizer(model)
    losses = train(model, optimizer, case, device)
    return weights(model), moments(model, optimizer), losses


def identity(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, ...]:
    """Which objects the model and the groups hold, and at which rates."""
    groups = [(id(g), g["lr"], [id(p) for p in g["params"]]) for g in optimizer.param_groups]
    return [id(p) for p in model.parameters()], groups, [id(p) for p in optimizer.state]
