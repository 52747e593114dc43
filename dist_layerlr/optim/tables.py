"""What ``TableAdamW`` keeps on the device for one launch: addresses, blocks, rates, counters.

Everything is a tensor that is written in place and only when it has changed, from pinned memory and
without waiting for the card: a step can then be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_layerlr.errors import ConfigError

Settings = tuple[float, float, float, float, float]
"""Of a group: lr, weight decay, both betas, epsilon."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What one launch can take together."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    """Of parameter, gradient, first and second moment."""

    @property
    def work(self) -> torch.dtype:
        """The precision of the arithmetic: bfloat16 is rounded once, when it is stored."""
        return torch.float64 if torch.float64 in self.dtypes else torch.float32


@dataclass(slots=True)
class Member:
    """One tensor of a launch."""

    group: int
    """Position of its group."""
    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    """Parameter, gradient, first and second moment, each laid out alike and without gaps."""
    state: dict[str, Any]


STEP = "step"


def is_capturing() -> bool:
    """Whether what is launched now goes into a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def rates_of(settings: Tensor, counters: Tensor) -> Tensor:
    """What the kernel multiplies by, (7, segments): each row is one number of Adam's formula.

    In float64: ``1 - beta ** step`` and ``1 - beta`` lose digits in float32.

    Args:
        settings: float64 (5, segments), rows as in ``Settings``.
        counters: (segments,): how often each was stepped, this step included.
    """
    lr, decay, beta1, beta2, eps = settings.unbind()
    step = counters.double()
    corrected = lr / (1 - beta1**step)
    root = (1 - beta2**step).sqrt()
    return torch.stack([corrected, 1 - lr * decay, 1 - beta1, beta2, 1 - beta2, root, eps])


class Table:
    """The tables of one kind of tensors."""

    def __init__(self, kind: Kind, capturable: bool):
        self.kind = kind
        self.home = kind.device if capturable else torch.device("cpu")
        """Where rates are computed, and counters lie."""
        self.capturable = capturable
        self.aligned = False
        self._written: dict[str, tuple[Any, Tensor, Tensor]] = {}
        self._captured: list[Tensor] = []
        self._views: list[Tensor] = []
        self._counters = torch.zeros(0, device=self.home)

    def count(self, members: Sequence[Member]) -> Tensor:
        """Count a step of each member; returns all counters.

        Each state's ``step`` is a view of one tensor, which one call advances: 4,000 calls for
        tensors of one number take 10 ms.
        """
        steps = [member.state[STEP] for member in members]
        known = len(steps) == len(self._views)
        if not (known and all(a is b for a, b in zip(steps, self._views, strict=True))):
            # New members, or a load, which replaces entries.
            self._refuse_capture("which tensors have gradients")
            given = [torch.as_tensor(step, dtype=torch.float32) for step in steps]
            counters = [step.detach().to(self.home).reshape(()) for step in given]
            self._counters = torch.stack(counters)
            self._views = list(self._counters.unbind())
            for member, view in zip(members, self._views, strict=True):
                member.state[STEP] = view
        self._counters.add_(1)
        return self._counters

    def chunks(self, members: Sequence[Member], block: int) -> Tensor:
        """int32 (programs, 2): segment, and number of the block in it."""
        sizes = tuple(member.tensors[0].numel() for member in members)
        return self._put("sizes", sizes, lambda: _chunks(sizes, block))

    def addresses(self, members: Sequence[Member], alignment: int) -> Tensor:
        """int64 (5, segments): addresses of the four tensors, and numbers of elements."""
        rows = [[t.data_ptr() for t in row] for row in zip(*[m.tensors for m in members], strict=True)]
        rows.append([member.tensors[0].numel() for member in members])
        self.aligned = not any(at % alignment for row in rows[:-1] for at in row)
        return self._put("addresses", rows, lambda: torch.tensor(rows), in_graph=True)

    def rates(
        self, members: Sequence[Member], settings: Sequence[Settings], counters: Tensor
    ) -> Tensor:
        """(7, segments) on the kernel's device, in its precision."""
        groups = [member.group for member in members]
        index = self._put("groups", groups, lambda: torch.tensor(groups), device=self.home)
        table = self.write_settings(settings)
        found = rates_of(table[:, index], counters).to(self.kind.work)
        if found.device != self.kind.device:
            found = pinned(found).to(self.kind.device, non_blocking=True)
        return found

    def write_settings(self, settings: Sequence[Settings]) -> Tensor:
        """float64 (5, groups) of all groups, in place."""
        wanted = list(settings)
        return self._put(
            "rates",
            wanted,
            lambda: torch.tensor(wanted, dtype=torch.float64).T.contiguous(),
            device=self.home,
        )

    def _put(
        self, name: str, key: Any, make: Any, *, device: torch.device | None = None, in_graph: bool = False
    ) -> Tensor:
        """The device tensor of a name, written anew if ``key`` is another than before."""
        before = self._written.get(name)
        if before is not None and before[0] == key:
            return before[1]
        host: Tensor = make()
        device = device or self.kind.device
        if device.type == "cpu":
            spare = there = host
        elif is_capturing():
            # A graph copies from this memory again at each replay, so it is used this once and
            # kept. Rates must not stand in it: a replay would bring the old ones back.
            if before is None or not in_graph or before[2].shape != host.shape:
                self._refuse_capture(name)
            _, there, spare = before
            spare.copy_(host)
            there.copy_(spare, non_blocking=True)
            self._captured.append(spare)
        else:
            ...
        self._written[name] = (key, there, spare)
        return there
