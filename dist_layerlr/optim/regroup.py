"""Another plan of the same names under an optimizer that trains already."""

from __future__ import annotations

from torch import Tensor

from dist_layerlr.errors import ConfigError
from dist_layerlr.optim.fused import STEP
from dist_layerlr.optim.groups import INITIAL_LR, LR, NAME, OPTIMIZER, WEIGHT_DECAY, adopt
from dist_layerlr.optim.routed import rerouted
from dist_layerlr.optim.segmented import Segmented
from dist_layerlr.optim.views import counters_of_runs, merge_slices
from dist_layerlr.plan.entries import GroupKey, Plan
from dist_layerlr.ranks import Problem
from dist_layerlr.sharders import Pieces, Sharder
from dist_layerlr.sharders.base import ParamGroup, Slice

_OF_PLAN = frozenset(("params", LR, INITIAL_LR, NAME, OPTIMIZER, WEIGHT_DECAY))
"""What of a group is the plan's; the rest is the optimizer's own."""


def regroup_problems(plan: Plan, sharder: Sharder, found: Pieces) -> list[Problem]:
    """Why the groups of an optimizer cannot take the plan; nothing is changed, no rank is asked."""
    if isinstance(found.optimizer, Segmented):
        return _counter_problems(plan, found.optimizer)
    first: dict[int, str] = {}
    problems: list[Problem] = []
    for piece in found.pieces:
        if piece.name not in plan.entries:
            continue
        # An engine has laid its groups out flat: there the whole group is one tensor.
        place = id(piece.group) if sharder.layout.engine_steps else id(piece.owner)
        other = first.setdefault(place, piece.name)
        if plan.entries[other].settings != plan.entries[piece.name].settings:
            text = (
                f"{piece.name} and {other} are stepped in one piece, and are to have different"
                " rates: build the optimizer with attach(..., emission='segmented')"
            )
            problems.append(("layout", text))
    return problems


def regroup(plan: Plan, found: Pieces) -> None:
    """Put names whose planned rates part into groups of their own; state stays with its tensors.

    No rates are written: ``reapply`` does that.
    """
    if isinstance(found.optimizer, Segmented):
        _bind_anew(plan, found.optimizer)
        return
    key_of: dict[int, GroupKey] = {}
    for piece in found.pieces:
        if piece.name in plan.entries:
            key_of[id(piece.owner)] = plan.entries[piece.name].settings
    groups: list[ParamGroup] = []
    for group in found.optimizer.param_groups:
        groups += _parted(group, key_of)
    _rename(plan, groups, key_of)
    # In place: wrappers and schedulers hold on to the list.
    found.optimizer.param_groups[:] = groups
    adopt(plan, found.optimizer)


def _parted(group: ParamGroup, key_of: dict[int, GroupKey]) -> list[ParamGroup]:
    """A group as one for each planned rate in it; the first is the group itself."""
    parts: dict[GroupKey | None, list[Tensor]] = {}
    for param in group["params"]:
        parts.setdefault(key_of.get(id(param)), []).append(param)
    first, *others = parts.values() if parts else [[]]
    settings = {key: value for key, value in group.items() if key != "params"}
    group["params"] = first
    found = [group]
    for params in others:
        found.append({"params": params, **settings})
        for key, value in settings.items():
            # Some rates are tensors: two groups that shared one would share every change of it.
            if isinstance(value, Tensor):
                found[-1][key] = value.clone()
    return found


def _rename(plan: Plan, groups: list[ParamGroup], key_of: dict[int, GroupKey]) -> None:
    """Call each group what the plan calls it: planned rates are looked up by these names."""
    names = {plan.entries[spec.names[0]].settings: spec.name for spec in plan.groups}
    taken: dict[str, int] = {}
    for group in groups:
        key = key_of.get(id(group["params"][0])) if group["params"] else None
        if key is not None:
            name = names[key]
            count = taken[name] = taken.get(name, -1) + 1
            group[NAME] = f"{name}@{count}" if count else name


def _bind_anew(plan: Plan, optimizer: Segmented) -> None:
    """Cut a segmented optimizer's tensors anew, at the plan's groups."""
    before, counted = optimizer.groups_by_name(), _counted(optimizer)
    make = rerouted(optimizer._make, plan)
    # As a copy of it is brought to life: views and inner groups are made anew on the same tensors,
    # and find their state where it lies, on the outer ones.
    optimizer.__setstate__({**optimizer.__getstate__(), "_plan": plan, "_make": make})
    for row in optimizer._rows:
        if id(row.owner) in counted:
            # Counters alone are laid out by the views; all other state is by element.
            row.recount(counted[id(row.owner)], optimizer.state[row.owner])
    if optimizer.inner is None:
        return
    live: dict[int, ParamGroup] = {}
    for name, group in optimizer.groups_by_name().items():
        if id(group) not in live:
            live[id(group)] = group
            # What an optimizer keeps in its groups, such as a count of its own, goes on.
            for key, value in before[name].items():
                if key not in _OF_PLAN:
                    group[key] = value.clone() if isinstance(value, Tensor) else value


def _counted(optimizer: Segmented) -> dict[int, dict[int, float]]:
    """{id of an owner whose views count apart: {offset of a piece: how often it was stepped}}."""
    apart = {id(row.owner): row for row in optimizer._rows if row.apart}
    found: dict[int, dict[int, float]] = {}
    for piece in optimizer._slices or ():
        row = apart.get(id(piece.owner))
        held = optimizer.state.get(piece.owner, {}) if row is not None else {}
        if row is not None and piece.numel and STEP in held:
            steps = float(row.counter_at(piece.offset, held[STEP]))
            found.setdefault(id(piece.owner), {})[piece.offset] = steps
    return found


def _counter_problems(plan: Plan, optimizer: Segmented) -> list[Problem]:
    """Views that the plan would make of names that were not stepped equally often."""
    number: dict[str, int] = {}
    for place, spec in enumerate(plan.groups):
        number.update(dict.fromkeys(spec.names, place))
    pieces: dict[int, list[Slice]] = {}
    counted = _counted(optimizer)
    for piece in optimizer._slices or ():
        if piece.numel and id(piece.owner) in counted:
            pieces.setdefault(id(piece.owner), []).append(piece)
    problems: list[Problem] = []
    for owner, found in pieces.items():
        try:
            counters_of_runs(merge_slices(found, number), counted[owner])
        except ConfigError as error:
            problems.append(("layout", str(error)))
    return problems
