"""The proof inside transformers' Trainer: at its start, after the first step, after a resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_layerlr.errors import ConfigError
from dist_layerlr.files import write_json
from dist_layerlr.integrations.resumed import complete, factor_of
from dist_layerlr.optim.groups import settings_of
from dist_layerlr.plan import Plan
from dist_layerlr.plan.diff import PLAN_FILE
from dist_layerlr.proof import Proof, reapply, verify


class LayerLRCallback:
    """``trainer.add_callback(LayerLRCallback(trainer, plan))``; a LayerLRTrainer adds its own.

    It proves the plan when training begins and after the first step, on every rank. After a resume
    it writes the plan's rates back by name first, since a checkpoint brings those of its own plan.
    Each checkpoint gets a ``plan.json``, which ``dist-layerlr diff`` and the next resume read.
    """

    def __init__(self, trainer: Any, plan: Plan | None = None):
        """Watch a trainer.

        Args:
            trainer: transformers' Trainer or one that is built on it.
            plan: of its model. None: the one of a LayerLRTrainer.
        """
        if plan is None and not isinstance(getattr(trainer, "layer_lr_plan", None), Plan):
            raise ConfigError(
                f"Invalid plan None for {type(trainer).__name__}, which is no LayerLRTrainer. Give"
                " LayerLRCallback(trainer, plan) the plan that its create_optimizer attaches."
            )
        self.proofs: list[Proof] = []
        self._trainer, self._own = trainer, plan
        self._first_step = 0
        self._prepared: list[dict[str, Any]] = []

    def __getattr__(self, event: str) -> Callable[..., None]:
        """Nothing happens at the trainer's other events, of which every release adds some.

        A subclass of its TrainerCallback would import transformers with this module.
        """
        if not event.startswith("on_"):
            raise AttributeError(event)
        return lambda *_, **__: None

    @property
    def plan(self) -> Plan:
        """In force."""
        plan: Plan = self._trainer.layer_lr_plan if self._own is None else self._own
        return plan

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Prove what the trainer has prepared. It has loaded its checkpoint already."""
        self._first_step = state.global_step + 1
        if state.global_step:
            complete(self._trainer.optimizer, self._prepared)
            scheduler = self._trainer.lr_scheduler
            factor = factor_of(scheduler)
            reapply(self.plan, *self._live(), factor=factor, scheduler=scheduler)
        self._verify()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Prove that the first step and the scheduler's have left the plan in force."""
        if state.global_step == self._first_step:
            self._verify()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the plan beside the trainer's own files."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and folder.is_dir():
            write_json(folder / PLAN_FILE, self.plan.to_dict())

    def remember(self, optimizer: Any) -> None:
        """Keep the settings of the groups as they are before a checkpoint is loaded."""
        self._prepared = settings_of(optimizer)

    def say(self, *lines: str) -> None:
        """Print once for all ranks, as the trainer prints its logs."""
        if self._trainer.is_world_process_zero():
            for line in lines:
                print(line, flush=True)

    def _live(self) -> tuple[Any, Any]:
        # Under DDP and DeepSpeed `trainer.model` is the module inside; an engine brings its own
        # optimizer.
        engine = getattr(self._trainer, "is_deepspeed_enabled", False)
        return self._trainer.model_wrapped, None if engine else self._trainer.optimizer

    def _verify(self) -> None:
        self.proofs.append(verify(self.plan, *self._live()))
        self.say(self.proofs[-1].line())
