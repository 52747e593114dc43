"""Whole tensors from slices, each on one rank, and back: what a matrix optimizer needs.

Every rank tells once which elements of which name it holds. From that table all ranks derive the
same schedule: which rank owns which tensor, which rank sends which elements to it, and who gets
them back. One all-to-all gathers, one returns; nothing is gathered on every rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import compress

import torch
import torch.distributed as dist
from torch import Tensor

from dist_layerlr.errors import PlanMismatch
from dist_layerlr.ranks import transport_device

Range = tuple[int, int]
"""(first element, number of elements) of a flattened whole tensor."""
Held = Mapping[str, Sequence[Range]]
"""What one rank holds of each name."""
ROUND = 1 << 27
"""Elements that are under way at once, over all ranks: bounds the memory of buffers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Some elements of one tensor, on their way between two ranks."""

    name: str
    start: int
    numel: int


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Who owns which tensor in one round, and what travels."""

    table: Sequence[Held]
    """By rank."""
    sizes: Mapping[str, int]
    """{name: elements of the whole}, in the order in which all ranks pack them."""
    owners: Mapping[str, int]
    me: int
    """This rank's place in the table."""

    @cached_property
    def gathered(self) -> tuple[list[list[Segment]], list[list[Segment]]]:
        """(sent to each rank, received from each rank) on the way to the owners."""
        sent, received = _rows(len(self.table)), _rows(len(self.table))
        for name, size in self.sizes.items():
            owner = self.owners[name]
            # Sender and receiver walk the same names and runs in the same order, so elements travel
            # without a header that says what they are.
            for source, start, numel in cover(name, size, self.table, owner):
                segment = Segment(name=name, start=start, numel=numel)
                if source == self.me:
                    sent[owner].append(segment)
                if owner == self.me:
                    received[source].append(segment)
        return sent, received

    @cached_property
    def returned(self) -> tuple[list[list[Segment]], list[list[Segment]]]:
        """(sent to each rank, received from each rank) on the way back: to all that hold some."""
        sent, received = _rows(len(self.table)), _rows(len(self.table))
        for name in self.sizes:
            owner = self.owners[name]
            for place in range(len(self.table)) if owner == self.me else (self.me,):
                segments = [
                    Segment(name=name, start=start, numel=numel)
                    for start, numel in self.table[place].get(name, ())
                    if numel
                ]
                if owner == self.me:
                    sent[place] += segments
                if place == self.me:
                    received[owner] += segments
        return sent, received


@dataclass(kw_only=True)
class Exchange:
    """The schedules of one set of tensors, derived once for each set of names that is stepped."""

    table: Sequence[Held]
    sizes: Mapping[str, int]
    costs: Mapping[str, float]
    """Of computing on each whole: what owners are balanced by."""
    me: int
    """This rank's place in the table."""
    fixed: bool = False
    """Whether a name's owner must stay the same, because it keeps something of it."""
    elements_moved: int = 0
    """Sent by this rank to others since the start."""
    _known: dict[tuple[str, ...], list[Schedule]] = field(default_factory=dict)

    @cached_property
    def _owners(self) -> dict[str, int]:
        return balanced(self.costs, len(self.table))

    def rounds(self, names: tuple[str, ...]) -> list[Schedule]:
        """The schedules in which some names travel; the same list on all ranks."""
        if names not in self._known:
            owners = self._owners
            if not self.fixed:
                owners = balanced({name: self.costs[name] for name in names}, len(self.table))
            rounds: list[dict[str, int]] = [{}]
            total = 0
            for name in names:
                # A matrix that is larger than a round has one of its own.
                if rounds[-1] and total + self.sizes[name] > ROUND:
                    rounds.append({})
                    total = 0
                rounds[-1][name] = self.sizes[name]
                total += self.sizes[name]
            self._known[names] = []
            # Without names there is nothing to do, and no rank waits for another.
            for sizes in rounds if names else ():
                schedule = Schedule(table=self.table, sizes=sizes, owners=owners, me=self.me)
                self._known[names].append(schedule)
        return self._known[names]

    def agreed(self, active: Iterable[str], without: Iterable[str] = ()) -> tuple[str, ...]:
        """Names that any rank steps now. Collective.

        A rank that holds nothing of a tensor sees no gradient of it, and may own it all the same.

        Args:
            active: names that this rank has a gradient of.
            without: names of which it holds elements that have none.

        Raises:
            PlanMismatch: a name that is both, on whatever ranks. All of them raise it.
        """
        # MAX, not SUM: a byte for each name would count no more than 255 ranks.
        sets = set(active), set(without)
        flags = torch.tensor([[n in mine for n in self.sizes] for mine in sets], dtype=torch.uint8)
        if len(self.table) > 1:
            flags = flags.to(transport_device())
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        torn = tuple(compress(self.sizes, flags.prod(0).tolist()))
        if torn:
            raise PlanMismatch(
                f"{torn[0]}{f' and {len(torn) - 1} more' if len(torn) > 1 else ''}: some of its"
                " elements have a gradient and others have none, so the whole matrix cannot be"
                " stepped. Clear gradients on all ranks or on none; let the sharder reduce them."
            )
        return tuple(compress(self.sizes, flags[0].tolist()))

    def gather(
        self,
        schedule: Schedule,
        parts: Mapping[str, Sequence[tuple[int, Tensor]]],
        dtype: torch.dtype,
    ) -> dict[str, Tensor]:
        """Whole flat tensors of the names that this rank owns. Collective.

        What a rank holds as a whole is handed on as it was given, not copied.

        Args:
            schedule: of the round.
            parts: {name: (first element, flat tensor) of what this rank holds}.
            dtype: of all of them, on all ranks.
        """
        sent, received = schedule.gathered
        heard = self._swap(sent, received, parts, dtype)
        whole: dict[str, Tensor] = {}
        for segment, values in heard:
            size = schedule.sizes[segment.name]
            if segment.numel == size:
                whole[segment.name] = values  # whole already: it need not be put together
                continue
            if segment.name not in whole:
                whole[segment.name] = values.new_empty(size)
            whole[segment.name][segment.start : segment.start + segment.numel] = values
        return whole

    def give_back(
        self, schedule: Schedule, whole: Mapping[str, Tensor], dtype: torch.dtype
    ) -> list[tuple[Segment, Tensor]]:
        """What this rank holds of whole flat tensors, from their owners. Collective."""
        sent, received = schedule.returned
        parts = {name: [(0, values)] for name, values in whole.items()}
        return self._swap(sent, received, parts, dtype)

    def _swap(
        self,
        sent: Sequence[Sequence[Segment]],
        received: Sequence[Sequence[Segment]],
        parts: Mapping[str, Sequence[tuple[int, Tensor]]],
        dtype: torch.dtype,
    ) -> list[tuple[Segment, Tensor]]:
        me = self.me
        # What stays here does not travel.
        found = list(zip(sent[me], _values(sent[me], parts), strict=True))
        if len(sent) == 1:
            return found
        out: list[list[Tensor]] = []
        sizes: list[int] = []
        for place, (going, coming) in enumerate(zip(sent, received, strict=True)):
            travels = place != me
            out.append(_values(going, parts) if travels else [])
            sizes.append(_elements(coming) if travels else 0)
            self.elements_moved += _elements(going) if travels else 0
        inbox = _all_to_all(out, sizes, dtype)
        for of, row in enumerate(received):
            if of != me and row:
                pieces = torch.split(inbox[of], [s.numel for s in row])
                found += zip(row, pieces, strict=True)
        return found


def _elements(segments: Iterable[Segment]) -> int:
    return sum(segment.numel for segment in segments)


def _values(
    segments: Iterable[Segment], parts: Mapping[str, Sequence[tuple[int, Tensor]]]
) -> list[Tensor]:
    return [cut(segment, parts[segment.name]) for segment in segments]


def _rows(ranks: int) -> list[list[Segment]]:
    return [[] for _ in range(ranks)]


def _all_to_all(
    out: Sequence[Sequence[Tensor]], sizes: Sequence[int], dtype: torch.dtype
) -> list[Tensor]:
    """One flat tensor from each rank.

    Bytes travel: not every backend has every dtype.
    """
    device = transport_device()
    flat = [part.to(device) for row in out for part in row]
    # An empty list cannot be joined: this rank may have nothing for anybody.
    send = torch.cat(flat) if flat else torch.empty(0, dtype=dtype, device=device)
    heard = torch.empty(sum(sizes), dtype=dtype, device=device)
    width = dtype.itemsize
    lengths = [sum(part.numel() for part in row) * width for row in out]
    dist.all_to_all_single(
        heard.view(torch.uint8),
        send.view(torch.uint8),
        [size * width for size in sizes],
        lengths,
    )
    return list(torch.split(heard, list(sizes)))


def cut(segment: Segment, held: Sequence[tuple[int, Tensor]]) -> Tensor:
    """A segment's elements of the flat part that holds them."""
    for start, values in held:
        if start <= segment.start and segment.start + segment.numel <= start + values.numel():
            return values[segment.start - start : segment.start - start + segment.numel]
    raise AssertionError(segment)


def balanced(costs: Mapping[str, float], ranks: int) -> dict[str, int]:
    """An owner for each name: the most expensive first, each to the rank with the least to do."""
    loads = [0.0] * ranks
    owners: dict[str, int] = {}
    # Sorting is stable: equal costs stay in the order of names, which is the same on all ranks.
    for name in sorted(costs, key=lambda name: -costs[name]):
        owner = loads.index(min(loads))
        owners[name] = owner
        loads[owner] += costs[name]
    return owners


def cover(name: str, size: int, table: Sequence[Held], owner: int) -> list[tuple[int, int, int]]:
    """(rank, first element, elements) such that each element of a whole comes from one rank.

    From the owner itself where it holds a copy, else from holders in turn.

    Raises:
        PlanMismatch: elements that no rank holds. All ranks read one table, so all raise it.
    """
    at: dict[int, list[tuple[int, int]]] = {}
    for place, held in enumerate(table):
        for start, numel in held.get(name, ()):
            if numel:
                at.setdefault(start, []).append((place, start + numel))
    found: list[tuple[int, int, int]] = []
    position = 0
    while position < size:
        choices = at.get(position) or _around(at, position)
        if not choices:
            raise PlanMismatch(
                f"{name}: no rank holds its elements from {position} on, so the whole matrix cannot"
                " be put together. After deepspeed.initialize call bind(plan, engine); otherwise"
                " build the optimizer with attach after sharding."
            )
        # What the owner has need not travel; among other holders its number spreads the load.
        choice = choices[owner % len(choices)]
        source, end = next(filter(lambda held: held[0] == owner, choices), choice)
        end = min(end, size)
        found.append((source, position, end - position))
        position = end
    return found


def _around(at: Mapping[int, Sequence[tuple[int, int]]], position: int) -> list[tuple[int, int]]:
    """Runs that hold a position inside them: ranks that cut a tensor at other places."""
    found: list[tuple[int, int]] = []
    for start, choices in at.items():
        found += filter(lambda choice: start < position < choice[1], choices)
    return found
