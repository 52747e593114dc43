"""Optimizers that nobody here wrote, and some that users write: what is handed to `attach`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import came_pytorch
import lion_pytorch
import prodigyopt
import pytorch_optimizer
import schedulefree
import torch
from torch import Tensor, nn

Make = Callable[[Any], torch.optim.Optimizer]


def from_package(package: str, kind: str, **settings: Any) -> Make:
    """A class of a package, imported when it is called."""

    def make(groups: Any) -> torch.optim.Optimizer:
        module = importlib.import_module(package)
        return getattr(module, kind)(groups, **settings)  # type: ignore[no-any-return]

    return make


def in_train_mode(make: Make) -> Make:
    """Schedule-free optimizers must be told that they train."""

    def told(groups: Any) -> torch.optim.Optimizer:
        optimizer: Any = make(groups)
        optimizer.train()
        return optimizer  # type: ignore[no-any-return]

    return told


def is_installed(package: str) -> bool:
    """Whether it can be imported; timm's optimizers need torchvision besides."""
    needed = [package, "torchvision"] if package == "timm" else [package]
    return all(importlib.util.find_spec(name) is not None for name in needed)


def adagrad_needs_its_constructor() -> bool:
    """Whether Adagrad makes its state in its constructor alone, as torch 2.10 and 2.11 do.

    A view that is stepped for a slice of a tensor then has none.
    """
    param = nn.Parameter(torch.ones(1))
    param.grad = torch.ones(1)
    optimizer = torch.optim.Adagrad([param])
    optimizer.state.clear()
    try:
        optimizer.step()
    except KeyError:
        return True
    return False


class ClippedByNorm(torch.optim.AdamW):
    """AdamW that clips all gradients by one norm first: right only where a rank has them all."""

    def step(self, closure: Any = None) -> Any:
        params = [p for group in self.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(params, 0.1)
        return super().step(closure)


class Harmless(torch.optim.AdamW):
    """A subclass that changes nothing."""


class Muon(torch.optim.AdamW):
    """AdamW under a name that means another algorithm elsewhere."""


class Plain(torch.optim.Optimizer):
    """A user's own Muon for matrices and sign descent for the rest, under an innocent name."""

    def __init__(self, params: Any, lr: float = 1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(_orthogonal(param.grad), alpha=float(group["lr"]))


def _orthogonal(gradient: Tensor) -> Tensor:
    if gradient.ndim != 2:
        return gradient.sign()
    x = gradient / (gradient.norm() + 1e-7)
    for _ in range(5):
        x = 1.5 * x - 0.5 * (x @ x.mT) @ x
    return x


class CountsInGroup(torch.optim.Optimizer):
    """Adam's bias correction from a counter in the group, as several packages keep it."""

    def __init__(self, params: Any, lr: float = 1e-3):
        super().__init__(params, {"lr": lr, "steps": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["steps"] += 1
            for param in group["params"]:
                if param.grad is None:
                    continue
                mean = self.state[param].setdefault("mean", torch.zeros_like(param))
                mean.mul_(0.9).add_(param.grad, alpha=0.1)
                correction = 1 - 0.9 ** group["steps"]
                param.sub_(mean / correction, alpha=float(group["lr"]))


class CountsInItself(CountsInGroup):
    """The same counter, one for the whole optimizer."""

    def __init__(self, params: Any, lr: float = 1e-3):
        super().__init__(params, lr)
        self.count = 0

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["steps"] = self.count
        super().step(closure)
        self.count += 1


class Wrapper(torch.optim.Optimizer):
    """Hides another optimizer, as look-ahead and warm-up wrappers do."""

    def __init__(self, hidden: torch.optim.Optimizer):
        self.hidden = hidden
        super().__init__(hidden.param_groups, dict(hidden.defaults))
        self.param_groups, self.state = hidden.param_groups, hidden.state

    def step(self, closure: Any = None) -> Any:
        return self.hidden.step(closure)


class OneRate(torch.optim.SGD):
    """Steps every group at the rate of the first one."""

    def step(self, closure: Any = None) -> Any:
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = rates[0]
        result = super().step(closure)
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate
        return result


def _named(kind: type[torch.optim.Optimizer], name: str) -> Make:
    """The class under another name."""
    return type(name, (kind,), {})


USERS: dict[str, Make] = {
    "a subclass of AdamW": Harmless,
    "AdamW named Muon": Muon,
    "AdamW that clips by a norm": ClippedByNorm,
    "Muon under an innocent name": Plain,
    "a counter in the group": CountsInGroup,
    "a counter in the optimizer": CountsInItself,
    "a wrapper of AdamW": lambda groups: Wrapper(torch.optim.AdamW(groups)),
    "a wrapper of Muon": lambda groups: Wrapper(Plain(groups)),
    "one rate for all": OneRate,
    "Adafactor renamed": _named(torch.optim.Adafactor, "Adam"),
    "NAdam with betas by group": lambda groups: torch.optim.NAdam(
        [{**g, "betas": (0.9 if g["lr"] > 2e-3 else 0.8, 0.99)} for g in groups]
    ),
}
_TORCH = (
    "AdamW Adam SGD NAdam RAdam Adamax Adagrad Adadelta RMSprop Rprop ASGD Adafactor LBFGS"
).split()
_PYTORCH_OPTIMIZER = (
    "A2Grad ADOPT AdaBelief AdaBound AdaDelta AdaHessian AdaMod AdaNorm AdaPNM AdaSmooth AdaFactor"
    " Adai Adalite AdamP AdamS AdamC AdamW AdaShift AdEMAMix SimplifiedAdEMAMix AvaGrad"
    " Adan CAME Conda DAdaptAdam DAdaptLion DiffGrad FAdam Fira Grams Gravity Lamb LaProp LARS"
    " Lion MADGRAD MARS MSVAG Nero NovoGrad PAdam PID Prodigy QHAdam QHM RAdam Ranger"
    " ScalableShampoo ScheduleFreeAdamW ScheduleFreeSGD SGDP SGDW SignSGD SM3 SOAP"
    " SPlus SRMM StableAdamW SWATS Tiger VSGD Yogi Kron EmoNavi FOCUS Shampoo AccSGD AggMo"
    " RACS Alice SCION Ano Amos SPAM StableSPAM TAM AdaTAM APOLLO GaLore Emofact SNSM"
).split()
PACKAGES: dict[str, Make] = {
    **{f"torch {name}": getattr(torch.optim, name) for name in _TORCH},
    "torch SGD, momentum": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "torch AdamW, amsgrad": partial(torch.optim.AdamW, amsgrad=True),
    "torch AdamW, fused": partial(torch.optim.AdamW, fused=True),
    "torch RMSprop, centered": partial(torch.optim.RMSprop, centered=True, momentum=0.9),
    "transformers Adafactor": from_package(
        "transformers.optimization",
        "Adafactor",
        relative_step=False,
        scale_parameter=False,
        warmup_init=False,
    ),
    "transformers Adafactor, scaled": from_package(
        "transformers.optimization", "Adafactor", relative_step=False, warmup_init=False
    ),
    "lion_pytorch Lion": lion_pytorch.Lion,
    "prodigyopt Prodigy": prodigyopt.Prodigy,
    "schedulefree AdamW": in_train_mode(schedulefree.AdamWScheduleFree),
    "schedulefree SGD": in_train_mode(schedulefree.SGDScheduleFree),
    "schedulefree RAdam": in_train_mode(schedulefree.RAdamScheduleFree),
    "came_pytorch CAME": partial(came_pytorch.CAME, lr=1e-3),
    "dadaptation Adam": from_package("dadaptation", "DAdaptAdam"),
    **{
        f"timm {name}": from_package("timm.optim", name)
        for name in ("Lamb", "LaProp", "NAdamW", "AdamP", "Adan", "Mars", "Lion", "NvNovoGrad")
    },
    **{
        f"bitsandbytes {name}": from_package("bitsandbytes.optim", name)
        for name in ("AdamW8bit", "AdamW32bit", "Lion8bit")
    },
    **{
        f"torchao {name}": from_package("torchao.optim", name)
        for name in ("AdamW8bit", "AdamW4bit", "AdamWFp8")
    },
}


# A release may rename some: those that it has are tried.
_OTHERS: dict[str, Make] = {
    f"pytorch_optimizer {name}": getattr(pytorch_optimizer, name)
    for name in _PYTORCH_OPTIMIZER
    if hasattr(pytorch_optimizer, name)
}


def all_optimizers() -> dict[str, Make]:
    return {**USERS, **PACKAGES, **_OTHERS}


def package_of(name: str) -> str:
    """The package that must be installed for it."""
    first = name.partition(" ")[0]
    return first if name in PACKAGES or first == "pytorch_optimizer" else "torch"
