"""The plan: canonical name -> learning rate and weight decay, and everything that led to them.

Pure.

``lr(name) = component_lr[component] * depth_factor(block)``, times region and LoRA+ multipliers. It
is made once, on the unsharded model, from names and true shapes; afterwards it is the only source
of learning rates.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

from dist_layerlr.plan import foreign
from dist_layerlr.plan.config import Config
from dist_layerlr.plan.depth import DepthSettings
from dist_layerlr.plan.layer_decay import ModelLayer
from dist_layerlr.plan.names import natural_key
from dist_layerlr.plan.timing import Timing
from dist_layerlr.plan.width import WidthScales

if TYPE_CHECKING:
    from dist_layerlr.plan.steer import Changes

Shape = tuple[int, ...]
GroupKey = tuple[str | None, float, float | None, float | None, Timing | None]
"""What the entries of a group share: optimizer, lr, weight decay, epsilon, timing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamInfo:
    """One parameter of the unsharded model."""

    name: str
    shape: Shape
    """True shape, before any wrapper flattened or partitioned it."""
    trainable: bool = True
    owner_class: str | None = None
    """Class name of the owning module, when a live model was read."""
    layer: ModelLayer | None = None
    """What the live model's own code says of its layer, for layer decay."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanEntry:
    """One trainable parameter.

    ``lr = base_lr * factor * multiplier * optimizer_multiplier * lora_plus * width.lr``.
    """

    name: str
    shape: Shape
    component: str
    """The component whose rate applies, or `default`."""
    rule: str
    """What gave the component, in words."""
    stack: str | None
    block: int | None
    blocks: int | None
    """Where it sits; None outside blocks."""
    panel: str | None
    """Stacks numbered together (a UNet's stages), else the stack."""
    base_lr: float
    factor: float
    """Depth factor."""
    depth: DepthSettings | None
    """What gave the factor; None when per_layer_lr is off."""
    multiplier: float
    """lr_multiplier of the region."""
    lora_plus: float
    """lora_plus_ratio of a lora_B, else 1."""
    lr: float
    weight_decay: float | None
    """None: the optimizer's own."""
    region: str | None
    """Match of the region it belongs to."""
    optimizer: str | None = None
    """Which of the config's ``optimizers`` steps it; None: there is one for all."""
    optimizer_why: str = ""
    optimizer_multiplier: float = 1.0
    """lr_multiplier of that optimizer."""
    parts: tuple[int, ...] = ()
    """Rows of each matrix in a fused one that is stepped part by part."""
    width: WidthScales | None = None
    """None: the rates are not scaled by shapes."""
    eps: float | None = None
    """Adam's epsilon; None: the optimizer's own."""
    timing: Timing | None = None
    """When it trains; None: always, at the run's schedule."""

    @property
    def settings(self) -> GroupKey:
        """What it shares with the other names of its group."""
        return self.optimizer, self.lr, self.weight_decay, self.eps, self.timing

    def lr_at(self, step: int, factor: float = 1.0) -> float:
        """Its rate at an optimizer step, where the run's schedule is at ``factor``."""
        return self.lr * (factor if self.timing is None else self.timing.factor(step, factor))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def cell(self) -> tuple[str | None, int | None, str]:
        """Its cell of the grid: (stack, block, component)."""
        return self.stack, self.block, self.component


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSpec:
    """Parameters that share every hyper-parameter, as one optimizer group."""

    name: str
    lr: float
    weight_decay: float | None
    names: tuple[str, ...]
    optimizer: str | None = None
    eps: float | None = None
    timing: Timing | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Learning rates of one model. Keyed by canonical name, in the model's order."""

    entries: Mapping[str, PlanEntry]
    config: Config
    warnings: tuple[str, ...] = field(default=(), compare=False)
    frozen: int = 0
    """Number of parameters that do not train."""
    origin: Plan | None = field(default=None, compare=False, repr=False)
    """The plan that ``steered`` has changed; None: this is as the config has it."""
    changes: tuple[Changes, ...] = field(default=(), compare=False)
    """What ``steered`` has changed, in order."""

    @cached_property
    def digest(self) -> str:
        """Hash of every name, shape, lr and weight decay.

        Equal digests train alike whatever the order of names.
        """
        rows = sorted(map(_digested, self.entries.values()))
        # 64 bits tell plans apart, and fit a line of a log.
        return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]

    @cached_property
    def timed(self) -> bool:
        """Whether any name trains at some steps only, or has a schedule of its own."""
        return any(entry.timing is not None for entry in self.entries.values())

    def at_step(self, step: int) -> Plan:
        """The plan with the rates of one optimizer step in it, before the run's schedule."""
        now = {name: replace(e, lr=e.lr_at(step)) for name, e in self.entries.items()}
        return replace(self, entries=now)

    @cached_property
    def groups(self) -> tuple[GroupSpec, ...]:
        """Optimizer groups: entries of equal settings (``GroupKey``), in a stable order.

        Names are unique and no group is empty.

        Entries with LR 0 are a group too: they are held still, not dropped.
        """
        merged: dict[GroupKey, list[PlanEntry]] = {}

        def place(entry: PlanEntry) -> tuple[object, int, str, str]:
            return natural_key(entry.stack or ""), entry.block or 0, entry.component, entry.name

        # The order must not depend on the order of names: ranks and resumes compare groups by it.
        for entry in sorted(self.entries.values(), key=place):
            merged.setdefault(entry.settings, []).append(entry)
        taken: dict[str, int] = {}
        return tuple(_group(key, members, taken) for key, members in merged.items())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: ``{"digest", "groups", "parameters": {name: {...}}}``."""
        return {
            "digest": self.digest,
            "groups": [
                {
                    "name": g.name,
                    "lr": g.lr,
                    "weight_decay": g.weight_decay,
                    "params": len(g.names),
                    "numel": sum(self.entries[n].numel for n in g.names),
                }
                for g in self.groups
            ],
            "parameters": {name: _row(entry) for name, entry in self.entries.items()},
            **({"steered": list(map(_written, self.changes))} if self.changes else {}),
        }

    def to_json(self, *, indent: int | None = 1) -> str:
        """``to_dict`` as text."""
        return json.dumps(self.to_dict(), indent=indent)

    def to_param_groups(self, params: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Groups as any torch optimizer takes them: absolute lr, no multiplier beside it.

        On a sharded model use ``attach``: groups cannot say what flat tensors hold.

        Args:
            params: {canonical name: tensor}. None: ``params`` holds the names.

        Raises:
            ConfigError: a planned name is not in ``params``.
        """
        return foreign.param_groups(self, params)

    def to_timm(
        self, params: Mapping[str, Any] | None = None, *, base_lr: float | None = None
    ) -> list[dict[str, Any]]:
        """Groups as timm's layer decay makes them: one lr, and ``lr_scale`` beside it.

        Only timm's own schedulers read ``lr_scale``; under any other use ``to_param_groups``.

        Args:
            params: {canonical name: tensor}. None: ``params`` holds the names.
            base_lr: what timm is told as ``lr``. None: the highest planned rate.

        Raises:
            ConfigError: a planned name is not in ``params``, or no rate is above 0.
        """
        return foreign.timm_groups(self, params, base_lr)

    def to_kohya(self, *, sdxl: bool = False) -> dict[str, Any]:
        """``unet_lr`` and ``network_args`` of sd-scripts, where one rate per block says it all.

        Raises:
            ConfigError: two rates in one slot, a weight decay, or no UNet.
        """
        return foreign.kohya_settings(self, sdxl=sdxl)


def _group(key: GroupKey, members: list[PlanEntry], taken: dict[str, int]) -> GroupSpec:
    cells = list(dict.fromkeys(e.cell for e in members))
    name = cell_name(cells[0]) + (f"+{len(cells) - 1}" if len(cells) > 1 else "")
    taken[name] = taken.get(name, 0) + 1
    # Groups of one cell may differ in weight decay; people and logs know a group by its name.
    if taken[name] > 1:
        name = f"{name}#{taken[name]}"
    return GroupSpec(
        name=name,
        lr=key[1],
        weight_decay=key[2],
        names=tuple(e.name for e in members),
        optimizer=key[0],
        eps=key[3],
        timing=key[4],
    )


def cell_name(cell: tuple[str | None, int | None, str]) -> str:
    """``transformer_blocks.000.self_attn``, or ``outside.norm`` for what lies in no block."""
    stack, block, component = cell
    return f"outside.{component}" if stack is None else f"{stack}.{block:03d}.{component}"


def total_numel(entries: Iterable[PlanEntry]) -> int:
    """Elements of all entries together."""
    return sum(entry.numel for entry in entries)


def _digested(entry: PlanEntry) -> str:
    row = f"{entry.name}\t{entry.shape}\t{entry.lr!r}\t{entry.weight_decay!r}"
    # Plans without a choice, an epsilon or a timing keep the digest that older checkpoints have.
    if entry.eps is not None:
        row = f"{row}\teps {entry.eps!r}"
    if entry.timing is not None:
        row = f"{row}\t{entry.timing.row!r}"
    return row if entry.optimizer is None else f"{row}\t{entry.optimizer}\t{entry.parts}"


def _written(changes: Changes) -> dict[str, Any]:
    return changes.to_dict()


def _row(entry: PlanEntry) -> dict[str, Any]:
    chosen: dict[str, Any] = {} if entry.optimizer is None else {"optimizer": entry.optimizer}
    if entry.timing is not None:
        chosen["timing"] = str(entry.timing)
    if entry.parts:
        chosen["parts"] = list(entry.parts)
    if entry.eps is not None:
        chosen["eps"] = entry.eps
    return {
        "component": entry.component,
        "stack": entry.stack,
        "block": entry.block,
        "blocks": entry.blocks,
        "factor": entry.factor,
        "lr": entry.lr,
        "weight_decay": entry.weight_decay,
        "numel": entry.numel,
        **chosen,
    }
