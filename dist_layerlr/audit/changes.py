"""What became of the groups' rates since the script gave them: flattened, changed, unread."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch.optim.lr_scheduler import LRScheduler

from dist_layerlr.ranks import Problem

_SAME = 1e-5
"""Relative; a schedule multiplies all groups by one number, up to rounding."""
_MULTIPLIERS = ("lr_scale", "lr_mult", "lr_multiplier", "lr_scale_factor")


def group_problems(
    kind: str, given: Sequence[Mapping[str, float]], groups: Sequence[Mapping[str, Any]]
) -> list[Problem]:
    """Compare the ratios between live groups with those between the groups as they were given.

    Args:
        kind: class of the optimizer.
        given: groups as the optimizer took them.
        groups: as they are.
    """
    # DeepSpeed removes empty groups.
    before = [group for group in given if group.get("params")]
    if len(before) != len(groups):
        before = list(given)
    asked = [group.get("lr", 0.0) for group in before]
    live = [float(group.get("lr", 0.0)) for group in groups]
    if len(asked) != len(live):
        if len(set(asked)) > 1 and len(set(live)) == 1:
            return [("flattened", f"{kind}: {_some(asked)} were given, all train at {live[0]:g}")]
        return []
    scales, scaled = [], []
    for group, lr in zip(before, asked, strict=True):
        scales.append(math.prod(group.get(key, 1.0) for key in _MULTIPLIERS))
        scaled.append(lr * scales[-1])
    uneven = len(set(scales)) > 1
    # A trainer of the project that writes such keys multiplies by them in its own schedule.
    if uneven and _proportional(scaled, live):
        return []
    if _proportional(asked, live):
        if not uneven:
            return []
        carried = set().union(*before)
        key = next(filter(carried.__contains__, _MULTIPLIERS))
        text = f"{kind}: groups carry {key!r} {_some(scales)}, which nothing reads"
        return [("unread", f"{text}: they train at {_some(live)}")]
    if len(set(live)) == 1:
        return [("flattened", f"{kind}: {_some(asked)} were given, all train at {live[0]:g}")]
    return [("changed", f"{kind}: {_some(asked)} were given, they train at {_some(live)}")]


def _proportional(given: Sequence[float], live: Sequence[float]) -> bool:
    ratios: list[float] = []
    # A group that was given lr 0 has no ratio; it must stay at 0.
    for a, b in zip(given, live, strict=True):
        if a > 0.0:
            ratios.append(b / a)
        elif b != 0.0:
            return False
    return not ratios or max(ratios) - min(ratios) <= _SAME * max(map(abs, ratios))


def _some(values: Sequence[float]) -> str:
    shown = [f"{value:g}" for value in dict.fromkeys(values)]
    return " / ".join(shown[:4]) + (" ..." if len(shown) > 4 else "")


class Schedules:
    """How far every scheduler of this process has come, against the steps that were done."""

    def __init__(self) -> None:
        self._first: WeakKeyDictionary[Any, tuple[int, int]] = WeakKeyDictionary()

    def problems(self, optimizers: Iterable[Any], done: int) -> list[Problem]:
        """Schedulers that advance more than once per optimizer step.

        Args:
            optimizers: what a scheduler may be built on.
            done: optimizer steps of this run.
        """
        known = [o for o in optimizers if o is not None]
        found: list[Problem] = []
        # torch keeps no list of schedulers, so live objects are searched. By type(), not
        # isinstance: that asks for `__class__`, which a lazy proxy may answer by an import.
        for scheduler in gc.get_objects():
            if not issubclass(type(scheduler), LRScheduler):
                continue
            held = getattr(scheduler, "optimizer", None)
            # The scheduler may have been built on Accelerate's or DeepSpeed's wrapper.
            inside = getattr(held, "optimizer", None)
            if not any(o is held or o is inside for o in known):
                continue
            # A resumed schedule has an earlier run's count: only what it gains here is compared.
            now = int(scheduler.last_epoch)
            before, at = self._first.setdefault(scheduler, (now, done))
            if done > at and now - before >= 2 * (done - at):
                times = (now - before) // (done - at)
                text = f"{type(scheduler).__name__} advances {times} times per optimizer step"
                found.append(("schedule", text))
        return found
