"""After a load: put the plan's rates back by name, and refuse checkpoints of another layout."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dist_layerlr.optim.groups import STEP, UNKNOWN, scale_lrs, write_group
from dist_layerlr.optim.readback import live_pieces
from dist_layerlr.optim.schedulers import check_scheduler, rebase
from dist_layerlr.optim.segmented import Segmented
from dist_layerlr.optim.timed import step_of
from dist_layerlr.plan.entries import Plan
from dist_layerlr.ranks import Problem, alike, together
from dist_layerlr.sharders import Pieces, sharder_of


def reapply(
    plan: Plan,
    model: nn.Module,
    optimizer: Any = None,
    *,
    factor: float = 1.0,
    step: int | None = None,
    scheduler: Any = None,
) -> None:
    """Write the plan's lr, initial_lr and weight decay into the live groups, by name. Collective.

    Call it after every load: a checkpoint puts the rates of its own plan there.

    Args:
        plan: in force.
        model: as it is trained.
        optimizer: the one that is stepped; a DeepSpeed engine brings its own.
        factor: the schedule's multiplier to put in force.
        step: the optimizer step that comes next, where the plan has timings. None: the one that the
            groups are at.
        scheduler: a torch scheduler that drives the groups. It keeps base rates of its own, and
            its next step would bring the old plan's back: it is given the plan's, and refused if it
            does not take them. PlanSchedule keeps none.

    Raises:
        PlanMismatch: on all ranks alike, when one group steps names with different planned rates.
        ConfigError: the scheduler would write other rates than the plan's at its next step.
    """
    chosen: dict[int, tuple[Any, Any]] = {}
    with together(plan.digest) as problems:
        found = live_pieces(sharder_of(model), optimizer)
        for piece in found.pieces:
            entry = plan.entries.get(piece.name)
            if entry is None:
                continue
            _, first = chosen.setdefault(id(piece.group), (piece.group, entry))
            if first.settings != entry.settings:
                text = (
                    f"{piece.name} and {first.name} share a group but have different planned rates"
                )
                problems.append(("layout", text))
    # Only now, when no rank has a problem, is anything written.
    _unshare_steps(found)
    at = _step_to_put(plan, found, step)
    for group, entry in chosen.values():
        write_group(group, entry, factor, at)
    if isinstance(found.optimizer, Segmented):
        # The outer group's multiplier is put on the inner groups again at every step.
        for group in found.optimizer.param_groups if at is not None else ():
            group[STEP] = at
        scale_lrs(found.optimizer, factor)
    if scheduler is not None:
        rebase(scheduler)
        alike(lambda: check_scheduler(scheduler))


def _step_to_put(plan: Plan, found: Pieces, step: int | None) -> int | None:
    if not plan.timed:
        return None
    live = step_of(found.optimizer) if step is None else step
    return UNKNOWN if live is None else live


def _unshare_steps(found: Pieces) -> None:
    """Give every owner a step counter of its own.

    DeepSpeed 0.19.8's universal load at stage 3 puts one tensor into the state of all sub-groups,
    and each counts it up.
    """
    seen: set[int] = set()
    owners = {id(p.owner): p.owner for p in found.pieces}
    for owner in owners.values():
        held = found.optimizer.state.get(owner, {}) if found.optimizer is not None else {}
        step = held.get("step")
        if isinstance(step, Tensor):
            if step.data_ptr() in seen:
                held["step"] = step.clone()
            seen.add(step.data_ptr())


def group_layout(plan: Plan, model: nn.Module, optimizer: Any = None) -> dict[str, Any]:
    """Describe which run of which parameter sits where in this rank's optimizer.

    JSON-ready; store it with a checkpoint.
    """
    found = live_pieces(sharder_of(model), optimizer)
    groups: dict[int, list[list[Any]]] = {}
    for piece in found.pieces:
        groups.setdefault(id(piece.group), []).append(
            [piece.name, piece.offset, piece.start, piece.numel]
        )
    return {"digest": plan.digest, "groups": list(groups.values())}


def check_group_layout(
    saved: dict[str, Any], plan: Plan, model: nn.Module, optimizer: Any = None
) -> None:
    """Refuse to load a positional checkpoint into another layout.

    Call it before the load, on all ranks.

    Raises:
        PlanMismatch: on all ranks alike, naming what moved.
    """
    with together(plan.digest) as problems:
        problems += _moved(saved["groups"], group_layout(plan, model, optimizer)["groups"])


def _moved(saved: list[list[Any]], live: list[list[Any]]) -> list[Problem]:
    problems: list[Problem] = []
    if len(live) != len(saved):
        problems.append(
            ("layout", f"the checkpoint has {len(saved)} groups, the live optimizer {len(live)}")
        )
    for number, (before, now) in enumerate(zip(saved, live, strict=False)):
        for old, new in zip(before, now, strict=False):
            if list(old) != list(new):
                problems.append(
                    ("layout", f"group {number}: the checkpoint has {old[0]} where {new[0]} is now")
                )
        if len(before) != len(now):
            problems.append(
                (
                    "layout",
                    f"group {number}: {len(before)} parameters in the checkpoint, {len(now)} now",
                )
            )
    return problems
