"""What ``TableAdamW`` keeps on the device for one launch: addresses, blocks, rates, counters.

They are written from pinned memory and without waiting for the card, so that a step can be captured
in a CUDA graph. What a graph reads must stay where it is, and what a graph copies from the host it
copies again at every replay. Hence rates are written in place and never inside a graph, which would
bring the old ones back; addresses are written by each graph itself, since those of an ordinary step
differ; and the rest is never overwritten.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_layerlr.errors import ConfigError

Settings = tuple[float, float, float, float, float]
"""Of a group: lr, weight decay, both betas, epsilon."""


STEP = "step"


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


def pinned(host: Tensor) -> Tensor:
    """The same in memory that a card can read while the host goes on."""
    return host.pin_memory() if torch.cuda.is_available() else host


class Table:
    """The tables of one kind of tensors."""

    def __init__(self, kind: Kind, capturable: bool):
        self.kind = kind
        self.home = kind.device if capturable else torch.device("cpu")
        """Where rates are computed, and counters lie."""
        self.aligned = False
        """Whether all addresses last written were multiples of the alignment asked for."""
        self._constant: dict[str, tuple[Hashable, Tensor]] = {}
        self._settings: tuple[list[Settings], Tensor] | None = None
        self._addresses: tuple[list[list[int]], Tensor] | None = None
        self._spare: Tensor | None = None
        """Pinned memory for the next graph: during a capture none can be had."""
        self._of_graphs: list[Tensor] = []
        """What graphs read at their replays: it must not be given to anybody else."""
        self._views: list[Tensor] = []
        self._counters = torch.zeros(0, device=self.home)

    def count(self, members: Sequence[Member]) -> Tensor:
        """Count a step of each member; returns all counters.

        Each state's ``step`` is a view of one tensor, which one call advances: 4,000 calls for
        tensors of one number take 10 ms.
        """
        steps = [member.state[STEP] for member in members]
        known = len(steps) == len(self._views)
        # New members, or a load, which replaces entries.
        if not known or any(a is not b for a, b in zip(steps, self._views, strict=True)):
            _refuse_in_graph("which tensors have gradients, or their state,")
            given = [torch.as_tensor(step, dtype=torch.float32) for step in steps]
            self._counters = torch.stack([step.detach().to(self.home) for step in given])
            self._views = list(self._counters.unbind())
            for member, view in zip(members, self._views, strict=True):
                member.state[STEP] = view
        self._counters.add_(1)
        return self._counters

    def chunks(self, members: Sequence[Member], block: int) -> Tensor:
        """int32 (programs, 2): segment, and number of the block in it."""
        sizes = tuple(member.tensors[0].numel() for member in members)
        return self._kept("chunks", sizes, lambda: _chunks(sizes, block), self.kind.device)

    def addresses(self, members: Sequence[Member], alignment: int) -> Tensor:
        """int64 (5, segments): addresses of the four tensors, and numbers of elements."""
        columns = zip(*(member.tensors for member in members), strict=True)
        rows = [[tensor.data_ptr() for tensor in column] for column in columns]
        self.aligned = not any(at % alignment for row in rows for at in row)
        rows.append([member.tensors[0].numel() for member in members])
        if is_capturing():
            return self._write_in_graph(rows)
        before = self._addresses
        if before is not None and before[0] == rows and not self._of_graphs:
            return before[1]
        host = pinned(torch.tensor(rows))
        there = torch.empty_like(host, device=self.kind.device) if before is None else before[1]
        if there.shape != host.shape:
            there = torch.empty_like(host, device=self.kind.device)
        there.copy_(host, non_blocking=True)
        self._addresses = rows, there
        if self.home.type != "cpu" or self.kind.device.type == "cpu":
            self._spare = pinned(torch.empty_like(host))
        return there

    def _write_in_graph(self, rows: list[list[int]]) -> Tensor:
        """Let the graph write the addresses of its own tensors at each replay."""
        host = torch.tensor(rows)
        if self._addresses is None or self._spare is None or self._spare.shape != host.shape:
            raise _not_in_graph("no ordinary step since the last capture has made room for it")
        there = self._addresses[1]
        self._spare.copy_(host)
        there.copy_(self._spare, non_blocking=True)
        self._of_graphs += [self._spare, there, self._counters]
        self._of_graphs += [tensor for _, tensor in self._constant.values()]
        self._spare = None
        return there

    def rates(
        self, members: Sequence[Member], settings: Sequence[Settings], counters: Tensor
    ) -> Tensor:
        """(7, segments) on the kernel's device, in its precision."""
        groups = tuple(member.group for member in members)
        index = self._kept("groups", groups, lambda: torch.tensor(groups), self.home)
        # Before the gather: a capture must find everything written.
        table = self.write_settings(settings)
        found = rates_of(table[:, index], counters).to(self.kind.work)
        if self.home != self.kind.device:
            found = pinned(found).to(self.kind.device, non_blocking=True)
        return found

    def write_settings(self, settings: Sequence[Settings]) -> Tensor:
        """float64 (5, groups) of all groups, written in place where they have changed."""
        wanted = list(settings)
        before = self._settings
        if before is not None and before[0] == wanted:
            return before[1]
        _refuse_in_graph("learning rates or other settings of groups")
        host = torch.tensor(wanted, dtype=torch.float64).T.contiguous()
        if before is not None and before[1].shape == host.shape:
            there = before[1]
            there.copy_(pinned(host) if there.is_cuda else host, non_blocking=True)
        else:
            there = host.to(self.home)
        self._settings = wanted, there
        return there

    def _kept(
        self, name: str, key: Hashable, make: Callable[[], Tensor], device: torch.device
    ) -> Tensor:
        """A tensor that is made anew, and not overwritten, where ``key`` is another than before."""
        before = self._constant.get(name)
        if before is not None and before[0] == key:
            return before[1]
        _refuse_in_graph("which tensors have gradients, or their sizes,")
        self._constant[name] = key, pinned(make()).to(device, non_blocking=True)
        return self._constant[name][1]


def _chunks(sizes: Sequence[int], block: int) -> Tensor:
    blocks = torch.tensor([-(-size // block) for size in sizes])
    segments = torch.arange(len(sizes)).repeat_interleave(blocks)
    begins = blocks.cumsum(0) - blocks
    numbers = torch.arange(segments.numel()) - begins[segments]
    return torch.stack([segments, numbers], dim=1).to(torch.int32)


def _refuse_in_graph(what: str) -> None:
    if is_capturing():
        raise _not_in_graph(f"{what} changed since the last ordinary step")


def _not_in_graph(why: str) -> ConfigError:
    return ConfigError(
        f"Cannot capture this step in a CUDA graph: {why}. Take an ordinary step with gradients and"
        " rates as they will be, then capture; change rates between replays, and call"
        " optimizer.write_rates()."
    )
