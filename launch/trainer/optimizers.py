"""The config's ``optimizer`` block: AdamW and SGD by name, any other torch class by import path."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dist_layerlr import fields
from dist_layerlr.errors import ConfigError
from dist_layerlr.fields import setting
from dist_layerlr.offload import StreamPolicy
from dist_layerlr.optim import MakeOptimizer
from dist_layerlr.plan import OPTIMIZERS_BLOCK, Config

ADAMW, SGD = "adamw", "sgd"
MUON = "muon"
"""What ``optimizers`` may name beside the rest's."""
_SHIPPED = (ADAMW, SGD)
_ALLOWED = "adamw, sgd, or an optimizer's import path such as lion_pytorch.Lion"
_SIDE = 64
"""Of the square matrix on which an optimizer is tried; quantised states need some thousand elements
before they are used."""


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """The torch optimizer. Learning rates are the plan's."""

    kind: str = setting(
        fields.text,
        default=ADAMW,
        key="type",
        doc="`adamw`, `sgd`, or the import path of any torch optimizer class, such as"
        " `lion_pytorch.Lion`. Before training it is tried on scratch parameters: one that cannot"
        " be exact under the sharder is refused (`docs/proof.md`).",
    )
    betas: tuple[float, float] = setting(
        fields.numbers(at_least=2), default=(0.9, 0.999), doc="`adamw` only; both below 1."
    )
    eps: float = setting(fields.number(0.0, open_low=True), default=1e-8, doc="`adamw` only.")
    weight_decay: float = setting(
        fields.number(0.0), default=0.01, doc="Where the plan gives no other."
    )
    momentum: float = setting(fields.number(0.0, 1.0), default=0.9, doc="`sgd` only.")
    args: Mapping[str, Any] = setting(
        fields.mapping,
        factory=dict,
        doc="What a class given by import path is made with, beside the plan's groups.",
    )

    @property
    def observable(self) -> bool:
        """Whether its formula is known, so that the first step's rates can be read off the weights.

        Rates that another optimizer reports are verified all the same.
        """
        return self.kind in _SHIPPED


def read_optimizer(values: dict[str, Any]) -> OptimizerOptions:
    """Make the block of what a config gives, checked field by field already.

    Raises:
        ConfigError: betas that are no pair, a class that is not there, is no torch optimizer, does
            not take ``args``, or wants to be told when training pauses.
    """
    if "betas" in values and (len(values["betas"]) != 2 or max(values["betas"]) >= 1.0):
        raise fields.invalid("optimizer.betas", list(values["betas"]), "two numbers in [0, 1)")
    options = OptimizerOptions(**values)
    # What is at its default counts as not given: a resolved config names every field.
    unread = ("args",) if options.observable else ("betas", "eps", "momentum")
    for name in unread:
        if getattr(options, name) != getattr(OptimizerOptions(), name):
            where = "the fields beside it" if options.observable else "optimizer.args"
            raise ConfigError(
                f"Invalid optimizer.{name} with optimizer.type={options.kind!r}, which does not"
                f" read it: put it into {where}, or remove it."
            )
    if not options.observable:
        _check_args(options)
        _try(options)
    return options


def make_optimizer(
    groups: list[dict[str, Any]], options: OptimizerOptions
) -> torch.optim.Optimizer:
    """Build the optimizer that the config names on the plan's groups."""
    if options.kind == SGD:
        return torch.optim.SGD(
            groups, lr=0.0, momentum=options.momentum, weight_decay=options.weight_decay
        )
    if options.kind != ADAMW:
        return _made(groups, options)
    # lr is a default for groups that name none, and the plan's groups all do: 0 would show it.
    # Fused: one pass over memory on CPU and CUDA alike, see benchmarks/step_cost.py.
    return torch.optim.AdamW(
        groups,
        lr=0.0,
        fused=True,
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
    )


def make_optimizers(
    options: OptimizerOptions, plan: Config
) -> MakeOptimizer | dict[str, MakeOptimizer]:
    """What ``attach`` is given: one function, or one for each optimizer that the config names."""

    def rest(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        try:
            return make_optimizer(groups, options)
        # Whatever a foreign constructor says of this model's parameters.
        except Exception as error:
            if options.observable:
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"Invalid optimizer.type={options.kind!r}: it cannot be made on this model's"
                f" parameters ({reason}). Choose another; one for matrices alone (Muon) belongs"
                f" into the {OPTIMIZERS_BLOCK!r} block, beside one for the rest."
            ) from error

    given = plan.optimizers
    if given is None:
        return rest
    rule = given.rules[MUON]

    def muon(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.Muon(
            groups,
            lr=0.0,
            weight_decay=options.weight_decay,
            momentum=rule.momentum,
            nesterov=rule.nesterov,
            ns_steps=rule.ns_steps,
            adjust_lr_fn=rule.adjust_lr,
        )

    return {MUON: muon, given.rest: rest}


def check_optimizers(plan: Config, rest: OptimizerOptions, stream: StreamPolicy | None) -> None:
    """Refuse optimizers that this trainer cannot build, or cannot give whole matrices to.

    Raises:
        ConfigError: others than Muon and the rest, Muon for what is no matrix, or streamed weights.
    """
    given = plan.optimizers
    if given is None:
        return
    if set(given.rules) != {MUON} or given.rest != rest.kind:
        allowed = f'{MUON!r}, and the "rest" for optimizer.type={rest.kind!r}'
        raise fields.invalid(OPTIMIZERS_BLOCK, list(given.names), allowed)
    if not given.rules[MUON].matrices:
        raise fields.invalid(f"{OPTIMIZERS_BLOCK}.{MUON}.matrices", False, "true")
    if stream is not None:
        raise ConfigError(
            f"Invalid {OPTIMIZERS_BLOCK} with memory.stagehand.enabled=true: streamed weights are"
            " stepped one by one on the host. Switch streaming off, or remove the block."
        )


def state_bytes(options: OptimizerOptions) -> float:
    """Bytes of optimizer state per float32 element that trains, measured on a scratch matrix."""
    optimizer, parameter = _scratch(options)
    parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    # A count of steps is there once per tensor, whatever its size.
    held = [v for v in optimizer.state[parameter].values() if isinstance(v, torch.Tensor)]
    return sum(v.nbytes for v in held if v.ndim) / parameter.numel()


def _check_args(options: OptimizerOptions) -> None:
    """Refuse settings that another place would overrule, or that nobody would read."""
    if "lr" in options.args:
        raise ConfigError(
            f"Invalid optimizer.args.lr={options.args['lr']!r}: every group has the plan's rate, so"
            " it would do nothing. Set learning_rate and per_layer_lr, and remove it."
        )
    decay = options.weight_decay
    if decay == OptimizerOptions().weight_decay:
        return  # as good as not given
    if options.args.get("weight_decay", decay) != decay:
        raise ConfigError(
            f"Invalid optimizer.weight_decay={decay:g} with optimizer.args.weight_decay="
            f"{options.args['weight_decay']!r}: two values for one setting. Remove one of them."
        )
    asked = inspect.signature(_class_of(options.kind)).parameters.values()
    if not any(a.name == "weight_decay" or a.kind is a.VAR_KEYWORD for a in asked):
        raise ConfigError(
            f"Invalid optimizer.weight_decay={decay:g} with optimizer.type={options.kind!r}, which"
            " takes none: remove it, or choose another optimizer."
        )


def _try(options: OptimizerOptions) -> None:
    """Make and step the optimizer once, so that a wrong argument costs seconds."""
    try:
        optimizer, _ = _scratch(options)
        # Schedule-free ones keep the weights of training and those of the result in one place.
        if callable(getattr(optimizer, "eval", None)):
            raise ConfigError(
                f"Invalid optimizer.type={options.kind!r}: it changes the weights whenever"
                " training pauses (its eval() and train()), which this trainer does not call."
                " Choose another, or train in a loop of your own."
            )
        state_bytes(options)
    except ConfigError:
        raise
    # Whatever a foreign constructor or step raises.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"Invalid optimizer.type={options.kind!r} with optimizer.args={dict(options.args)!r}:"
            f" it cannot be made and stepped on a matrix ({reason}). args is what its constructor"
            " takes beside params and lr."
        ) from error


def _scratch(options: OptimizerOptions) -> tuple[torch.optim.Optimizer, torch.nn.Parameter]:
    parameter = torch.nn.Parameter(torch.ones(_SIDE, _SIDE, device=_scratch_device(options)))
    # Some announce themselves on standard output.
    with contextlib.redirect_stdout(None):
        optimizer = make_optimizer([{"params": [parameter], "lr": 1e-3}], options)
    return optimizer, parameter


def _scratch_device(options: OptimizerOptions) -> str:
    """The CPU, where a config is read without a card; TableAdamW runs on cards alone."""
    runs_on = None if options.observable else getattr(_class_of(options.kind), "runs_on", None)
    if callable(runs_on) and runs_on() == "cuda" and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return "cpu"


def _made(groups: list[dict[str, Any]], options: OptimizerOptions) -> torch.optim.Optimizer:
    cls = _class_of(options.kind)
    asked = inspect.signature(cls).parameters
    told = dict(options.args)
    if "weight_decay" in asked:
        told.setdefault("weight_decay", options.weight_decay)
    if "lr" in asked and asked["lr"].default in (inspect.Parameter.empty, None):
        # A default for groups without a rate, of which the plan makes none. Some refuse 0.
        told.setdefault("lr", 1e-3)
    optimizer: torch.optim.Optimizer = cls(groups, **told)
    return optimizer


def _class_of(path: str) -> Any:
    """Import the class of an optimizer.

    Raises:
        ConfigError: there is none.
    """
    module, _, name = path.rpartition(".")
    if not module:
        raise fields.invalid("optimizer.type", path, _ALLOWED)
    try:
        found = getattr(importlib.import_module(module), name, None)
    # Whatever a foreign module raises while it is imported.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise fields.invalid(
            "optimizer.type", path, _ALLOWED, f" Importing it failed: {reason}."
        ) from error
    if not (inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)):
        hint = f" {module} has no torch optimizer of the name {name!r}."
        raise fields.invalid("optimizer.type", path, _ALLOWED, hint)
    return found
