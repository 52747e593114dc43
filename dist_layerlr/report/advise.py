"""What the metrics of a run say about its rates: which parts move far more or less than the rest.

Cells are pooled over component and third of the depth: a single block is too noisy, and a single
tensor says nothing of its neighbours. In each measured row a pool is compared with the median of
the others in that row, so that the schedule, the clipping and the state of the run cancel out; over
the rows the median of these comparisons counts, and their spread says how sure it is.

The scales of norms start at 1 and matrices near 0, so that an equal rate moves them unequally far:
norms are compared with norms. Nothing is applied.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_layerlr.errors import ConfigError
from dist_layerlr.plan.diff import PLAN_FILE, Rows, read_rows
from dist_layerlr.plan.entries import cell_name
from dist_layerlr.report.page import read_metrics

METRICS = "metrics.jsonl"
FAR = 3.0
"""Times the rest, or a part of it, that is far. Parts of sound runs differ by less than that only
after pooling: see docs/steering.md."""
ROWS = 8
"""Measured rows below which nothing is said."""
_YOUNG = 10
"""One in so many rows is left out at the beginning: the optimizer's moments are young."""
_SIGMA = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
_MEDIAN = 1.2533
"""Standard error of its median over that of its mean: the root of pi/2."""
THIRDS = ("first third", "middle third", "last third")
OUTSIDE = "outside blocks"
_ALONE = "norm"
"""The component that is compared with itself only."""
Key = tuple[str, str]
"""(component, third)."""
MORE, LESS, UNSURE, ALIKE = "far more", "far less", "unsure", "alike"


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A quantity of one pool over that of the others in the same row, over all rows."""

    times: float
    """Median over the rows."""
    low: float
    high: float
    """Two standard errors of that median below and above, rows that resemble their neighbours
    counted as fewer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """A component in a third of the depth, over the rows that were used."""

    component: str
    third: str
    ratio: float
    """Update norm over weight norm in one step, the median over the rows."""
    moves: Compared
    """That ratio, compared."""
    gradient: Compared | None
    """Gradient norm per root of the number of elements, compared; None: there were zeros."""
    rows: int
    verdict: str
    blocks: Mapping[str, tuple[int, ...]]
    """{stack: blocks}; empty outside blocks."""

    @property
    def change(self) -> bool:
        """Whether another rate is proposed."""
        if self.verdict == MORE:
            return True
        # Where little arrives, a higher rate would multiply little, or noise.
        starved = self.gradient is not None and self.gradient.times <= self.moves.times
        return self.verdict == LESS and not starved and self.gradient is not None


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What was found, and on which rows it rests."""

    pools: tuple[Pool, ...]
    steps: tuple[int, ...]
    """Of the rows that were used."""
    measured: int
    """Rows with cells, used or not."""
    why_fewer: str
    """Why not all of them were used."""
    left_out: tuple[str, ...]
    """Pools that could not be compared, with the reason."""
    stacks: tuple[str, ...]
    """All stacks of blocks."""
    components: tuple[str, ...]

    @property
    def enough(self) -> bool:
        """Whether there are rows enough to say anything, and parts to compare."""
        return len(self.steps) >= ROWS and bool(self.pools)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Point:
    """One pool in one row."""

    ratio: float
    gradient: float
    rate: float


@dataclass(slots=True)
class _Members:
    """What a pool consists of."""

    cells: set[str]
    numel: int
    blocks: dict[str, set[int]]


def gather(folder: Path, network: str | None = None, *, far: float = FAR) -> Evidence:
    """Read a run, and compare its pools.

    Args:
        folder: of the run.
        network: of a run that trains several: which one.
        far: how many times the rest, or which part of it, is far.

    Raises:
        ConfigError: no run there, several networks and none named, or nothing measured per cell.
    """
    rows = read_metrics(folder / METRICS)
    if not rows:
        raise ConfigError(
            f"{str(folder)!r} holds no {METRICS} with rows of steps: give the folder of a run."
        )
    known = sorted({row["network"] for row in rows if "network" in row})
    if known and network not in known:
        raise ConfigError(
            f"The run in {str(folder)!r} trains {', '.join(known)}: name one with --network."
        )
    rows = [row for row in rows if row.get("network") == network]
    measured = [row for row in rows if row.get("cells")]
    if not measured:
        raise ConfigError(
            f"No row of {str(folder / METRICS)!r} has cells: nothing was measured by component and"
            " depth. Train with --set per_layer_lr.log_grad_norms=true (every train.cells_every"
            " steps, 10 by default), and ask again."
        )
    plan = read_rows(folder / network if network else folder)
    if plan is None:
        raise ConfigError(f"{str(folder)!r} holds no {PLAN_FILE}: give the folder of a run.")
    if len(_members(plan)) == 1:
        raise ConfigError(
            f"The run in {str(folder)!r} has one cell for all parameters: per_layer_lr was off."
            " Train with --set per_layer_lr.enabled=true, all rates of component_lr equal to"
            " learning_rate, and depth_strategy=flat, which trains the same."
        )
    return compare(measured, plan, far=far)


def compare(measured: Sequence[Mapping[str, Any]], plan: Rows, *, far: float = FAR) -> Evidence:
    """Compare the pools of measured rows.

    Args:
        measured: rows of metrics.jsonl with cells, in order.
        plan: the rows of the run's plan.json.
        far: how many times the rest, or which part of it, is far.
    """
    # The last step of many schedules moves nothing.
    measured = [row for row in measured if row.get("lr_factor") != 0]
    members = _members(plan)
    table = [_points(row, members) for row in measured]
    first, why = _first_used(measured, table)
    used = table[first:]
    steps = tuple(int(row["step"]) for row in measured[first:])
    pools: list[Pool] = []
    left_out: list[str] = []
    for key in members:
        mine = [row[key] for row in used if key in row]
        # Every row counts or none: a pool that is measured now and then is compared with itself.
        if len(mine) < len(used) or not mine:
            left_out.append(f"{key[0]}, {key[1]}: held still, or all its weights were 0")
            continue
        others = _others(key, used)
        if not others:
            left_out.append(f"{key[0]}, {key[1]}: nothing to compare it with")
            continue
        pools.append(_pool(key, members[key], used, others, far))
    return Evidence(
        pools=tuple(pools),
        steps=steps,
        measured=len(measured),
        why_fewer=why,
        left_out=tuple(left_out),
        components=tuple(dict.fromkeys(component for component, _ in members)),
        stacks=tuple(dict.fromkeys(stack for pool in members.values() for stack in pool.blocks)),
    )


def third_of(block: int | None, blocks: int | None) -> str:
    """The third of the depth in which a block lies."""
    if block is None:
        return OUTSIDE
    return THIRDS[min(2, 3 * block // max(1, blocks or 1))]


def _members(plan: Rows) -> dict[Key, _Members]:
    """The pools of a plan, in its order."""
    # Plans of other programs need not say how many blocks there are.
    last: dict[str, int] = {}
    for row in plan.values():
        if row["stack"] is not None:
            last[row["stack"]] = max(last.get(row["stack"], 0), row["block"])
    found: dict[Key, _Members] = {}
    for row in plan.values():
        stack, block, component = row["stack"], row["block"], row["component"]
        count = None if stack is None else row.get("blocks") or last[stack] + 1
        pool = found.setdefault(
            (component, third_of(block, count)), _Members(cells=set(), numel=0, blocks={})
        )
        pool.cells.add(cell_name((stack, block, component)))
        pool.numel += row["numel"]
        if stack is not None:
            pool.blocks.setdefault(stack, set()).add(block)
    return found


def _points(row: Mapping[str, Any], members: Mapping[Key, _Members]) -> dict[Key, _Point]:
    """The pools of one row; those that did not move are left out."""
    found: dict[Key, _Point] = {}
    for key, pool in members.items():
        rates: list[float] = []
        update = weight = gradient = 0.0
        for cell in pool.cells:
            lr, norm, size, ratio = (row["cells"].get(cell) or [None] * 4)[:4]
            if None in (lr, norm, size):
                continue
            rates.append(lr)
            gradient += norm**2
            weight += size**2
            # Null where all weights of the cell were 0: what it moved is not known.
            update += (size * (ratio or 0.0)) ** 2
        if rates and max(rates) > 0 and update > 0 and weight > 0:
            per_element = math.sqrt(gradient / max(1, pool.numel))
            moved = math.sqrt(update / weight)
            found[key] = _Point(ratio=moved, gradient=per_element, rate=statistics.fmean(rates))
    return found


def _first_used(
    measured: Sequence[Mapping[str, Any]], table: Sequence[Mapping[Key, _Point]]
) -> tuple[int, str]:
    """The first row that counts, and why not an earlier one."""
    young = math.ceil(len(table) / _YOUNG) if len(table) > ROWS else 0
    why = "the optimizer was young in those before" if young else ""
    last = _planned(measured[-1], table[-1]) if table else {}
    for number in range(len(table) - 1, young - 1, -1):
        now = _planned(measured[number], table[number])
        for key in now.keys() & last.keys():
            # Six digits are written.
            if not math.isclose(now[key], last[key], rel_tol=1e-3):
                return number + 1, "rates were changed on the way, and only the last ones count"
    return young, why


def _planned(row: Mapping[str, Any], points: Mapping[Key, _Point]) -> dict[Key, float]:
    """The rates of a row without the schedule."""
    factor = row.get("lr_factor") or 1.0
    return {key: point.rate / factor for key, point in points.items()}


def _others(key: Key, used: Sequence[Mapping[Key, _Point]]) -> list[Key]:
    """The pools that one is compared with: those that are in every row, of its kind."""
    found: list[Key] = []
    for other in used[0] if used else ():
        same = (other[0] == _ALONE) == (key[0] == _ALONE)
        if other != key and same and all(other in row for row in used):
            found.append(other)
    return found


def _pool(
    key: Key,
    members: _Members,
    used: Sequence[Mapping[Key, _Point]],
    others: Sequence[Key],
    far: float,
) -> Pool:
    moves = _compared(
        (row[key].ratio, statistics.median(row[o].ratio for o in others)) for row in used
    )
    gradient = _compared(
        (row[key].gradient, statistics.median(row[o].gradient for o in others)) for row in used
    )
    assert moves is not None, "pools that did not move have no points"
    blocks: dict[str, tuple[int, ...]] = {}
    for stack, numbers in members.blocks.items():
        blocks[stack] = tuple(sorted(numbers))
    return Pool(
        component=key[0],
        third=key[1],
        ratio=statistics.median(row[key].ratio for row in used),
        moves=moves,
        gradient=gradient,
        rows=len(used),
        verdict=_verdict(moves, far),
        blocks=blocks,
    )


def _verdict(moves: Compared, far: float) -> str:
    if moves.low >= far:
        return MORE
    if moves.high <= 1 / far:
        return LESS
    return UNSURE if moves.times >= far or moves.times <= 1 / far else ALIKE


def _compared(pairs: Iterable[tuple[float, float]]) -> Compared | None:
    """Compare by logarithms: three times as much is as far as a third. None where one is 0."""
    logs: list[float] = []
    for mine, rest in pairs:
        if mine <= 0 or rest <= 0:
            return None
        logs.append(math.log(mine / rest))
    middle = statistics.median(logs)
    spread = _SIGMA * statistics.median(abs(value - middle) for value in logs)
    error = 2 * _MEDIAN * spread / math.sqrt(_independent(logs))
    return Compared(
        times=math.exp(middle), low=math.exp(middle - error), high=math.exp(middle + error)
    )


def _independent(values: Sequence[float]) -> float:
    """How many independent values have the spread of the median of these, which follow in time."""
    mean = statistics.fmean(values)
    apart = [value - mean for value in values]
    total = sum(value * value for value in apart)
    if total == 0 or len(values) < 3:
        return float(len(values))
    shared = sum(a * b for a, b in zip(apart, apart[1:], strict=False)) / total
    shared = min(max(shared, 0.0), 0.95)
    return max(1.0, len(values) * (1 - shared) / (1 + shared))
