"""Plan -> optimizer parameter groups, and the one place that writes a learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dist_layerlr.errors import PlanMismatch
from dist_layerlr.plan.entries import GroupSpec, Plan
from dist_layerlr.sharders.base import ParamGroup
from dist_layerlr.sharders.model import live_parameters

LR = "lr"
# Torch saves it with the groups; a loaded one may be another plan's, hence ``reapply``.
INITIAL_LR = "initial_lr"
WEIGHT_DECAY = "weight_decay"
# Unique per group, for people and logs. Groups are never matched by it: a plan may merge others.
NAME = "name"


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
    """
    return build_groups(plan, {n: p for n, p in live_parameters(model).items() if p.requires_grad})


def build_groups(plan: Plan, live: Mapping[str, Tensor]) -> list[ParamGroup]:
    """The plan's groups on given tensors, ``{canonical name: what is stepped for it}``.

    Raises:
        PlanMismatch: the names are not those of the plan.
    """
    _check_same_names(plan, live)
    return [_group(spec, live) for spec in plan.groups]


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


def scale_lrs(optimizer: Any, factor: float) -> None:
    """Set every group to ``initial_lr * factor``.

    Reads the live groups each time: their dicts may be replaced.
    """
    for group in optimizer.param_groups:
        _put_lr(group, group[INITIAL_LR] * factor)


def write_group(group: ParamGroup, lr: float, weight_decay: float | None, factor: float) -> None:
    """Put a planned rate into a live group, at ``factor`` of a schedule.

    Weight decay None leaves the group's own.
    """
    group[INITIAL_LR] = lr
    _put_lr(group, lr * factor)
    if weight_decay is not None:
        group[WEIGHT_DECAY] = weight_decay


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
    return group


def _check_same_names(plan: Plan, live: Mapping[str, Tensor]) -> None:
    missing = [n for n in plan.entries if n not in live]
    extra = [n for n in live if n not in plan.entries]
    if not missing and not extra:
        return
    what = f"the plan names {missing[:5]}, which the model does not train" if missing else ""
    more = f"the model trains {extra[:5]}, which the plan does not name" if extra else ""
    raise PlanMismatch(
        f"Plan and model differ: {'; '.join(t for t in (what, more) if t)}. "
        "Make the plan from this model after adapters are injected and requires_grad is set."
    )
