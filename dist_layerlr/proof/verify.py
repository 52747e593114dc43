"""The proof: on every rank, each name is stepped once, live, whole, at its planned rate."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from torch import nn

from dist_layerlr.optim.groups import UNKNOWN, WEIGHT_DECAY
from dist_layerlr.optim.readback import (
    LiveParam,
    factor_in_force,
    live_params,
    live_pieces,
    repeated,
)
from dist_layerlr.optim.routed import parts_of
from dist_layerlr.optim.timed import step_of
from dist_layerlr.optim.trial import Verdict, try_out
from dist_layerlr.plan.entries import Plan, PlanEntry, total_numel
from dist_layerlr.proof.current import current_problems
from dist_layerlr.proof.deep import deep_problems
from dist_layerlr.proof.elements import element_problems
from dist_layerlr.proof.steppers import by_algorithm, state_precision, stepper_problems
from dist_layerlr.ranks import (
    SHOWN,
    Problem,
    everyone,
    mismatch,
    together,
    world_size,
)
from dist_layerlr.sharders import Layout, Pieces, sharder_of
from dist_layerlr.sharders.distinct import distinct_names

Rate = Callable[[PlanEntry], float]
"""The rate that must be in force for a name."""
_ROUNDING = 1e-7
"""Relative; some optimizers keep their rate as a float32 tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What was verified."""

    sharder: str
    ranks: int
    parameters: int
    elements: int
    groups: int
    digest: str
    step_factor: float
    """The schedule's multiplier at which the rates were compared."""
    step: int | None = None
    """The optimizer step at which they were, where the plan has timings."""
    trial: str = ""
    """What the trial of the optimizer has shown, in words."""
    optimizers: Mapping[str, int] = field(default_factory=dict)
    """{class: parameters that it steps}."""
    state_precision: Mapping[str, str] = field(default_factory=dict)
    """{name: dtype of its optimizer state on this rank}; empty before the first step."""

    def line(self) -> str:
        """One line for the log."""
        scaled = "" if self.step_factor == 1.0 else f" x {self.step_factor:.6g} (schedule)"
        scaled += "" if self.step is None else f" at step {self.step}"
        return (
            f"[per_layer_lr] verified on {self.ranks} rank{'s' if self.ranks > 1 else ''}"
            f" ({self.sharder}): {self.parameters} parameters, {self.elements:,} elements, each"
            f" stepped once at its planned learning rate{scaled} and weight decay;"
            f" {self.trial}{self._stepped()}; plan {self.digest}"
        )

    def _stepped(self) -> str:
        """Which algorithm steps how many, where there are several; precision, where it differs."""
        parts = [f"{count} by {kind}" for kind, count in self.optimizers.items()]
        text = f"; stepped {', '.join(parts)}" if len(parts) > 1 else ""
        kinds = Counter(self.state_precision.values())
        if len(kinds) > 1:
            text += "; state in " + ", ".join(f"{kind} ({n})" for kind, n in sorted(kinds.items()))
        return text

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def verify(
    plan: Plan,
    model: nn.Module,
    optimizer: Any = None,
    *,
    factor: float | None = None,
    step: int | None = None,
    deep: bool = False,
    steps: int | None = None,
) -> Proof:
    """Compare the live optimizer with the plan on every rank. Collective: call it on all ranks.

    It needs no ``attach``: it audits a model and optimizer that anybody prepared.

    Args:
        plan: of this model.
        model: as it is trained: plain, DDP, FSDP1, FSDP2, or a DeepSpeed engine.
        optimizer: the one that is stepped; a DeepSpeed engine brings its own.
        factor: the schedule's multiplier that must be in force. None: the one that the live groups
            are at (``lr / initial_lr``), which must be one for all names and ranks and lie in
            [0, 1]; the proof and its log line say which it was.
        step: whose rates must be in force, under timings. None: the one the optimizer is told of.
        deep: read values, too: what several ranks hold must be equal on them, bit by bit (see
            ``mark_distinct`` for what is meant to differ), and no step may have been counted twice.
            It reads every parameter once; do it at the start and after a load.
        steps: optimizer steps done, which no counter may exceed, under ``deep``. None: counters
            are compared between ranks alone, because a name may be trained since earlier.

    Raises:
        PlanMismatch: on all ranks alike, naming the first ten parameters, the rank, the likely
            cause and its fix.
    """
    sharder = sharder_of(model)
    with together(plan.digest) as problems:
        # Nothing here is collective: a rank that fails meets the others at the end of the block.
        found = live_pieces(sharder, optimizer)
        live = live_params(found)
        expected = _expected_factor(plan, found, live, problems) if factor is None else factor
        at = _expected_step(plan, found, step, problems)
        # What changed in the model comes first: it is the cause of what follows.
        problems += current_problems(plan, found) + stepper_problems(plan, found)
        rate = partial(_rate, expected, at)
        problems += _local_problems(plan, found, live, rate, _default_decay(model, optimizer))
    _check_agreed(expected if factor is None else None, at)
    anyhow = plan.entries.keys() if sharder.layout.meshes else distinct_names(model, plan.entries)
    _refuse(element_problems(plan, found, live, anyhow))
    _refuse(deep_problems(model, sharder, found, steps) if deep else [])
    verdict = _check_trial(plan, found, sharder.layout)
    return Proof(
        sharder=sharder.layout.label,
        ranks=world_size(),
        parameters=len(plan.entries),
        elements=total_numel(plan.entries.values()),
        groups=len(plan.groups),
        digest=plan.digest,
        step_factor=expected,
        step=at,
        trial=verdict.line,
        **_steppers(found),
    )


def _steppers(found: Pieces) -> dict[str, Any]:
    """Who steps what, and in which precision its state is."""
    return {"optimizers": by_algorithm(found), "state_precision": state_precision(found)}


def _expected_step(
    plan: Plan, found: Pieces, step: int | None, problems: list[Problem]
) -> int | None:
    """The step whose rates must be live; None: no timing is in force, or nobody has begun.

    Rates show the plan until a schedule says which step it is, and no step is done before it has.
    """
    if not plan.timed:
        return None
    live = step_of(found.optimizer)
    if live is None:
        problems.append(("timing", "the plan has timings, which the optimizer's groups do not"))
    elif step is not None and step != live:
        problems.append(("timing", f"the optimizer is at step {live}, not {step}"))
    return live if live != UNKNOWN else step


def _rate(factor: float, step: int | None, entry: PlanEntry) -> float:
    """The rate that must be in force."""
    return entry.lr * factor if step is None else entry.lr_at(step, factor)


def _expected_factor(
    plan: Plan, found: Pieces, live: Mapping[str, LiveParam], problems: list[Problem]
) -> float:
    """The multiplier that the live groups are at; what is wrong with it joins ``problems``."""
    factor = factor_in_force(found)
    if not 0.0 <= factor <= 1.0 + _ROUNDING:
        problems.append(("factor", f"the groups are at {factor:g} x their initial_lr"))
        return 1.0  # No schedule does that: rates are compared with the plan itself.
    if factor == 0.0:
        problems += _schedule_problems(plan, live)
    return factor


def _refuse(problems: list[Problem]) -> None:
    """Raise problems that all ranks have found together."""
    # They come from a collective, with one result for all: every rank raises, or none does.
    if problems:
        raise mismatch(0, problems[:SHOWN], len(problems))


def _check_trial(plan: Plan, found: Pieces, layout: Layout) -> Verdict:
    """The optimizer trains what it is given as it would train whole parameters."""
    owners = [piece.owner for piece in found.pieces]
    verdict = try_out(
        found.optimizer, layout, owners, [entry.shape for entry in plan.entries.values()]
    )
    # Ranks have agreed on whether there is a fault: either all of them go on, or all enter here.
    if verdict.fault is not None:
        with together(plan.digest) as problems:
            text = f"{verdict.optimizer}, tried on {verdict.way}: {verdict.fault}"
            problems.append(("trial", text))
    return verdict


def _schedule_problems(plan: Plan, live: Mapping[str, LiveParam]) -> list[Problem]:
    """At a multiplier of 0 no live rate tells which one the schedule multiplies: compare that."""
    problems: list[Problem] = []
    for name, entry in plan.entries.items():
        initial = live[name].initial_lr if name in live else None
        if initial is not None and not math.isclose(initial, entry.lr, rel_tol=_ROUNDING):
            text = f"{name}: planned lr {entry.lr:.6g}, a schedule multiplies {initial:.6g}"
            problems.append(("lr", text))
    return problems


def _check_one_factor(factor: float) -> None:
    """Every rank must read the same multiplier; a scheduler may be stepped on some ranks only."""
    heard = everyone(factor)
    for failing, other in enumerate(heard):
        if not math.isclose(other, heard[0], rel_tol=_ROUNDING):
            text = f"the schedule is at {other:g} x the plan, on rank 0 at {heard[0]:g} x"
            raise mismatch(failing, [("factor", text)], 1)


def _check_agreed(factor: float | None, step: int | None) -> None:
    """What every rank has read for itself must be one for all; None was not read."""
    if factor is not None:
        _check_one_factor(factor)
    _check_one_step(step)


def _check_one_step(step: int | None) -> None:
    """Every rank must be at the same step, of which all rates are functions."""
    heard = everyone(step)
    for failing, other in enumerate(heard):
        if other != heard[0]:
            text = f"the optimizer is at step {other}, on rank 0 at {heard[0]}"
            raise mismatch(failing, [("timing", text)], 1)


def _default_decay(model: nn.Module, optimizer: Any) -> float:
    """The optimizer's own weight decay, for entries that the plan leaves to it."""
    live = getattr(model, "optimizer", None) if optimizer is None else optimizer
    # Engines and Accelerate keep the optimizer in `.optimizer`, and their wrappers may have no
    # defaults of their own.
    while live is not None:
        defaults = getattr(live, "defaults", None)
        if isinstance(defaults, dict) and WEIGHT_DECAY in defaults:
            return float(defaults[WEIGHT_DECAY])
        live = getattr(live, "optimizer", None)
    return 0.0


def _local_problems(
    plan: Plan, found: Pieces, live: Mapping[str, LiveParam], rate: Rate, default_decay: float
) -> list[Problem]:
    problems: list[Problem] = []
    routed = parts_of(found.optimizer)
    for name, entry in plan.entries.items():
        own = default_decay
        if routed is not None and entry.optimizer in routed.parts:
            own = routed.decay_of(entry.optimizer)
        if name not in live:
            problems.append(("not stepped", f"{name}: not stepped by the optimizer"))
        else:
            problems += _compare(entry, live[name], rate(entry), own)
    problems += [
        ("unplanned", f"{n}: stepped at lr {p.lr:g}, not in the plan")
        for n, p in live.items()
        if n not in plan.entries
    ]
    problems += [("repeated", f"{n}: stepped by two groups") for n in repeated(found)]
    if found.strangers:
        problems.append(
            (
                "not stepped",
                f"{found.strangers} tensors in the optimizer are no parameters of the model",
            )
        )
    return problems


def _compare(
    entry: PlanEntry, live: LiveParam, wanted: float, default_decay: float
) -> list[Problem]:
    problems: list[Problem] = []
    # No absolute tolerance: a rate of 0 is held still, and 1e-12 would not be.
    if not math.isclose(live.lr, wanted, rel_tol=_ROUNDING, abs_tol=0.0):
        problems.append(("lr", f"{entry.name}: planned lr {wanted:.6g}, live {live.lr:.6g}"))
    decay = default_decay if entry.weight_decay is None else entry.weight_decay
    # No schedule multiplies weight decay, so only a last digit may differ.
    if not math.isclose(live.weight_decay, decay, rel_tol=1e-9, abs_tol=0.0):
        problems.append(
            (
                "weight decay",
                f"{entry.name}: planned weight decay {decay:g}, live {live.weight_decay:g}",
            )
        )
    if entry.eps is not None and live.eps != entry.eps:
        problems.append(("eps", f"{entry.name}: planned eps {entry.eps:g}, live {live.eps}"))
    return problems
