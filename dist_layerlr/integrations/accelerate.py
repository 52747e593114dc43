"""Accelerate: one call in place of ``accelerator.prepare``, right under everything it wraps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dist_layerlr.integrations.accelerate_checks import (
    DEEPSPEED,
    FSDP,
    refuse_resume,
    refuse_unproven,
)
from dist_layerlr.integrations.resumed import (
    changes_of,
    complete,
    factor_of,
    refuse_other_names,
)
from dist_layerlr.optim import PlanSchedule, Schedule, attach, bind, check_scheduler
from dist_layerlr.optim.groups import settings_of
from dist_layerlr.optim.segmented import MakeOptimizer
from dist_layerlr.plan import Config, Plan
from dist_layerlr.proof import reapply, verify
from dist_layerlr.ranks import alike
from dist_layerlr.sharders import plan_model

MakeSchedule = Schedule | Callable[[Any], Any]


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
        layer_lr: a training config (mapping, JSON file or ``Config``), or the model's plan.
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
    scheduler = None if schedule is None else _scheduler_of(optimizer, schedule)
    last = [] if scheduler is None else [scheduler]
    args = [*first, optimizer, *others, *last]
    found = accelerator.prepare(*args)
    found = found if len(args) > 1 else (found,)
    prepared = (*([] if first else [model]), *found)
    if kind == DEEPSPEED:
        bind(plan, prepared[0])
    kept = _Kept(accelerator, plan, prepared[0], optimizer, scheduler)
    accelerator.register_for_checkpointing(kept)
    kept.prove()
    return prepared


def _scheduler_of(optimizer: Any, schedule: MakeSchedule) -> Any:
    if isinstance(schedule, Schedule):
        return PlanSchedule(optimizer, schedule)
    scheduler = schedule(optimizer)
    alike(lambda: check_scheduler(scheduler))
    return scheduler


class _Kept:
    """What save_state keeps beside Accelerate's own files; it is loaded after all of them."""

    def __init__(
        self, accelerator: Any, plan: Plan, model: nn.Module, optimizer: Any, scheduler: Any
    ):
        self._accelerator, self._plan, self._model = accelerator, plan, model
        self._optimizer, self._scheduler = optimizer, scheduler
        prepared = settings_of(optimizer)
        # Accelerate loads the scheduler right after the optimizer: its groups must be whole by then.
        optimizer.register_load_state_dict_post_hook(lambda loaded: complete(loaded, prepared))

    def prove(self) -> None:
        engine = self._accelerator.distributed_type.value == DEEPSPEED
        proof = verify(self._plan, self._model, None if engine else self._optimizer)
        self._accelerator.print(proof.line())

    def state_dict(self) -> dict[str, Any]:
        return {"parameters": self._plan.to_dict()["parameters"]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        alike(lambda: refuse_resume(self._accelerator))
        changes = alike(lambda: self._changes(state["parameters"]))
        for line in changes:
            self._accelerator.print(line)
        factor = 1.0 if self._scheduler is None else factor_of(self._scheduler)
        engine = self._accelerator.distributed_type.value == DEEPSPEED
        live = None if engine else self._optimizer
        reapply(self._plan, self._model, live, factor=factor, scheduler=self._scheduler)
        self.prove()

    def _changes(self, rows: Mapping[str, Any]) -> list[str]:
        refuse_other_names(Path("of save_state"), rows, self._plan)
        return changes_of(rows, self._plan)
