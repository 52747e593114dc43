"""Step a copy of a scheduler through the run, and find where it leaves the plan.

Right is one multiplier in [0, 1] for all planned rates at every step, the one that ``lr /
initial_lr`` reads; anything else trains some names at rates that nobody planned.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dist_layerlr.optim.groups import INITIAL_LR, LR, NAME
from dist_layerlr.optim.rehearsal import StandIn, is_scheduler

SHORTEST, LONGEST = 100, 10_000
"""Steps of a simulation whose length nobody told."""
_GROUP_STEPS = 150_000
"""Steps times groups that it may cost: a second, and for 144 groups 1,000 steps."""
_DROPS = 8
"""A scheduler that waits for a metric is simulated until it has had time to react so often."""
TOLERANCE = 1e-7
"""Relative, as ``verify`` compares."""
_TOLERANCE_OF_TENSORS = 1e-4
"""A rate in a float32 tensor is rounded at every step."""
_NOTHING = 1e-30
_COUNTS = ("epoch", "step", "iter", "num", "update", "batch")
"""Parts of the name of a ``step`` argument that counts; any other is a metric."""


class Impossible(Exception):
    """Why a scheduler cannot be simulated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """How far a simulation goes."""

    certain: int
    """Up to this step the run goes on for sure: whatever is wrong there is wrong."""
    total: int
    ends: frozenset[int] = frozenset()
    """Steps at which the run may be over: what a scheduler does behind its end is no fault."""

    def may_be_over(self, number: int) -> bool:
        """Whether a scheduler need not go on until this step."""
        near = (number - 1, number, number + 1)
        return number > 1 and (number > self.certain or not self.ends.isdisjoint(near))


def run_of(
    scheduler: Any, numbers: set[int], steps: int | None, by_metric: bool, groups: int
) -> Run:
    """How long to simulate a scheduler, from where it stands.

    Args:
        scheduler: live.
        numbers: in its settings; the longest is taken for the length of its run.
        steps: what the caller says.
        by_metric: it waits for a metric, so the numbers are its patience.
        groups: of its optimizer.
    """
    if steps is not None:
        return Run(certain=steps, total=steps)
    most = min(LONGEST, max(1000, _GROUP_STEPS // max(1, groups)))
    longest = max(numbers, default=SHORTEST)
    if by_metric:
        drops = _DROPS * (1 + max(numbers, default=10))
        return Run(certain=drops, total=min(drops, most))
    done = 0
    # torch and transformers count in the first, DeepSpeed in the second, from -1.
    for name in ("last_epoch", "last_batch_iteration"):
        stands = getattr(scheduler, name, 0)
        done = max(done, stands) if isinstance(stands, int) else done
    return Run(
        certain=max(0, longest - done),
        # Twice the length: restarts, and schedules that rise again behind their end, show.
        total=min(most, max(SHORTEST, 2 * longest)),
        ends=frozenset(number - done for number in numbers if number > done),
    )


def stepper(scheduler: Any, trend: float) -> tuple[Callable[[int], None], bool]:
    """How to step this scheduler, and whether it waits for a metric.

    ``step()``, ``step(epoch)``, ``step(metric)``, and beside it timm's ``step_update(number)``.
    ``trend`` is what a metric grows by.
    """
    wanted = scheduler
    # Accelerate's wrapper takes `*args` and hands them on: what is needed, the scheduler inside
    # says.
    while _takes_anything(wanted.step) and is_scheduler(getattr(wanted, "scheduler", None)):
        wanted = wanted.scheduler
    parameters = inspect.signature(wanted.step).parameters
    needed = [
        name
        for name, p in parameters.items()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if len(needed) > 1:
        raise Impossible(f"its step() wants {', '.join(needed)}: it cannot be simulated")
    counts = bool(needed) and _is_count(needed[0])
    optional = {name for name in parameters if "metric" in name.lower()}.difference(needed)
    update = getattr(scheduler, "step_update", None)

    def step(number: int) -> None:
        metric = 1.0 + trend * number
        # timm's are told of updates and of epochs, and heed one of them by a setting of their own.
        if callable(update):
            update(number)
        if not needed:
            scheduler.step()
        elif counts:
            # timm's plateau takes its metric beside the epoch, as an option.
            scheduler.step(number, **dict.fromkeys(optional, metric))
        else:
            scheduler.step(metric)

    return step, bool(needed) and not counts


def _takes_anything(step: Callable[..., Any]) -> bool:
    parameters = inspect.signature(step).parameters.values()
    return any(p.kind is p.VAR_POSITIONAL for p in parameters)


def _is_count(name: str) -> bool:
    return len(name) == 1 or any(part in name.lower() for part in _COUNTS)


def first_difference(
    scratch: StandIn,
    planned: Sequence[float],
    step: Callable[[int], None],
    run: Run,
    reads_initial: bool,
) -> str | None:
    """Step to the end of the run; what differs first, and when.

    ``reads_initial``: the multiplier will be read as ``lr / initial_lr``.
    """
    tensors = any(isinstance(group[LR], Tensor) for group in scratch.param_groups)
    tolerance = _TOLERANCE_OF_TENSORS if tensors else TOLERANCE
    for number in range(run.total + 1):
        # Number 0 is what the constructor has written: most schedulers step once in it.
        if number:
            try:
                step(number)
            except Exception as error:
                # OneCycleLR raises behind its last step, which no run takes.
                if run.may_be_over(number):
                    return None
                return f"at step {number} it cannot go on ({type(error).__name__}: {error})"
        rates = [float(group[LR]) for group in scratch.param_groups]
        # A linear decay goes on below 0 behind its end, where nobody trains.
        if min(rates) < 0.0 and run.may_be_over(number):
            return None
        found = _difference(scratch, planned, rates, tolerance)
        if found is None and reads_initial:
            found = _rewritten(scratch, planned)
        if found is not None:
            return f"at step {number} {found}" if number else f"as it stands {found}"
    return None


def _difference(
    scratch: StandIn, planned: Sequence[float], rates: Sequence[float], tolerance: float
) -> str | None:
    """The first group that one multiplier in [0, 1] does not explain."""
    # A group that is held still, at rate 0, shows no multiplier.
    first = next((number for number, wanted in enumerate(planned) if wanted > 0.0), 0)
    factor = rates[first] / planned[first] if planned[first] > 0.0 else 0.0
    for number, (wanted, rate) in enumerate(zip(planned, rates, strict=True)):
        if not close(rate, wanted * factor, tolerance):
            one = _told(scratch, first, planned[first], rates[first])
            other = _told(scratch, number, wanted, rate)
            return f"it does not keep the planned ratios: {one}, {other}"
    if not 0.0 <= factor <= 1.0 + tolerance:
        told = _told(scratch, first, planned[first], rates[first])
        return f"it leaves [0, 1], where a schedule's multiplier lies: {told}"
    return None


def _rewritten(scratch: StandIn, planned: Sequence[float]) -> str | None:
    for group, wanted in zip(scratch.param_groups, planned, strict=True):
        initial = float(group.get(INITIAL_LR, wanted))
        if not close(initial, wanted):
            return (
                f"it writes initial_lr={initial:g} into group {group_name(group)}, planned at"
                f" {wanted:g}: its multiplier can no longer be read"
            )
    return None


def close(found: float, wanted: float, tolerance: float = TOLERANCE) -> bool:
    """Whether two rates are one, but for rounding; a planned 0 stays 0."""
    if abs(found) < _NOTHING and abs(wanted) < _NOTHING:
        return True
    return math.isclose(found, wanted, rel_tol=tolerance, abs_tol=0.0)


def group_name(group: Mapping[str, Any]) -> str:
    """What people call a parameter group."""
    return repr(group[NAME]) if NAME in group else "without a name"


def _told(scratch: StandIn, number: int, planned: float, rate: float) -> str:
    group = scratch.param_groups[number]
    name = repr(group[NAME]) if NAME in group else str(number)
    times = f" (x {rate / planned:.6g})" if planned else ""
    return f"group {name} is planned at {planned:g} and would train at {rate:g}{times}"
