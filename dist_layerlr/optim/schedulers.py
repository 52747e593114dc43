"""Refuse, before training, a scheduler that would not keep the plan's ratios.

Whoever wrote it and whatever it is called: a copy is stepped through the run, and what counts is
which rates it writes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from dist_layerlr import fields
from dist_layerlr.errors import ConfigError
from dist_layerlr.optim.groups import (
    INITIAL_LR,
    LR,
    STEP,
    default_lr,
    planned_rates,
    put_back,
    settings_of,
)
from dist_layerlr.optim.rehearsal import Copier, is_scheduler, nested, optimizer_of
from dist_layerlr.optim.schedule import RateDriver
from dist_layerlr.optim.simulate import (
    Impossible,
    close,
    first_difference,
    group_name,
    run_of,
    stepper,
)
from dist_layerlr.sharders.base import is_optimizer, live_optimizer

_TRENDS = (0.0, 1.0, -1.0)
"""A metric stays, rises or falls: for every scheduler that waits for one, it never improves, or
always."""
_ABSOLUTE = (
    *("eta_min", "min_lr", "min_lrs", "lr_min", "warmup_lr_init", "eps", "swa_lr"),
    "max_lrs",
)
"""Settings that hold rates, not ratios: an error shows them, nothing is decided by them."""
_DEFAULT_RATE = frozenset(("lr_init", "init_lr", "initial_lr"))
_ADVICE = (
    "Use PlanSchedule(optimizer, Schedule(...)), or follow(optimizer, make_scheduler), which takes"
    " any scheduler's absolute rates as ratios to the plan's"
)


def check_scheduler(scheduler: Any, *, steps: int | None = None) -> None:
    """Refuse a learning rate scheduler that does not multiply all planned rates by one number.

    A copy of it is stepped on a copy of its optimizer's groups, from where it stands; the scheduler
    and the optimizer stay as they are. A metric that it waits for is simulated as one that never
    improves, and as one that always does.

    Args:
        scheduler: of torch, transformers, diffusers, timm, DeepSpeed, Accelerate, or your own.
        steps: still to run. None: as the numbers in its settings suggest, at least 100 and at most
            10,000 (fewer with many groups). A scheduler that is stepped beyond its own end, or that
            does something only after so many steps, needs to be told.

    Raises:
        ConfigError: names the scheduler, the first step at which rates differ from the plan, and
            both rates; or says why it cannot be simulated.
    """
    if steps is not None:
        fields.integer(1)("steps", steps)
    problem = problem_of(scheduler, steps)
    if problem is not None:
        raise ConfigError(f"Invalid scheduler {_label(scheduler, steps)}: {problem}. {_ADVICE}.")


def torch_scheduler(scheduler: Any) -> LRScheduler | None:
    """The torch scheduler that this is, or that Accelerate has wrapped; None: something else.

    Ours is something else: it keeps no rates.
    """
    inner = getattr(scheduler, "scheduler", scheduler)
    ours = isinstance(inner, RateDriver)
    return inner if isinstance(inner, LRScheduler) and not ours else None


def problem_of(scheduler: Any, steps: int | None = None, base: float | None = None) -> str | None:
    """What a scheduler does to the plan; None: it keeps the ratios.

    Args:
        scheduler: any.
        steps: as in ``check_scheduler``.
        base: the rate that its one group is planned at, whatever its ``initial_lr`` says.
    """
    if not is_scheduler(scheduler):
        return (
            "it has no step() and cannot be simulated. Check the scheduler that prepare() or"
            " initialize() returns in its place"
        )
    optimizer = optimizer_of(scheduler)
    if optimizer is None:
        return "it shows no optimizer whose rates it writes, and cannot be simulated"
    if any(STEP in group for group in optimizer.param_groups):
        return _untold(scheduler)
    before = settings_of(optimizer)
    try:
        with warnings.catch_warnings():
            # The live scheduler warns of what is worth it; this is a rehearsal.
            warnings.simplefilter("ignore")
            found = _judged(scheduler, optimizer, steps, base)
    except Impossible as reason:
        found = str(reason)
    if put_back(optimizer, before):
        return (
            "a copy of it writes to the live optimizer (it reaches it in a way that cannot be"
            " copied), and cannot be simulated"
        )
    return found


def _untold(scheduler: Any) -> str | None:
    """Of a plan with timings: ours say which step it is, others write one factor for all names."""
    if isinstance(getattr(scheduler, "scheduler", scheduler), RateDriver):
        return None
    return "the plan has timings, and it does not say which step the optimizer is at"


def _judged(scheduler: Any, optimizer: Any, steps: int | None, base: float | None) -> str | None:
    inside = getattr(scheduler, "scheduler", None)
    if is_scheduler(inside):
        times = _inner_steps(scheduler)
        # Ours counts the optimizer's steps, however often it is called.
        if times > 1 and not isinstance(inside, RateDriver):
            return (
                f"it is stepped {times} times per optimizer step, once per process. Do not prepare"
                " it, or pass step_scheduler_with_optimizer=False"
            )
        if times == 0:
            # A shell: the engine steps what is in it (Accelerate with DeepSpeed).
            return problem_of(inside, steps, base)
    planned = [base] if base is not None else planned_rates(optimizer)
    found = _unplanned(optimizer, planned) if base is None else None
    for trend in _TRENDS:
        if found is not None:
            return found
        copier = _copied(scheduler)
        scratch = copier.stand_in_of(optimizer)
        step, by_metric = stepper(copier.copy(scheduler), trend)
        run = run_of(scheduler, copier.numbers, steps, by_metric, len(planned))
        found = _absolute_end(copier, optimizer) or first_difference(
            scratch, planned, step, run, base is None
        )
        if not by_metric:
            break
    if found is None and run.total < run.certain:
        # Too long to see its end: at least every part of it must be right from where it stands.
        for part in nested(scheduler):
            found = found or problem_of(part, steps, base)
    return found


def _copied(scheduler: Any) -> Copier:
    copier = Copier()
    try:
        copied = copier.copy(scheduler)
    except Exception as error:
        raise Impossible(f"it cannot be copied ({type(error).__name__}: {error})") from error
    if copied is scheduler:
        raise Impossible("it cannot be copied (slots, a finaliser or a module), nor simulated")
    return copier


def _inner_steps(scheduler: Any) -> int:
    """How often a wrapper steps what it wraps at one optimizer step."""
    copied = _copied(scheduler).copy(scheduler)
    step, _ = stepper(copied, 0.0)
    inner_step, calls = copied.scheduler.step, []

    def counted(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        inner_step(*args, **kwargs)

    copied.scheduler.step = counted
    try:
        step(1)
    except Exception as error:
        raise Impossible(f"it cannot be stepped ({type(error).__name__}: {error})") from error
    return len(calls)


def _unplanned(optimizer: Any, planned: Sequence[float]) -> str | None:
    """Whether the groups tell what a factor is relative to."""
    for group, wanted in zip(optimizer.param_groups, planned, strict=True):
        initial = group.get(INITIAL_LR)
        if initial is None and float(group[LR]) == 0.0:
            return (
                f"group {group_name(group)} stands at a rate of 0 and has no initial_lr: nobody can"
                " tell what is planned. Build the groups with attach or param_groups"
            )
        if initial is not None and not close(float(initial), wanted):
            return (
                f"group {group_name(group)} is planned at {wanted:g}, but its initial_lr is"
                f" {float(initial):g}: the scheduler or a load wrote it"
            )
    return None


def _absolute_end(copier: Copier, optimizer: Any) -> str | None:
    """A rate at which no group is, and from which the scheduler takes itself to decay.

    Its multiplier is then another one than it gives to a single group at a planned rate.
    """
    if default_lr(optimizer) is not None:
        return None
    for name, value in copier.rates:
        if name in _DEFAULT_RATE and value == live_optimizer(optimizer).defaults.get(LR):
            return (
                f"it measures its end against {name}={value:g}, the optimizer's default rate, at"
                " which no group is planned. Build the optimizer with attach, or with an lr that is"
                " planned, before the scheduler"
            )
    return None


def _label(scheduler: Any, steps: int | None) -> str:
    """The class, and the one inside it that is to blame where that can be told."""
    inside = getattr(scheduler, "scheduler", None)
    if is_scheduler(inside):
        return _label(inside, steps)
    blamed = [part for part in nested(scheduler) if problem_of(part, steps) is not None]
    return _named(scheduler) + (f" (its {_named(blamed[-1])})" if blamed else "")


def _named(scheduler: Any) -> str:
    """``CosineAnnealingLR(eta_min=0.0001)``: absolute rates are what mostly breaks ratios."""
    shown: list[str] = []
    for name in _ABSOLUTE:
        value = getattr(scheduler, name, None)
        if isinstance(value, (list, tuple)) and any(value):
            shown.append(f"{name}=[{', '.join(map('{:g}'.format, value[:3]))}]")
        elif isinstance(value, float) and value:
            shown.append(f"{name}={value:g}")
    name = type(scheduler).__name__
    return f"{name}({', '.join(shown)})" if shown else name


def rebase(scheduler: Any) -> None:
    """Give a torch scheduler, and those inside it, the rates of the plan in force.

    Its saved state brings back the old plan's base rates, in the old plan's order of groups.
    """
    for part in (scheduler, *nested(scheduler)):
        optimizer = getattr(part, "optimizer", None)
        if optimizer is None or not is_optimizer(optimizer) or isinstance(part, RateDriver):
            continue
        # Beside ``max_lrs``, which are absolute, base rates are no group's but the lower bound.
        if hasattr(part, "base_lrs") and not hasattr(part, "max_lrs"):
            part.base_lrs = [group[INITIAL_LR] for group in optimizer.param_groups]
        # get_last_lr() reports this until the next step.
        part._last_lr = [group[LR] for group in optimizer.param_groups]
