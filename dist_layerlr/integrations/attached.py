"""A plan in force inside a trainer, and what the trainer's own checkpoints bring back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from dist_layerlr.errors import ConfigError
from dist_layerlr.integrations.resumed import complete, factor_of, refuse_other_names
from dist_layerlr.optim import PlanSchedule, Schedule, bind, check_scheduler
from dist_layerlr.optim.groups import settings_of
from dist_layerlr.plan import Plan
from dist_layerlr.plan.diff import Rows, plan_diff
from dist_layerlr.proof import Proof, reapply, verify
from dist_layerlr.ranks import alike, rank
from dist_layerlr.sharders import sharder_of

MakeSchedule = Schedule | Callable[[Any], Any]
"""A schedule, or a function optimizer -> scheduler."""


class Attached:
    """A plan on a prepared model: its proof, at the start and after the trainer's loads."""

    def __init__(self, plan: Plan, model: nn.Module, optimizer: Any, scheduler: Any = None):
        """Bind a DeepSpeed engine's optimizer to its partitions. Collective.

        Args:
            plan: attached in segments, or under FSDP2 in groups.
            model: as the trainer has wrapped it.
            optimizer: what ``attach`` returned.
            scheduler: what drives it, if anything does.
        """
        self.plan, self.scheduler = plan, scheduler
        engine = sharder_of(model).layout.engine_steps
        if engine:
            bind(plan, model)
        self._live = model, None if engine else optimizer
        prepared = settings_of(optimizer)
        # Trainers load the scheduler after the optimizer: its groups must be whole by then.
        optimizer.register_load_state_dict_post_hook(lambda loaded: complete(loaded, prepared))

    def prove(self) -> Proof:
        """Compare the live optimizer with the plan, and print the proof's line. Collective."""
        proof = verify(self.plan, *self._live)
        say(proof.line())
        return proof

    def rows(self) -> dict[str, Any]:
        """The plan, for the trainer's checkpoint."""
        rows: dict[str, Any] = self.plan.to_dict()["parameters"]
        return rows

    def accept(self, rows: Rows, *, fsdp1: str | None = None) -> None:
        """Refuse a checkpoint that cannot be resumed, and print what has changed. Collective.

        Args:
            rows: of the plan that it was trained with.
            fsdp1: why none of this trainer's is right under FSDP1, and what to do instead.

        Raises:
            CheckpointError: other names, or the same in another order.
            ConfigError: of FSDP1, or ``resume_lr`` asks for the checkpoint's rates.
        """
        for line in alike(lambda: self._changes(rows, fsdp1)):
            say(line)

    def restore(self) -> Proof:
        """Put the plan's rates back when everything is loaded, and prove them. Collective."""
        factor = 1.0 if self.scheduler is None else factor_of(self.scheduler)
        reapply(self.plan, *self._live, factor=factor, scheduler=self.scheduler)
        return self.prove()

    def _changes(self, rows: Rows, fsdp1: str | None) -> list[str]:
        if fsdp1 is not None and sharder_of(self._live[0]).layout.name.startswith("fsdp1"):
            raise ConfigError(f"Invalid resume under FSDP1: {fsdp1}")
        refuse_other_names(Path("of the trainer"), rows, self.plan)
        changes = plan_diff(rows, self.plan, called=("checkpoint's plan", "new plan"))
        wanted = self.plan.config.per_layer_lr.resume_lr
        if changes and wanted != "plan":
            raise ConfigError(
                f"Invalid per_layer_lr.resume_lr={wanted!r} here: the plan differs from the"
                f" checkpoint's ({changes[0]}), and is in force before this trainer loads. Write"
                " the checkpoint's rates into the config, or resume_lr='plan'."
            )
        return changes


def scheduler_of(optimizer: Any, schedule: MakeSchedule) -> Any:
    """The scheduler of an attached optimizer, refused if it does not keep the plan's ratios.

    Raises:
        ConfigError: it does not.
    """
    if isinstance(schedule, Schedule):
        return PlanSchedule(optimizer, schedule)
    scheduler = schedule(optimizer)
    alike(lambda: check_scheduler(scheduler))
    return scheduler


def say(line: str) -> None:
    """Print once for all ranks."""
    if rank() == 0:
        print(line, flush=True)
