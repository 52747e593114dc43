"""Plan -> optimizer parameter groups, and the one place that writes a learning rate."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dist_layerlr.errors import ConfigError, PlanMismatch
from dist_layerlr.plan.entries import GroupSpec, Plan, PlanEntry
from dist_layerlr.plan.foreign import untimed
from dist_layerlr.plan.timing import Timing
from dist_layerlr.sharders.base import ParamGroup, live_optimizer
from dist_layerlr.sharders.model import live_parameters

LR = "lr"
# Torch saves it with the groups; a loaded one may be another plan's, hence ``reapply``.
INITIAL_LR = "initial_lr"
WEIGHT_DECAY = "weight_decay"
EPS = "eps"
# Unique per group, for people and logs. Groups are never matched by it: a plan may merge others.
NAME = "name"
OPTIMIZER = "optimizer"
"""Which of the plan's optimizers steps a group, where it names several."""
AVERAGE = "weight_average"
"""Entry of a tensor's state while a checkpoint is saved or loaded: see ``average.py``."""
TIMING = "timing"
"""When a group trains, as plain values (``Timing.row``); absent where it always does."""
STEP = "plan_step"
"""The optimizer step that a timed plan's groups are at; absent where no name has a timing."""
UNKNOWN = -1
"""Nobody has said yet which step it is."""
_PLANS: WeakKeyDictionary[Optimizer, Plan] = WeakKeyDictionary()
"""The plan of each optimizer whose groups `attach` made: what its groups are to be, whoever writes
another ``initial_lr`` into them."""


def param_groups(plan: Plan, model: nn.Module) -> list[ParamGroup]:
    """Build the optimizer's groups on the live parameters of a model.

    ``torch.optim.AdamW(param_groups(plan, model), weight_decay=0.01)``. Call it after FSDP or DDP
    has wrapped the model, and before ``deepspeed.initialize``.

    Returns:
        One dict per distinct (lr, weight decay): ``params``, absolute ``lr`` and ``initial_lr``, a
        unique ``name``, and ``weight_decay`` where the plan gives one. No group is empty; frozen
        parameters are in none.

    Raises:
        PlanMismatch: the model's trainable parameters are not those of the plan.
        ConfigError: the plan has timings, which no group can keep on its own.
    """
    untimed(plan, "A list of parameter groups")
    return build_groups(plan, {n: p for n, p in live_parameters(model).items() if p.requires_grad})


def build_groups(plan: Plan, live: Mapping[str, Tensor]) -> list[ParamGroup]:
    """The plan's groups on given tensors, ``{canonical name: what is stepped for it}``.

    Raises:
        PlanMismatch: the names are not those of the plan.
    """
    _check_same_names(plan, live)
    groups = [_group(spec, live) for spec in plan.groups]
    for group in groups if plan.timed else ():
        group[STEP] = UNKNOWN
    return groups


def split_by_mesh(group: ParamGroup) -> list[ParamGroup]:
    """One group per device mesh, all with the same settings.

    A foreach or fused call cannot mix DTensors of two meshes, or DTensors and plain tensors.
    """
    parts: dict[Any, list[Tensor]] = {}
    for param in group["params"]:
        mesh = param.device_mesh if isinstance(param, DTensor) else None
        parts.setdefault(mesh, []).append(param)
    # The first part keeps the plan's name; a name must stay unique for torch's state_dict.
    names = [group[NAME]] + [f"{group[NAME]}@{i}" for i in range(1, len(parts))]
    return [
        {**group, "params": params, NAME: name}
        for name, params in zip(names, parts.values(), strict=True)
    ]


def base_lr(plan: Plan) -> float:
    """The rate that stands for the plan where only one can be shown. Never 0."""
    settings = plan.config.per_layer_lr
    chosen = settings.default_lr if settings.enabled else plan.config.flat_lr
    return chosen or max((group.lr for group in plan.groups), default=1.0) or 1.0


def adopt(plan: Plan, optimizer: Any) -> None:
    """Tell an optimizer on the plan's groups which rate they are relative to.

    transformers' and diffusers' schedulers turn an absolute end (``lr_end``, ``min_lr``) into a
    ratio to the optimizer's default rate, which is the constructor's (0.001) unless somebody says.
    """
    if not isinstance(optimizer, Optimizer):
        return
    _PLANS[optimizer] = plan
    if not isinstance(optimizer.defaults.get(LR), Tensor):
        optimizer.defaults[LR] = base_lr(plan)


def built(make: Any, groups: Sequence[Mapping[str, Any]]) -> Any:
    """What a user's function builds from groups.

    Raises:
        ConfigError: it is no function, or returns no optimizer.
    """
    if not callable(make):
        raise ConfigError(
            f"Invalid make: a {type(make).__name__}. Give what builds the optimizer from groups:"
            " torch.optim.AdamW, or lambda groups: torch.optim.AdamW(groups, fused=True)."
        )
    # Asked before: a constructor writes its own defaults into the groups that it is given.
    planned = any(EPS in group for group in groups)
    optimizer = make(groups)
    if not hasattr(optimizer, "param_groups"):
        raise ConfigError(
            f"Invalid make: it returned a {type(optimizer).__name__}. Return the optimizer that it"
            " builds from the groups."
        )
    own = getattr(optimizer, "defaults", {}).get(EPS)
    if planned and not isinstance(own, float):
        raise ConfigError(
            f"Invalid width_scaling.eps: {type(optimizer).__name__} has no epsilon of Adam's kind"
            f" (its own is {own!r}). Leave width_scaling.eps out, or train with Adam or AdamW."
        )
    return optimizer


def default_lr(optimizer: Any) -> float | None:
    """The rate that an optimizer was told to be built for, and that absolute rates are relative to.

    None: nobody said it, or what was said (an ``lr=1.0`` that every group overrides) is no rate of
    this plan.
    """
    live = live_optimizer(optimizer)
    stated = getattr(live, "defaults", {}).get(LR)
    if stated is None:
        return None
    rates = planned_rates(live)
    if live in _PLANS or float(stated) in rates:
        return float(stated)
    fallback = inspect.signature(type(live)).parameters.get(LR)
    silent = fallback is not None and stated == fallback.default
    return None if silent or not min(rates) <= float(stated) <= max(rates) else float(stated)


def planned_rates(optimizer: Any) -> list[float]:
    """The planned rate of each group: the plan's, where it is known, else the ``initial_lr``."""
    live = live_optimizer(optimizer)
    plan = _PLANS.get(live) if isinstance(live, Optimizer) else None
    known = {spec.name: spec.lr for spec in plan.groups} if plan is not None else {}
    rates: list[float] = []
    for group in optimizer.param_groups:
        # ``split_by_mesh`` has put a number behind some names.
        name = str(group.get(NAME, ""))
        planned = known.get(name, known.get(name.rpartition("@")[0]))
        rates.append(float(group.get(INITIAL_LR, group[LR])) if planned is None else planned)
    return rates


def groups_by_tensor(optimizer: Any) -> dict[int, ParamGroup]:
    """{id of a tensor that an optimizer holds now: its group}."""
    return {id(p): group for group in optimizer.param_groups for p in group["params"]}


def settings_of(optimizer: Any) -> list[dict[str, Any]]:
    """A copy of every group without its parameters, for ``put_back``."""
    settings: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        settings.append(dict(group))
        del settings[-1]["params"]
        for key, value in group.items():
            if isinstance(value, Tensor):
                settings[-1][key] = value.clone()
    return settings


def put_back(optimizer: Any, settings: list[dict[str, Any]]) -> bool:
    """Write settings into the groups that they were read from; whether any had changed."""
    changed = False
    for group, before in zip(optimizer.param_groups, settings, strict=True):
        for key, value in before.items():
            live = group.get(key)
            if isinstance(live, Tensor) and isinstance(value, Tensor):
                changed |= not torch.equal(live, value)
                live.copy_(value)
            elif live != value:
                changed = True
                group[key] = value
    return changed


def scale_lrs(optimizer: Any, factor: float, step: int | None = None) -> None:
    """Set every group to ``initial_lr * factor``, times what its timing says of the step.

    Reads the live groups each time: their dicts may be replaced.

    Args:
        optimizer: whose groups the plan made.
        factor: what the run's schedule multiplies all rates by.
        step: the optimizer step that comes next, which only a plan with timings needs. None: the
            one that the groups are at.
    """
    for group in optimizer.param_groups:
        if step is not None and STEP in group:
            group[STEP] = step
        _put_lr(group, group[INITIAL_LR] * multiplier(group, factor))


def multiplier(group: ParamGroup, factor: float) -> float:
    """What a group's planned rate is multiplied by, where the run's schedule is at ``factor``."""
    timing, step = group.get(TIMING), group.get(STEP, UNKNOWN)
    # Before anybody has said which step it is, nothing is stepped: rates show the plan.
    if timing is None or step == UNKNOWN:
        return factor
    return Timing.of(timing).factor(step, factor)


def is_held(group: ParamGroup) -> bool:
    """Whether a group must not move at the step that it is at."""
    return TIMING in group and Timing.of(group[TIMING]).held(group[STEP])


def write_group(group: ParamGroup, entry: PlanEntry, factor: float, step: int | None) -> None:
    """Put a planned rate into a live group, at ``factor`` of a schedule.

    Weight decay and epsilon of None leave the group's own. ``step`` is that of a timed plan; None:
    no name of the plan has a timing.
    """
    # A load may have put the timing of another plan there.
    for key in (TIMING, STEP):
        group.pop(key, None)
    if step is not None:
        group[STEP] = step
    if entry.timing is not None:
        group[TIMING] = entry.timing.row
    group[INITIAL_LR] = entry.lr
    _put_lr(group, entry.lr * multiplier(group, factor))
    if entry.weight_decay is not None:
        group[WEIGHT_DECAY] = entry.weight_decay
    if entry.eps is not None:
        group[EPS] = entry.eps


def _put_lr(group: ParamGroup, value: float) -> None:
    """The write.

    Some optimizers keep the rate in a tensor (torchao's, and torch's when capturable) that must
    stay.
    """
    if isinstance(group[LR], Tensor):
        group[LR].fill_(value)
    else:
        group[LR] = value


def _group(spec: GroupSpec, live: Mapping[str, Tensor]) -> ParamGroup:
    params = list(
        dict.fromkeys(live[n] for n in spec.names)
    )  # names that lie side by side may be stepped as one
    group: ParamGroup = {"params": params, LR: spec.lr, INITIAL_LR: spec.lr, NAME: spec.name}
    if spec.weight_decay is not None:
        group[WEIGHT_DECAY] = spec.weight_decay
    if spec.eps is not None:
        group[EPS] = spec.eps
    if spec.optimizer is not None:
        group[OPTIMIZER] = spec.optimizer
    if spec.timing is not None:
        group[TIMING] = spec.timing.row
    return group


def _check_same_names(plan: Plan, live: Mapping[str, Tensor]) -> None:
    missing = [n for n in plan.entries if n not in live]
    extra = [n for n in live if n not in plan.entries]
    if not missing and not extra:
        return
    what = f"the plan names {missing[:5]}, which the model does not train" if missing else ""
    more = f"the model trains {extra[:5]}, which the plan does not name" if extra else ""
    raise PlanMismatch(
        f"Plan and model differ: {'; '.join(filter(None, (what, more)))}. "
        "Make the plan from this model after adapters are injected and requires_grad is set."
    )
