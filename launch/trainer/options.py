"""The training config: one file, JSON, YAML or TOML, checked whole before anything heavy starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_layerlr import fields
from dist_layerlr.errors import ConfigError
from dist_layerlr.fields import setting
from dist_layerlr.files import read_config
from dist_layerlr.offload import StreamPolicy
from dist_layerlr.optim import Schedule
from dist_layerlr.plan import OPTIMIZERS_BLOCK, PLAN_BLOCK, Config, load_config
from launch.trainer.adapter_options import LORA as LORA
from launch.trainer.adapter_options import AdapterOptions, read_adapter
from launch.trainer.ema import EmaOptions, read_ema
from launch.trainer.epochs import check_length, cut_short, schedule_of
from launch.trainer.families import get_family
from launch.trainer.families.base import Family, network_folders
from launch.trainer.optimizers import OptimizerOptions, check_optimizers, read_optimizer
from launch.trainer.overrides import apply_override
from launch.trainer.trackers import TRACKERS
from launch.trainer.validation_options import (
    EARLY_STOP,
    EarlyStop,
    ValidationOptions,
    read_validation,
)

FULL = "fine_tune"
"""A value of ``training_method``; the other is LORA."""
PUBLISHED_MODEL = "(published)"
"""Stands for ``model_path`` where only the plan or the size of the published model is asked for."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Size and length of the run."""

    steps: int = setting(
        fields.integer(1),
        default=0,
        shown="from train.epochs",
        unit="optimizer steps",
        doc="Length of the run. Exactly one of `steps` and `epochs` is given.",
    )
    epochs: float | None = setting(
        fields.number(0.0, open_low=True),
        default=None,
        shown="from train.steps",
        unit="times through the data set",
        doc="Length of the run, repeats counted and samples held out not. The schedule follows.",
    )
    global_batch: int = setting(
        fields.integer(1), unit="samples", doc="Per optimizer step, over all ranks."
    )
    micro_batch: int | None = setting(
        fields.integer(1),
        default=None,
        shown="the rank's whole share",
        unit="samples",
        doc="Per rank in one forward.",
    )
    workers: int = setting(
        fields.integer(0),
        default=2,
        unit="threads",
        doc="Of each rank; they read and collate up to two microbatches each ahead of the step. 0:"
        " the step reads.",
    )
    seed: int = setting(fields.integer(0), default=0, doc="Of data order, noise and new weights.")
    caption_dropout: float = setting(
        fields.number(0.0, 1.0),
        default=0.0,
        doc="Share of the samples that are trained with the empty prompt, as guidance needs. The"
        " cache must hold it.",
    )
    dtype: str = setting(
        fields.one_of(lambda: ("fp32", "bf16")),
        default="fp32",
        doc="`bf16`: autocast around the forward; weights that train stay fp32, and a LoRA's base"
        " in 16 bits where its files are.",
    )
    grad_clip: float = setting(
        fields.number(0.0), default=0.0, doc="Largest global gradient norm; 0: no clipping."
    )
    checkpointing: bool = setting(
        fields.boolean,
        default=False,
        doc="Blocks keep their inputs only and are computed again in backward.",
    )
    log_every: int | None = setting(
        fields.integer(1),
        default=None,
        shown="a row each step, a line each 10th",
        unit="steps",
        doc="Between rows of metrics.jsonl, and between lines of a log file.",
    )
    cells_every: int = setting(
        fields.integer(1),
        default=10,
        unit="steps",
        doc="Between metrics per cell, which `per_layer_lr.log_grad_norms` switches on.",
    )
    report_to: tuple[str, ...] = setting(
        fields.words(TRACKERS),
        default=(),
        doc="Experiment trackers that get the metrics too; each needs its package.",
    )
    save_every: int | None = setting(
        fields.integer(1),
        default=None,
        shown="only when a signal ends the run",
        unit="steps",
        doc="Between checkpoints; the last step is saved too.",
    )
    keep: int | None = setting(
        fields.integer(1), default=None, shown="all", doc="Checkpoints that stay, the newest ones."
    )
    background_save: bool = setting(
        fields.boolean,
        default=False,
        doc="Train on while a checkpoint is written from a copy in host memory.",
    )
    early_stop: EarlyStop | None = setting(
        EARLY_STOP,
        default=None,
        shown="off",
        doc="Ends the run when the validation loss falls no more: the fields of `train.early_stop`"
        " below.",
    )

    @property
    def rows_every(self) -> int:
        """Steps between rows of metrics.jsonl."""
        return self.log_every or 1

    @property
    def lines_every(self) -> int:
        """Steps between lines of a log that is no terminal."""
        return self.log_every or 10


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """The pictures of what the model makes."""

    count: int = setting(fields.integer(0), default=4, unit="clips", doc="0: none.")
    steps: int = setting(fields.integer(1), default=20, doc="Denoising steps per clip.")
    every: int | None = setting(
        fields.integer(1),
        default=None,
        shown="only at the end",
        unit="optimizer steps",
        doc="Between pictures.",
    )
    guidance: float = setting(
        fields.number(1.0),
        default=1.0,
        doc="Of the pipeline. More than 1 needs the empty prompt in the cache.",
    )


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """What leaves the device."""

    stagehand: Mapping[str, Any] = setting(
        fields.mapping,
        factory=dict,
        shown="off",
        doc="`enabled`, and the fields of `memory.stagehand` below.",
    )


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Everything ``launch/train.py`` is told."""

    model_type: str = setting(fields.text, doc="The model family.")
    model_path: str = setting(fields.text, doc="Folder of the pretrained model.")
    training_method: str = setting(
        fields.one_of(lambda: (FULL, LORA)),
        shown=f"`{LORA}` with an adapter block, else `{FULL}`",
        doc="Train an adapter, or all weights.",
    )
    data: Mapping[str, Any] = setting(
        fields.mapping, doc="`kind` of dataset, and that kind's own fields."
    )
    objective: Mapping[str, Any] = setting(
        fields.mapping,
        factory=dict,
        shown="the family's own",
        doc="What is minimised: the fields of the family's objective below.",
    )
    adapter: AdapterOptions
    optimizer: OptimizerOptions
    schedule: Schedule
    train: TrainOptions
    samples: SampleOptions
    validation: ValidationOptions
    ema: EmaOptions
    stream: StreamPolicy | None
    """`memory.stagehand`; None: weights stay on the device."""
    plan: Config = field(repr=False)
    raw: Mapping[str, Any] = field(repr=False)
    """The JSON as given, after --set."""


BLOCKS: Mapping[str, type] = {
    "adapter": AdapterOptions,
    "optimizer": OptimizerOptions,
    "schedule": Schedule,
    "train": TrainOptions,
    "samples": SampleOptions,
    "validation": ValidationOptions,
    "ema": EmaOptions,
    "memory": MemoryOptions,
}
"""Blocks of the config, by key. `per_layer_lr` is the plan's own, `data` the dataset's."""


_NEEDED = {
    "model_type": "model_type=wan",
    "model_path": "model_path=DIR",
    "data": "data.kind=cached --set data.folder=DIR",
    "train.steps": "train.steps=N",
    "train.global_batch": "train.global_batch=N",
}
"""Key without a default: what to add for it."""


def load_options(
    path: str | Path,
    overrides: Sequence[str] = (),
    max_steps: int | None = None,
    *,
    outline: bool = False,
) -> RunOptions:
    """Read and check a training config.

    Args:
        path: JSON, YAML or TOML file.
        overrides: ``a.b=value`` assignments, applied before checking; values are JSON, or else
            plain text.
        max_steps: overrides ``train.steps``.
        outline: the model's plan and size alone are wanted: what only training needs may be
            missing, and without ``model_path`` the published model is meant.

    Raises:
        ConfigError: names the field, the value and what is allowed.
    """
    raw = read_config(path)
    for assignment in overrides:
        apply_override(raw, assignment)
    raw |= {} if max_steps is None else {"train": _cut_short(raw, max_steps)}
    known = fields.settings(RunOptions)
    fields.known_keys("config", raw, [*known, *fields.settings(Config), PLAN_BLOCK, *BLOCKS])
    if "model_type" in raw:
        get_family(known["model_type"].check("model_type", raw["model_type"]))
    if outline:
        raw = _filled_in(raw)
    _check_complete(raw, path)
    family = get_family(raw["model_type"])
    blocks = {name: fields.read(name, _section(raw, name), cls) for name, cls in BLOCKS.items()}
    train = TrainOptions(**blocks["train"])
    given = {"training_method": _method(raw), "objective": {}, **raw}
    values = {key: found.check(key, given[key]) for key, found in known.items()}
    # By attribute from here on, as the objective's class takes them.
    values["objective"] = fields.read("objective", values["objective"], family.objective_class)
    values["model_path"] = _first_network(family, values)
    if values["training_method"] == FULL and "adapter" in raw:
        raise ConfigError(
            f"Invalid training_method={FULL!r} with an 'adapter' block: remove one of them."
        )
    optimizer, plan = read_optimizer(blocks["optimizer"]), load_config(raw)
    stream = _stream_policy(blocks["memory"].get("stagehand", {}))
    check_optimizers(plan, optimizer, stream)
    return RunOptions(
        **values,
        adapter=read_adapter(blocks["adapter"]),
        optimizer=optimizer,
        # A run cut short by --max-steps may end within its warmup.
        schedule=schedule_of(blocks["schedule"], train.steps, cut_short=max_steps is not None),
        train=train,
        samples=SampleOptions(**blocks["samples"]),
        ema=read_ema(blocks["ema"]),
        validation=read_validation(blocks["validation"], train.early_stop),
        stream=stream,
        plan=plan,
        raw=raw,
    )


def _cut_short(raw: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The ``train`` block of this many steps; what they take the place of must be right too."""
    fields.read("train", _section(raw, "train"), TrainOptions)
    return cut_short(_section(raw, "train"), steps)


def _first_network(family: Family, values: Mapping[str, Any]) -> str:
    """Folder of the network that is trained; of two the first, each has its own options in run.py.

    Raises:
        ModelSourceError: no such folder, or one without the network that is asked for.
    """
    folder = family.model_folder(Path(values["model_path"]))
    return str(next(iter(network_folders(family, folder, values["objective"]).values())))


def resolved(options: RunOptions) -> dict[str, Any]:
    """Return the config with every default filled in, as ``--config`` takes it again."""
    own = ("learning_rate", OPTIMIZERS_BLOCK, PLAN_BLOCK)
    given = {key: options.raw[key] for key in own if key in options.raw}
    stream = {"enabled": options.stream is not None}
    if options.stream is not None:
        stream |= _filled(options.stream)
    adapter = {}
    if options.training_method == LORA:
        adapter = {"adapter": _filled(options.adapter)}
        # Empty means the family's own, which adapter_config.json lists.
        if not options.adapter.target_modules:
            del adapter["adapter"]["target_modules"]
    return {
        "model_type": options.model_type,
        "model_path": options.model_path,
        "training_method": options.training_method,
        **given,
        "data": dict(options.data),
        "objective": dict(options.objective),
        **adapter,
        "optimizer": _filled(options.optimizer),
        "schedule": _filled(options.schedule),
        "train": _filled(options.train, "steps" if options.train.epochs is not None else ""),
        "samples": _filled(options.samples),
        **({"ema": _filled(options.ema)} if options.ema.on else {}),
        **({"validation": _filled(options.validation)} if options.validation.on else {}),
        "memory": {"stagehand": stream},
    }


def _filled(block: Any, without: str = "") -> dict[str, Any]:
    """The settings of a block by key. One that is None is left out: that is its default."""
    found = {}
    for key, known in fields.settings(type(block)).items():
        value = getattr(block, known.name)
        if value is not None and key != without:
            value = _filled(value) if isinstance(value, EarlyStop) else value
            found[key] = list(value) if isinstance(value, tuple) else value
    return found


def _section(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return fields.mapping(name, raw.get(name, {}))


def _check_complete(raw: Mapping[str, Any], path: str | Path) -> None:
    """Name everything that is missing at once, and what to add for it; refuse two lengths."""
    train = _section(raw, "train")
    check_length(train)
    train = {**train, "steps": train["epochs"]} if "epochs" in train else train
    missing = [
        key
        for key in _NEEDED
        if key.removeprefix("train.") not in (train if key.startswith("train.") else raw)
    ]
    if missing:
        names, flags = ", ".join(missing), " ".join(f"--set {_NEEDED[key]}" for key in missing)
        raise ConfigError(
            f"Missing in config {str(path)!r}: {names}. Add them there, or pass {flags}."
        )


def _filled_in(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Add what only training needs, where it is missing."""
    given = _section(raw, "train")
    train = {"global_batch": 1, **({} if "epochs" in given else {"steps": 1}), **given}
    return {"model_path": PUBLISHED_MODEL, "data": {}, **raw, "train": train}


def _method(raw: Mapping[str, Any]) -> str:
    """The seed's configs say ``adapter`` and leave training_method out."""
    return LORA if "adapter" in raw else FULL


def _stream_policy(given: Mapping[str, Any]) -> StreamPolicy | None:
    """The policy that ``memory.stagehand`` asks for, by its own keys; None unless enabled."""
    values = dict(given)
    fields.known_keys("memory.stagehand", values, ["enabled", *fields.settings(StreamPolicy)])
    enabled = fields.boolean("memory.stagehand.enabled", values.pop("enabled", False))
    # The policy is made, and so checked, even when it is off: a typo in it is said today.
    try:
        policy = StreamPolicy(**values)
    except ConfigError as error:
        raise ConfigError(f"memory.stagehand: {error}") from None
    return policy if enabled else None
