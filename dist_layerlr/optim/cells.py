"""What a step did to each cell of the grid: rate, gradient norm, weight norm, size of the update.

A cell is (stack, block, component). Every rank measures the slices that it steps, as its optimizer
steps them; the sums of squares of all cells travel in one all-reduce. A step that is not measured
costs a comparison.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_layerlr import fields
from dist_layerlr.errors import ConfigError
from dist_layerlr.optim.groups import LR, groups_by_tensor
from dist_layerlr.optim.readback import live_pieces
from dist_layerlr.optim.segmented import Segmented
from dist_layerlr.plan.entries import Plan, cell_name
from dist_layerlr.ranks import alike, in_group, transport_device
from dist_layerlr.sharders import Piece, sharder_of
from dist_layerlr.sharders.base import local, local_gradient

Cell = tuple[str | None, int | None, str]
"""(stack, block, component); stack and block are None outside blocks."""
QUANTITIES = ("lr", "grad_norm", "weight_norm", "update_ratio")
"""In this order in ``Reading.rows``."""
_CHUNK = 1 << 16
"""Elements of one float32 norm. Torch adds up a long tensor on the CPU in few accumulators, which
costs digits; the squares of the chunks are added in float64."""
_COUNT, _RATE, _GRADIENT, _WEIGHT, _UPDATE = range(5)
"""Columns of the table of sums."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CellReading:
    """One cell in one step."""

    lr: float
    """The rate in force, schedule included: the mean over the cell's elements."""
    grad_norm: float
    """Of the gradient that the optimizer was given: after clipping."""
    weight_norm: float
    """Before the step; of the fp32 masters where the sharder keeps some."""
    update_norm: float
    """Of the difference that the step made, weight decay included."""

    @property
    def update_ratio(self) -> float:
        """``update_norm / weight_norm``; NaN where all weights were 0, as in a new lora_B."""
        return self.update_norm / self.weight_norm if self.weight_norm > 0 else math.nan


@dataclass(frozen=True, kw_only=True)
class Reading:
    """All cells in one step, the same on every rank."""

    cells: Mapping[Cell, CellReading]

    def rows(self) -> dict[str, list[float | None]]:
        """``{"blocks.000.self_attn": [lr, grad_norm, weight_norm, update_ratio]}``, for JSON.

        Six digits; what is NaN or infinite is None.
        """
        found = {}
        for cell, reading in self.cells.items():
            found[cell_name(cell)] = [_written(getattr(reading, name)) for name in QUANTITIES]
        return found

    def curves(self) -> dict[str, float]:
        """``{"grad_norm/self_attn/median": ...}``: least, median and most of a component's cells.

        A tracker draws one curve for each: the number of blocks does not change how many.
        """
        found: dict[str, float] = {}
        for name in QUANTITIES:
            values: dict[str, list[float]] = {}
            for (_, _, component), reading in self.cells.items():
                value = getattr(reading, name)
                if math.isfinite(value):
                    values.setdefault(component, []).append(value)
            for component, known in values.items():
                found[f"{name}/{component}/min"] = min(known)
                found[f"{name}/{component}/median"] = statistics.median(known)
                found[f"{name}/{component}/max"] = max(known)
        return found


class CellMetrics:
    """Measures chosen steps of an optimizer, for every cell of a plan.

    ``cells = CellMetrics(plan, model, optimizer, every=10)`` after ``attach``, and ``reading =
    cells.read()`` after each step: None but for every tenth. Between the two a measured step holds
    a copy of the weights that this rank steps.
    """

    def __init__(
        self, plan: Plan, model: nn.Module, optimizer: Any = None, *, every: int | None = 10
    ):
        """Watch the optimizer; the first step is measured. Collective.

        Args:
            plan: of this model.
            model: as it is trained.
            optimizer: the one that is stepped; a DeepSpeed engine brings its own.
            every: steps between measured ones; None: those before which ``arm`` is called.

        Raises:
            ConfigError: ``every`` is no such number, or the optimizer is none of torch's.
        """
        if every is not None:
            fields.integer(1)("every", every)
        self._sharder, self._given = sharder_of(model), optimizer
        self._every, self._steps = every, 0
        self._row: dict[str, int] = {}
        self._sizes: dict[Cell, int] = {}
        cells: dict[Cell, int] = {}
        for name, entry in plan.entries.items():
            self._row[name] = cells.setdefault(entry.cell, len(cells))
            self._sizes[entry.cell] = self._sizes.get(entry.cell, 0) + entry.numel
        self._armed = False
        self._failure: Exception | None = None
        self._pieces: list[Piece] = []
        self._seen: list[Any] = []
        self._forget()
        stepped = alike(lambda: _torch_optimizer(self._sharder.pieces(optimizer).optimizer))
        self._hooks = (
            stepped.register_step_pre_hook(self._before),
            stepped.register_step_post_hook(self._after),
        )
        if every is not None:
            self.arm()

    def arm(self) -> None:
        """Measure the next step. Call it on all ranks alike."""
        self._forget()
        self._armed, self._failure = True, None
        if self._sharder.layout.engine_steps:
            # Now, because DeepSpeed shows one group at a time to the optimizer that it steps.
            self._guard(self._list_pieces)

    def read(self) -> Reading | None:
        """Return what the step before was, if it was measured. Call it after each step.

        Collective after a measured step: one all-reduce. None also where nothing was stepped,
        because a loss scale overflowed: the next step is then measured in its place.

        Raises:
            LayerLRError: a rank could not measure; all of them raise.
        """
        was_armed, self._armed = self._armed, False
        self._steps += 1
        if not was_armed:
            if self._every is not None and self._steps % self._every == 0:
                self.arm()
            return None
        table = torch.zeros(self._table.numel() + 1, dtype=torch.float64)
        table[:-1] = self._table.flatten()
        table[-1] = float(self._failure is not None)
        if in_group():
            table = table.to(transport_device())
            dist.all_reduce(table)
        *sums, failed = table.tolist()
        if failed:
            alike(self._fail)
        again = not any(sums[_COUNT::5])
        self._forget()
        if again or self._every == 1:
            self.arm()
        return None if again else self._reading(sums)

    def close(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()

    def _forget(self) -> None:
        self._table = torch.zeros(len(self._sizes), 5, dtype=torch.float64)
        self._measured: set[int] = set()
        self._stepping: list[Piece] = []
        self._copies: dict[int, Tensor] = {}

    def _fail(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _guard(self, work: Callable[[], None]) -> None:
        """Keep an error until ``read``: this rank must not leave a step that others are in."""
        try:
            with torch.no_grad():
                work()
        except Exception as error:
            self._failure = error

    def _list_pieces(self) -> None:
        # Under FSDP2 the model shows the tensors that are stepped only while no unit is gathered.
        self._sharder.reshard()
        found = live_pieces(self._sharder, self._given).pieces
        self._pieces = [p for p in found if p.numel and p.name in self._row]

    def _refresh(self, optimizer: Optimizer) -> None:
        """List the pieces anew if groups or tensors have changed since: a load replaces groups."""
        groups = list(optimizer.param_groups)
        if isinstance(optimizer, Segmented) and optimizer.inner is not None:
            groups += optimizer.inner.param_groups
            # Inner groups, which the pieces name, follow the schedule inside the step only.
            optimizer.groups_by_name()
        seen = [tensor for group in groups for tensor in (group, *group["params"])]
        # By identity, and of objects that are held here: an id may be given to another one later.
        if list(map(id, seen)) != list(map(id, self._seen)):
            self._seen = seen
            if not self._sharder.layout.engine_steps:
                self._list_pieces()

    def _before(self, optimizer: Optimizer, args: Any = (), kwargs: Any = None) -> Any:
        if not self._armed or self._failure is not None:
            return None
        given = dict(kwargs or {})
        closure = given.pop("closure", None) or (args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._guard(lambda: self._take(optimizer))
            return None
        # The gradients of this step come with the closure, which the step calls.
        pending = [optimizer]

        def measured() -> Any:
            loss = closure()
            # Some call it several times in a step: weights have moved by the second.
            while pending and self._failure is None:
                self._guard(partial(self._take, pending.pop()))
            return loss

        return (args[0], measured, *args[2:]), given

    def _after(self, *_: Any) -> None:
        if self._copies and self._failure is None:
            self._guard(self._compare)
        # Here, before the next sub-group of ZeRO-3 is stepped: copies take memory.
        self._copies = {}

    def _take(self, optimizer: Optimizer) -> None:
        """Measure what is about to be stepped, and copy its weights."""
        self._refresh(optimizer)
        # DeepSpeed steps one group or sub-group at a time: the others' gradients are not theirs
        # yet. A second call before ``read`` finds everything measured.
        held = groups_by_tensor(optimizer).keys() - self._measured
        self._stepping = [p for p in self._pieces if id(p.owner) in held]
        owners = {id(p.owner): p.owner for p in self._stepping}
        if not owners:
            return
        # One call copies all tensors: times 1 changes no bit.
        copies = torch._foreach_mul([local(owner) for owner in owners.values()], 1)
        self._copies = dict(zip(owners, copies, strict=True))
        self._measured |= owners.keys()
        gradients: dict[int, Tensor] = {}
        for key, owner in owners.items():
            if owner.grad is not None:
                gradients[key] = local_gradient(owner)
        self._count(self._stepping)
        self._add(_GRADIENT, gradients)
        self._add(_WEIGHT, self._copies)

    def _compare(self) -> None:
        """Measure what the step has changed."""
        owners = {id(p.owner): p.owner for p in self._stepping}
        # The owners' storage may have moved, so it is asked for anew.
        torch._foreach_sub_(
            list(self._copies.values()), [local(owners[key]) for key in self._copies]
        )
        self._add(_UPDATE, self._copies)

    def _count(self, pieces: Iterable[Piece]) -> None:
        """Add elements, and elements times rate, to the cells."""
        rates: dict[int, float] = {}
        places: list[int] = []
        sums: list[tuple[float, float]] = []
        for piece in pieces:
            group = piece.group
            if id(group) not in rates:
                rates[id(group)] = float(group[LR])
            share = piece.numel / piece.replicas
            places.append(self._row[piece.name])
            sums.append((share, rates[id(group)] * share))
        found = torch.tensor(sums, dtype=torch.float64)
        self._table[:, : _RATE + 1].index_add_(0, torch.tensor(places), found)

    def _add(self, column: int, tensors: Mapping[int, Tensor]) -> None:
        """Add the squared norms of slices to their cells.

        Args:
            column: Of the table.
            tensors: By the id of the owner that each is laid out as; local.
        """
        chunks: list[Tensor] = []
        places: list[int] = []
        weights: list[float] = []
        for piece in self._stepping:
            tensor = tensors.get(id(piece.owner))
            if tensor is None:
                continue
            # Most are whole tensors, which need no view.
            part = tensor if piece.numel == tensor.numel() else piece.of(tensor)
            parts = [part] if piece.numel <= _CHUNK else torch.split(part.reshape(-1), _CHUNK)
            chunks += parts
            places += [self._row[piece.name]] * len(parts)
            weights += [1.0 / piece.replicas] * len(parts)
        if chunks:
            squares = _norms(chunks).square() * torch.tensor(weights, dtype=torch.float64)
            self._table[:, column].index_add_(0, torch.tensor(places), squares)

    def _reading(self, sums: list[float]) -> Reading:
        found: dict[Cell, CellReading] = {}
        for number, (cell, size) in enumerate(self._sizes.items()):
            row = sums[5 * number : 5 * number + 5]
            count = row[_COUNT]
            # Of layouts that do not know how many ranks hold a copy, the elements tell it.
            once = size / count if count else math.nan
            found[cell] = CellReading(
                lr=row[_RATE] / count if count else math.nan,
                grad_norm=math.sqrt(row[_GRADIENT] * once),
                weight_norm=math.sqrt(row[_WEIGHT] * once),
                update_norm=math.sqrt(row[_UPDATE] * once),
            )
        return Reading(cells=found)


def _norms(tensors: list[Tensor]) -> Tensor:
    """The norm of each, float64 on the CPU: one transfer per device and dtype."""
    kinds: dict[tuple[torch.device, bool], list[int]] = {}
    for number, tensor in enumerate(tensors):
        kind = tensor.device, tensor.dtype == torch.float64
        kinds.setdefault(kind, []).append(number)
    found = torch.empty(len(tensors), dtype=torch.float64)
    for (_, double), numbers in kinds.items():
        # The sums of 16-bit tensors are made in float32.
        dtype = torch.float64 if double else torch.float32
        norms = torch._foreach_norm([tensors[number] for number in numbers], 2, dtype=dtype)
        found[numbers] = torch.stack(norms).double().cpu()
    return found


def _torch_optimizer(optimizer: Any) -> Optimizer:
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"Invalid optimizer={type(optimizer).__name__}: its steps cannot be watched. Give the"
            " torch.optim.Optimizer that is stepped, or train without metrics per cell."
        )
    return optimizer


def _written(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
