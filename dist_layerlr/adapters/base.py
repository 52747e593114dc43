"""What an adapter must answer about live, sharded parameters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from dist_layerlr.model import live_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveParam:
    """How this rank's optimizer trains one parameter."""

    lr: float
    weight_decay: float
    numel: int
    """Elements that this rank steps; 0 for an empty shard."""
    replicas: int = 1
    """Number of ranks that step each element."""


@dataclass(frozen=True, kw_only=True)
class ReadBack:
    """Everything the live optimizer steps, by canonical name."""

    live: dict[str, LiveParam] = field(default_factory=dict)
    repeated: list[str] = field(default_factory=list)
    """Names that more than one group steps."""
    strangers: int = 0
    """Tensors in the optimizer that are no parameter of the model (stale ones)."""


class Adapter(Protocol):
    """One sharder. Knows how it hides names, and where its optimizer keeps the truth."""

    label: str
    """For people: `fsdp2`, `zero 2` ..."""

    def handles(self, model: nn.Module) -> bool:
        """Whether this sharder wraps the model."""
        ...

    def read_back(self, model: nn.Module, optimizer: Any) -> ReadBack:
        """Read lr and weight decay of every parameter from the objects that will be stepped."""
        ...


def read_groups(groups: Iterable[dict[str, Any]], model: nn.Module, count: Any) -> ReadBack:
    """Read ordinary groups whose tensors are the model's own parameters.

    Args:
        groups: the live ``param_groups``.
        model: however wrapped.
        count: parameter -> (local elements, replicas).
    """
    names = {id(param): name for name, param in live_parameters(model).items()}
    result = ReadBack()
    strangers = 0
    for group in groups:
        for param in group["params"]:
            name = names.get(id(param))
            if name is None:
                strangers += 1
                continue
            if name in result.live:
                result.repeated.append(name)
            numel, replicas = count(param)
            result.live[name] = LiveParam(
                lr=float(group["lr"]),
                weight_decay=float(group.get("weight_decay", 0.0)),
                numel=numel,
                replicas=replicas,
            )
    return ReadBack(live=result.live, repeated=result.repeated, strangers=strangers)
