"""Accelerate: one call in place of ``accelerator.prepare``, right under everything it wraps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dist_layerlr.integrations.accelerate_checks import FSDP, refuse_unproven
from dist_layerlr.integrations.attached import Attached, MakeSchedule, scheduler_of
from dist_layerlr.optim import attach
from dist_layerlr.optim.segmented import MakeOptimizer
from dist_layerlr.plan import Config, Plan
from dist_layerlr.ranks import alike
from dist_layerlr.sharders import plan_model

_FSDP1 = (
    "Accelerate loads no optimizer state from its checkpoints of FSDP1, and says nothing. Train"
    " with fsdp_version=2, or save and load with dist_layerlr.save_checkpoint and load_checkpoint."
)


def prepare_accelerate(
    accelerator: Any,
    layer_lr: Plan | Config | Mapping[str, Any] | str | Path,
    model: nn.Module,
    make: MakeOptimizer,
    *others: Any,
    schedule: MakeSchedule | None = None,
) -> tuple[Any, ...]:
    """``accelerator.prepare(model, optimizer, *others, scheduler)`` at the plan's rates.

    Collective. The plan is proven before it returns and after every ``accelerator.load_state``.

    Args:
        accelerator: without or with DDP, FSDP1, FSDP2, or DeepSpeed ZeRO 1 to 3.
        layer_lr: a training config (mapping, file or ``Config``), or the model's plan.
        model: not wrapped.
        make: groups -> optimizer, in place of the optimizer.
        *others: what else ``prepare`` is given, data loaders above all.
        schedule: a ``Schedule``, or a function optimizer -> scheduler, in place of the scheduler.
            Accelerate steps a function's scheduler once per process at each optimizer step, as it
            does everywhere; a ``Schedule`` counts optimizer steps.

    Returns:
        The prepared model, optimizer, and others, in that order; then the scheduler, if any.

    Raises:
        ConfigError: on all ranks alike: what would change the plan, or is not proven.
        PlanMismatch: the prepared optimizer is not at the plan.
    """
    alike(lambda: refuse_unproven(accelerator, make, schedule, others))
    plan = layer_lr if isinstance(layer_lr, Plan) else plan_model(model, layer_lr)
    kind, groups = accelerator.distributed_type.value, accelerator.is_fsdp2
    first = [model]
    if kind == FSDP and not groups:
        # FSDP1 may put parameters into flat ones; an optimizer that is built earlier holds none.
        model, first = accelerator.prepare(model), []
    # One group that holds all keeps its place in a checkpoint whatever the plan says. FSDP2
    # exchanges the parameters of ordinary groups, inside prepare, and saves by name.
    optimizer = attach(plan, model, make, emission="groups" if groups else "segmented")
    scheduler = None if schedule is None else scheduler_of(optimizer, schedule)
    last = [] if scheduler is None else [scheduler]
    args = [*first, optimizer, *others, *last]
    found = accelerator.prepare(*args)
    found = found if len(args) > 1 else (found,)
    prepared = (*([] if first else [model]), *found)
    attached = Attached(plan, prepared[0], optimizer, scheduler)
    accelerator.register_for_checkpointing(_Kept(attached))
    attached.prove()
    return prepared


class _Kept:
    """What ``save_state`` keeps beside Accelerate's own files; it is loaded after all of them."""

    def __init__(self, attached: Attached):
        self._attached = attached

    def state_dict(self) -> dict[str, Any]:
        return {"parameters": self._attached.rows()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._attached.accept(state["parameters"], fsdp1=_FSDP1)
        self._attached.restore()
