"""The training config: one JSON file, validated whole before anything heavy starts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_layerlr import fields
from dist_layerlr.errors import ConfigError
from dist_layerlr.files import read_json
from dist_layerlr.offload import StreamPolicy
from dist_layerlr.optim.schedule import KINDS, Schedule
from dist_layerlr.plan.config import Config, load_config
from launch.trainer.families import get_family

LORA, FULL = "lora", "fine_tune"


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """A PEFT LoRA adapter."""

    rank: int = 16
    alpha: float = 16.0
    target_modules: tuple[str, ...] = ()
    """Module name endings; empty: the family's own."""


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """The torch optimizer. Learning rates are the plan's."""

    kind: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    momentum: float = 0.9
    """SGD only."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Size and length of the run."""

    steps: int
    """Optimizer steps."""
    global_batch: int
    """Samples per optimizer step over all ranks."""
    micro_batch: int | None = None
    """Samples per rank in one forward; None: the rank's whole share."""
    seed: int = 0
    dtype: str = "fp32"
    """`fp32`, or `bf16`: autocast around the forward, weights stay fp32."""
    grad_clip: float = 0.0
    """Largest global gradient norm; 0: no clipping."""
    checkpointing: bool = False
    """Blocks keep their inputs only and are computed again in backward."""
    log_every: int = 1
    """Steps between rows of metrics.jsonl."""
    save_every: int | None = None
    """Steps between checkpoints; the last step is saved too. None: only when a signal ends the
    run."""
    keep: int | None = None
    """Checkpoints that stay, the newest ones; None: all."""
    background_save: bool = False
    """Train on while a checkpoint is written from a copy in host memory."""


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """The picture at the end."""

    count: int = 4
    """Clips; 0: none."""
    steps: int = 20
    """Euler steps per clip."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Everything ``launch/train.py`` is told."""

    model_type: str
    model_path: str
    training_method: str
    adapter: AdapterOptions
    data: Mapping[str, Any]
    optimizer: OptimizerOptions
    schedule: Schedule
    train: TrainOptions
    samples: SampleOptions
    stream: StreamPolicy | None
    """`memory.stagehand`; None: weights stay on the device."""
    plan: Config = field(repr=False)
    raw: Mapping[str, Any] = field(repr=False)
    """The JSON as given, after --set."""


_BLOCKS: dict[str, dict[str, fields.Check]] = {
    "adapter": {
        "type": fields.one_of(lambda: (LORA,)),
        "rank": fields.integer(1),
        "alpha": fields.number(0.0, open_low=True),
        "target_modules": fields.strings,
    },
    "optimizer": {
        "type": fields.one_of(lambda: ("adamw", "sgd")),
        "betas": fields.numbers(at_least=2),
        "eps": fields.number(0.0, open_low=True),
        "weight_decay": fields.number(0.0),
        "momentum": fields.number(0.0, 1.0),
    },
    "schedule": {
        "type": fields.one_of(lambda: KINDS),
        "warmup_steps": fields.integer(0),
        "min_ratio": fields.number(0.0, 1.0),
    },
    "train": {
        "steps": fields.integer(1),
        "global_batch": fields.integer(1),
        "micro_batch": fields.integer(1),
        "seed": fields.integer(0),
        "dtype": fields.one_of(lambda: ("fp32", "bf16")),
        "grad_clip": fields.number(0.0),
        "checkpointing": fields.boolean,
        "log_every": fields.integer(1),
        "save_every": fields.integer(1),
        "keep": fields.integer(1),
        "background_save": fields.boolean,
    },
    "samples": {"count": fields.integer(0), "steps": fields.integer(1)},
}
_TOP = (
    "model_type",
    "model_path",
    "training_method",
    "learning_rate",
    "per_layer_lr",
    "memory",
    "data",
    *_BLOCKS,
)


_NEEDED = {
    "model_type": "model_type=wan",
    "model_path": "model_path=DIR",
    "data": "data.kind=cached --set data.folder=DIR",
    "train.steps": "train.steps=N",
    "train.global_batch": "train.global_batch=N",
}
"""Key without a default: what to add for it."""


def load_options(
    path: str | Path, overrides: Sequence[str] = (), max_steps: int | None = None
) -> RunOptions:
    """Read and check a training config.

    Args:
        path: JSON file.
        overrides: ``a.b=value`` assignments, applied before checking; values are JSON, or else
            plain text.
        max_steps: overrides ``train.steps``.

    Raises:
        ConfigError: names the field, the value and what is allowed.
    """
    raw = read_json(path)
    for assignment in overrides:
        apply_override(raw, assignment)
    if max_steps is not None:
        raw["train"] = {**_section(raw, "train"), "steps": max_steps}
    fields.known_keys("config", raw, _TOP)
    if "model_type" in raw:
        get_family(fields.text("model_type", raw["model_type"]))
    _check_complete(raw, path)
    blocks = {
        name: fields.fields(name, _section(raw, name), allowed) for name, allowed in _BLOCKS.items()
    }
    train = TrainOptions(**blocks["train"])
    method = fields.one_of(lambda: (FULL, LORA))(
        "training_method", raw.get("training_method", _method(raw))
    )
    if method == FULL and "adapter" in raw:
        raise ConfigError(
            f"Invalid training_method={FULL!r} with an 'adapter' block: remove one of them."
        )
    return RunOptions(
        model_type=fields.text("model_type", raw["model_type"]),
        model_path=fields.text("model_path", raw["model_path"]),
        training_method=method,
        adapter=_adapter(blocks["adapter"]),
        data=fields.mapping("data", raw["data"]),
        optimizer=_optimizer(blocks["optimizer"]),
        # A run cut short by --max-steps may end within its warmup.
        schedule=_schedule(blocks["schedule"], train.steps, cut_short=max_steps is not None),
        train=train,
        samples=SampleOptions(**blocks["samples"]),
        stream=_stream_policy(raw.get("memory", {})),
        plan=load_config(raw),
        raw=raw,
    )


def apply_override(raw: dict[str, Any], assignment: str) -> None:
    """Apply ``a.b.c=value`` in place.

    Raises:
        ConfigError: no ``=``, or a path through something that is no object.
    """
    path, sign, text = assignment.partition("=")
    if not sign or not path:
        raise ConfigError(
            f"Invalid --set {assignment!r}: expected KEY.SUBKEY=VALUE, such as train.steps=100."
        )
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    *parents, last = path.split(".")
    target: Any = raw
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise ConfigError(
                f"Invalid --set {assignment!r}: {parent!r} is not an object in the config."
            )
    target[last] = value


def _section(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return fields.mapping(name, raw.get(name, {}))


def _check_complete(raw: Mapping[str, Any], path: str | Path) -> None:
    """Name everything that is missing at once, and what to add for it."""
    train = _section(raw, "train")
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


def _method(raw: Mapping[str, Any]) -> str:
    """The seed's configs say ``adapter`` and leave training_method out."""
    return LORA if "adapter" in raw else FULL


def _stream_policy(raw: object) -> StreamPolicy | None:
    """The policy that ``memory.stagehand`` asks for, whose keys are the policy's own.

    None unless enabled.
    """
    memory = fields.fields("memory", fields.mapping("memory", raw), {"stagehand": fields.mapping})
    given = dict(memory.get("stagehand", {}))
    known = [field.name for field in dataclasses.fields(StreamPolicy)]
    fields.known_keys("memory.stagehand", given, ["enabled", *known])
    enabled = fields.boolean("memory.stagehand.enabled", given.pop("enabled", False))
    try:
        policy = StreamPolicy(**given)
    except ConfigError as error:
        raise ConfigError(f"memory.stagehand: {error}") from None
    return policy if enabled else None


def _adapter(values: dict[str, Any]) -> AdapterOptions:
    values.pop("type", None)
    values.setdefault("alpha", float(values.get("rank", 16)))
    return AdapterOptions(**values)


def _optimizer(values: dict[str, Any]) -> OptimizerOptions:
    if "betas" in values and (len(values["betas"]) != 2 or max(values["betas"]) >= 1.0):
        raise fields.invalid("optimizer.betas", list(values["betas"]), "two numbers in [0, 1)")
    if "type" in values:
        values["kind"] = values.pop("type")
    return OptimizerOptions(**values)


def _schedule(values: dict[str, Any], steps: int, *, cut_short: bool) -> Schedule:
    if "type" in values:
        values["kind"] = values.pop("type")
    warmup = values.get("warmup_steps", 0)
    if warmup > steps and not cut_short:
        raise fields.invalid(
            "schedule.warmup_steps", warmup, f"an integer in [0, train.steps={steps}]"
        )
    return Schedule(total_steps=steps, **values)
