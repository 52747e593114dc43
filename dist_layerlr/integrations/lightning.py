"""Lightning: a callback that plans before the strategy wraps, and proves before training begins.

It serves ``lightning.pytorch`` and ``pytorch_lightning`` alike, as it imports neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dist_layerlr.integrations.attached import Attached, MakeSchedule, scheduler_of
from dist_layerlr.integrations.lightning_checks import (
    check_strategy,
    lost_under_fsdp1,
    refuse_foreign,
    refuse_other_optimizer,
    refuse_unplanned,
)
from dist_layerlr.optim import attach
from dist_layerlr.optim.segmented import MakeOptimizer
from dist_layerlr.plan import Config, Plan
from dist_layerlr.plan.diff import Rows
from dist_layerlr.proof import Proof
from dist_layerlr.ranks import alike
from dist_layerlr.sharders import plan_model


class LayerLRLightning:
    """``Trainer(callbacks=[rates])``, and ``configure_optimizers`` returns ``rates.optimizers``."""

    state_key = _legacy_state_key = "dist_layerlr"

    def __init__(self, layer_lr: Plan | Config | Mapping[str, Any] | str | Path):
        """Take a training config (mapping, file or ``Config``), or the module's plan."""
        self.plan: Plan | None = None
        self.proofs: list[Proof] = []
        self._given = layer_lr
        self._trainer: Any = None
        self._optimizer: Any = None
        self._scheduler: Any = None
        self._attached: Attached | None = None
        self._resumed: Rows | None = None
        self._first_step = -1

    def __getattr__(self, event: str) -> Callable[..., None]:
        """Nothing happens at the other events: a subclass of Callback would import its library."""
        if not event.startswith("on_") and event != "teardown":
            raise AttributeError(event)
        return lambda *_, **__: None

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        """Plan the module while its parameters have their names and shapes."""
        if stage != "fit":
            return
        self._trainer, self._optimizer, self._scheduler = trainer, None, None
        self._attached = self._resumed = None
        alike(lambda: check_strategy(trainer.strategy))
        built = any(True for _ in module.parameters())
        self.plan = self._plan_of(module) if built else None  # else configure_model builds it

    def optimizers(self, make: MakeOptimizer, schedule: MakeSchedule | None = None) -> Any:
        """What ``configure_optimizers`` returns. Collective.

        Args:
            make: groups -> optimizer.
            schedule: a ``Schedule``, or a function optimizer -> scheduler, for every step.

        Raises:
            ConfigError, PlanMismatch: as ``attach`` and ``check_scheduler``.
        """
        alike(lambda: refuse_unplanned(self._trainer))
        live = self._trainer.strategy.model
        self.plan = self.plan or self._plan_of(live)
        # One group that holds all keeps its place in a checkpoint whatever the plan says.
        optimizer = self._optimizer = attach(self.plan, live, make, emission="segmented")
        if schedule is None:
            return optimizer
        self._scheduler = scheduler_of(optimizer, schedule)
        stepped = {"scheduler": self._scheduler, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": stepped}

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        """Take the model as it is wrapped; a checkpoint may come next."""
        alike(lambda: refuse_other_optimizer(self._optimizer))
        assert self.plan is not None
        live = trainer.strategy.model
        self._attached = Attached(self.plan, live, self._optimizer, self._scheduler)
        self._accept()

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Prove the plan, after a load with its rates put back."""
        assert self._attached is not None
        alike(lambda: refuse_foreign(trainer.ckpt_path, self._resumed))
        self._first_step = trainer.global_step + 1
        prove = self._attached.restore if trainer.global_step else self._attached.prove
        self.proofs.append(prove())

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Prove that the first step and the scheduler's have left the plan in force."""
        if trainer.global_step == self._first_step and self._attached is not None:
            self._first_step = -1
            self.proofs.append(self._attached.prove())

    def state_dict(self) -> dict[str, Any]:
        """The plan, which a resume compares with its own."""
        return {} if self._attached is None else {"parameters": self._attached.rows()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Refuse a checkpoint that cannot be resumed."""
        # A checkpoint that was written before a fit began holds no plan.
        self._resumed = state.get("parameters")
        self._accept()

    def _accept(self) -> None:
        # Without FSDP and DeepSpeed a checkpoint comes before the model is wrapped, else after it.
        if self._attached is not None and self._resumed is not None:
            self._attached.accept(self._resumed, fsdp1=lost_under_fsdp1(self._trainer.ckpt_path))

    def _plan_of(self, module: Any) -> Plan:
        return self._given if isinstance(self._given, Plan) else plan_model(module, self._given)
