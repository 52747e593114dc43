"""Does it fit? Memory of a run per rank, from the model's config alone: no weight is read.

Weights, gradients and optimizer states are counted parameter by parameter as each sharder keeps
them; activations are counted on the meta device (``activations.py``). What is left out: the CUDA
context and the kernels' workspaces (1 to 2 GB), fragmentation, and buffers of NCCL.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_layerlr import fields
from dist_layerlr.offload import StreamPolicy, layout_from_names
from dist_layerlr.plan import ParamInfo, Plan, base_name, canonical_name, parse
from launch.trainer.activations import count_saved
from launch.trainer.ema import DEVICE
from launch.trainer.engines.wrap import blocks_of
from launch.trainer.families import get_family
from launch.trainer.families.base import Family, HasExample, live_config
from launch.trainer.optimizers import state_bytes
from launch.trainer.options import LORA, PUBLISHED_MODEL, RunOptions
from launch.trainer.published import PUBLISHED
from launch.trainer.weights import empty_model

GB = 1e9
FP32, BF16 = 4, 2
"""Bytes of an element."""
BUCKET = FP32 * 50_000_000
"""Bytes of ``reduce_bucket_size`` in ds_configs/."""
UNITS_GATHERED = 2
"""Whole units that FSDP2 and ZeRO 3 hold: the one that runs, and the one that is fetched ahead."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a model's parameters weigh."""

    trained: int
    """Elements that train."""
    frozen: int
    """Elements that do not."""
    frozen_bytes: int
    """Of one frozen element: 2 beside a LoRA under bf16, whose base files hold 16 bits."""
    state_bytes: float
    """Optimizer state per trained element, with the average of ``ema`` where the device has it."""
    largest_block: int
    """Bytes of the weights of the largest block."""
    largest_trained: int
    """Trained elements of the largest block."""

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return FP32 * self.trained + self.frozen_bytes * self.frozen


@dataclass(frozen=True, kw_only=True)
class Row:
    """Bytes on one rank under one sharder."""

    sharder: str
    ranks: int
    weights: float
    gathered: float
    """Whole units that are there only while they run."""
    gradients: float
    optimizer: float
    activations: float | None
    """None: the model cannot run on the meta device."""

    @property
    def total(self) -> float:
        """All that is counted."""
        kept = self.weights + self.gathered + self.gradients + self.optimizer
        return kept + (self.activations or 0.0)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One run on N cards."""

    title: str
    sizes: Sizes
    rows: tuple[Row, ...]
    card_gb: float

    def table(self) -> str:
        """A line about the model, then one row for each sharder."""
        whole = self.sizes.trained + self.sizes.frozen
        lines = [
            f"{self.title}: {whole:,} parameters, {self.sizes.trained:,} of them trained"
            f" ({self.sizes.trained / whole:.2%})",
            f"{'GB per rank':<12}{'ranks':>6}{'weights':>10}{'gathered':>10}"
            f"{'gradients':>11}{'optimizer':>11}"
            f"{'activations':>13}{'total':>9}   on cards of {self.card_gb:g} GB",
        ]
        for row in self.rows:
            kept = "-" if row.activations is None else f"{row.activations / GB:.2f}"
            fits = "fits" if row.total <= self.card_gb * GB else "too large"
            lines.append(
                f"{row.sharder:<12}{row.ranks:>6}{row.weights / GB:>10.2f}"
                f"{row.gathered / GB:>10.2f}{row.gradients / GB:>11.2f}"
                f"{row.optimizer / GB:>11.2f}{kept:>13}{row.total / GB:>9.2f}   {fits}"
            )
        return "\n".join(lines)


def measure(model: nn.Module, plan: Plan, options: RunOptions) -> Sizes:
    """Weigh the parameters of a meta model."""
    parameters = list(model.parameters())
    trained = _numel(p for p in parameters if p.requires_grad)
    half = options.training_method == LORA and options.train.dtype == "bf16"
    frozen_bytes = BF16 if half else FP32
    # An average lies on each rank like the state of an optimizer.
    averaged = FP32 if options.ema.on and options.ema.device == DEVICE else 0
    weights, trainable = [0], [0]
    for block in blocks_of(model, plan):
        moving = _numel(p for p in block.parameters() if p.requires_grad)
        still = _numel(p for p in block.parameters() if not p.requires_grad)
        weights.append(FP32 * moving + frozen_bytes * still)
        trainable.append(moving)
    return Sizes(
        trained=trained,
        frozen=_numel(parameters) - trained,
        frozen_bytes=frozen_bytes,
        state_bytes=state_bytes(options.optimizer) + averaged,
        largest_block=max(weights),
        largest_trained=max(trainable),
    )


def rows_of(sizes: Sizes, ranks: int, activations: float | None) -> list[Row]:
    """Return a row for each sharder on ``ranks`` cards."""
    gradients, state = FP32 * sizes.trained, sizes.state_bytes * sizes.trained
    # A sharded unit is gathered before it runs, and its gradients are whole until they are reduced.
    gathered = UNITS_GATHERED * sizes.largest_block
    whole_gradients = FP32 * sizes.largest_trained
    # DeepSpeed steps float32 copies of what a rank owns, beside the model's own weights.
    masters = FP32 * sizes.trained

    def row(
        sharder: str, weights: float, grads: float, optimizer: float, gathered: float = 0.0
    ) -> Row:
        return Row(
            sharder=sharder,
            ranks=1 if sharder == "none" else ranks,
            weights=weights,
            gathered=gathered,
            gradients=grads,
            optimizer=optimizer,
            activations=activations,
        )

    found = [row("none", sizes.weights, gradients, state)]
    if ranks > 1:
        owned = (state + masters) / ranks
        found += [
            # DDP reduces in buckets, a second copy of the gradients.
            row("ddp", sizes.weights, 2 * gradients, state),
            row(
                "fsdp2",
                sizes.weights / ranks,
                gradients / ranks,
                state / ranks,
                gathered + whole_gradients,
            ),
            row("zero 1", sizes.weights, gradients, owned, BUCKET),
            row("zero 2", sizes.weights, gradients / ranks, owned, BUCKET),
            row("zero 3", sizes.weights / ranks, gradients / ranks, owned, gathered + BUCKET),
        ]
    return found


def streamed_row(
    parameters: Sequence[ParamInfo], sizes: Sizes, policy: StreamPolicy, activations: float | None
) -> Row:
    """Return the row of one rank that streams its blocks (``memory.stagehand``).

    Trained weights of a full finetune are stepped on the host; adapters stay on the device.

    Args:
        parameters: Of the base, without adapters.
        sizes: Of the model.
        policy: How far ahead is fetched, and what stays.
        activations: What a forward pass keeps.
    """
    # A full finetune freezes the few names that get no gradient.
    full = sizes.trained > sizes.frozen
    resident = policy.resident_blocks if isinstance(policy.resident_blocks, int) else 0
    layout = layout_from_names(
        parameters,
        full=full,
        resident=resident,
        device_bytes=FP32 if full else sizes.frozen_bytes,
        min_numel=policy.min_numel,
    )
    units = [unit.device_bytes for unit in layout.units]
    held = sum(unit.device_bytes for unit in layout.units if unit.resident)
    slots = min(policy.slots, len(units)) * max(units)
    trained = 0 if full else sizes.trained
    return Row(
        sharder="streamed",
        ranks=1,
        weights=layout.fixed_bytes + held + FP32 * trained,
        gathered=slots,
        gradients=slots if full else FP32 * trained,
        optimizer=sizes.state_bytes * trained,
        activations=activations,
    )


def example(family: Any, model_config: Mapping[str, Any], sizes: Mapping[str, int]) -> Any:
    """Return one sample on the meta device, its lettered axes of these sizes."""
    if isinstance(family, HasExample):
        return family.example(model_config, sizes)
    sample = {}
    for name, axes in family.layout(model_config).items():
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in axes]
        sample[name] = torch.empty(shape, device="meta")
    return sample


def count_activations(family: Family, plan: Plan, options: RunOptions, sample: Any) -> float | None:
    """Count what a microbatch keeps for its backward, on the meta device.

    Args:
        family: Of the model.
        plan: Names the blocks.
        options: ``train.micro_batch`` samples, in ``train.dtype``, with ``train.checkpointing``.
        sample: One sample on the meta device.

    Returns:
        Bytes; None where the model cannot run without numbers.
    """
    micro = options.train.micro_batch or 1
    train = options.train

    def kept(checkpointing: bool) -> Any:
        told = replace(options, train=replace(train, checkpointing=checkpointing))
        model = empty_model(family, told).to("meta").train()
        batch = family.collate([sample] * micro)
        if train.dtype == "bf16":
            # There is no autocast on meta, and what it keeps is what a bf16 model keeps.
            for parameter in model.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
            model.register_forward_pre_hook(
                lambda module, args, given: (_halved(args), _halved(given)), with_kwargs=True
            )
        objective = family.objective(options.objective, Path(options.model_path))
        numbers = list(range(micro))
        return count_saved(
            lambda: objective.loss(model, batch, numbers, 0),
            model.parameters(),
            blocks_of(model, plan),
        )

    try:
        whole = kept(False)
        if not train.checkpointing:
            return float(whole.total)
        return float(kept(True).total + whole.largest_block)
    # What a model does with numbers that do not exist is its own business, of any type.
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return None


def _halved(batch: Any) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.to(torch.bfloat16) if batch.is_floating_point() else batch
    if isinstance(batch, Mapping):
        return {key: _halved(value) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(_halved(value) for value in batch)
    return batch


def _numel(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def estimate(options: RunOptions, plan: Plan, ranks: int, card_gb: float) -> Estimate:
    """Estimate the memory of a run from its model's config.

    Args:
        options: Of the run; ``train.micro_batch`` samples a time, else one.
        plan: Of the model.
        ranks: Cards.
        card_gb: Memory of one, 1e9 bytes.

    Raises:
        ConfigError: a number out of range.
        ModelSourceError: no config of the model.
    """
    family = get_family(options.model_type, options.objective)
    model = empty_model(family, options)
    sizes = measure(model, plan, options)
    known = PUBLISHED.get(options.model_type)
    activations = None
    what = "activations are not counted"
    if known is not None:
        # The live config, which has the defaults of the class too.
        sample = example(family, live_config(model), known.sizes)
        activations = count_activations(family, plan, options, sample)
        what = f"{options.train.micro_batch or 1} x {known.sample}, {options.train.dtype}"
        what += ", checkpointing" if options.train.checkpointing else ""
    rows = rows_of(sizes, ranks, activations)
    policy = options.stream or StreamPolicy()
    rows.append(streamed_row(base_parameters(model), sizes, policy, activations))
    name = options.model_path
    if known is not None and name == PUBLISHED_MODEL:
        name = known.name
    title = f"{name} ({options.training_method}; {what})"
    return Estimate(title=title, sizes=sizes, rows=tuple(rows), card_gb=card_gb)


def base_parameters(model: nn.Module) -> list[ParamInfo]:
    """List the parameters of a model, its adapters left out."""
    found = []
    for name, parameter in model.named_parameters():
        known = canonical_name(name)
        if not parse(known).is_adapter:
            found.append(ParamInfo(name=base_name(known), shape=tuple(parameter.shape)))
    return found


def check_cards(ranks: int, card_gb: float) -> None:
    """Refuse a number of cards or a size that cannot be."""
    fields.integer(1)("--cards", ranks)
    fields.number(0.0, open_low=True)("--card-gb", card_gb)
