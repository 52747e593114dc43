"""transformers' Trainer, and the trainers built on it (TRL), at the plan's rates.

A trainer builds the optimizer before it wraps the model, hands it to Accelerate, and writes and
loads checkpoints by the position of parameters. One group that holds every parameter in the model's
order keeps its place whatever the plan says, so that everything but FSDP2 gets a segmented
optimizer. FSDP2 replaces parameters inside Accelerate and saves by name: it gets ordinary groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dist_layerlr.checkpoint.resume import inherit
from dist_layerlr.files import read_config
from dist_layerlr.integrations.transformers_callback import LayerLRCallback
from dist_layerlr.integrations.transformers_checks import maker, refuse_unproven
from dist_layerlr.integrations.transformers_resume import refuse_resume, resumed_rows
from dist_layerlr.optim import attach, bind, check_scheduler
from dist_layerlr.plan import Config, Plan, canonical_name, load_config
from dist_layerlr.ranks import alike
from dist_layerlr.sharders import plan_model

_MOST_STEPS = 10_000
"""How far a scheduler is simulated."""


class LayerLRTrainer:
    """``class MyTrainer(LayerLRTrainer, Trainer)``, then ``MyTrainer(..., layer_lr=config)``.

    ``layer_lr`` is a training config (mapping, file or ``Config``) or a plan. Without
    ``learning_rate`` it takes that of TrainingArguments; without weight decay theirs, too, by their
    rule (none on biases and norms). The optimizer is the one that ``optim`` names.
    """

    args: Any
    model: Any
    optimizer: Any
    lr_scheduler: Any
    accelerator: Any
    is_deepspeed_enabled: bool

    def __init__(self, *args: Any, layer_lr: Any, **kwargs: Any):
        trainer: Any = super()
        trainer.__init__(*args, **kwargs)
        alike(lambda: refuse_unproven(self))
        # Trainers inject adapters in their own __init__, and wrap the model in train().
        self._planned = self.layer_lr_plan = self._plan_of(layer_lr)
        self.layer_lr_callback = LayerLRCallback(self)
        trainer.add_callback(self.layer_lr_callback)

    def _plan_of(self, given: Any) -> Plan:
        if not isinstance(given, (Plan, Config)):
            read = dict(given) if isinstance(given, Mapping) else read_config(given)
            if read.get("learning_rate") is None:
                read["learning_rate"] = self.args.learning_rate
            given = load_config(read)
        plan = given if isinstance(given, Plan) else plan_model(self.model, given)
        trainer: Any = self
        names = trainer.get_decay_parameter_names(self.model)
        decayed = {canonical_name(name) for name in names}
        entries = dict(plan.entries)
        for name, entry in plan.entries.items():
            if entry.weight_decay is None:
                decay = float(self.args.weight_decay) if name in decayed else 0.0
                entries[name] = replace(entry, weight_decay=decay)
        return replace(plan, entries=entries)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """The optimizer of TrainingArguments on the plan's rates. The trainer calls it."""
        if self.optimizer is None:
            live = self.model if model is None else model
            emission = "groups" if self.accelerator.is_fsdp2 else "segmented"
            make = maker(self, live)
            self.optimizer = attach(self.layer_lr_plan, live, make, emission=emission)
        return self.optimizer  # type: ignore[no-any-return]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The scheduler of TrainingArguments, refused if it does not keep the plan's ratios."""
        trainer: Any = super()
        scheduler = trainer.create_scheduler(num_training_steps, optimizer)
        if self.is_deepspeed_enabled:
            # The engine has cut its partitions; the trainer loads a checkpoint into it next.
            bind(self.layer_lr_plan, self.accelerator.deepspeed_engine_wrapped.engine)
        self.layer_lr_callback.remember(self.optimizer)
        steps = min(num_training_steps, _MOST_STEPS)
        alike(lambda: check_scheduler(scheduler, steps=steps))
        return scheduler

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's. A changed plan follows ``resume_lr`` on a resume."""
        trainer: Any = super()
        plan = self._planned
        alike(lambda: refuse_resume(self, resume_from_checkpoint))
        rows = alike(lambda: resumed_rows(resume_from_checkpoint, self.args.output_dir, plan))
        if rows is not None:
            plan, changes = inherit(rows, plan)
            self.layer_lr_callback.say(*changes)
        if plan.digest != self.layer_lr_plan.digest:
            self.optimizer = None  # an earlier train() left that of another plan
        self.layer_lr_plan = plan
        return trainer.train(resume_from_checkpoint, *args, **kwargs)
