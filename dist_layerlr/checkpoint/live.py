"""The live side: what of a model and its optimizer is saved, and where a load puts it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from dist_layerlr.checkpoint.dcp import Run, Scalars, sizes
from dist_layerlr.checkpoint.manifest import Manifest, Stored
from dist_layerlr.checkpoint.rng import read_rng
from dist_layerlr.checkpoint.storage import Index
from dist_layerlr.errors import CheckpointError
from dist_layerlr.optim.groups import INITIAL_LR, LR
from dist_layerlr.optim.readback import live_pieces
from dist_layerlr.optim.segmented import Segmented
from dist_layerlr.plan.names import parse
from dist_layerlr.sharders import Piece, Pieces, Sharder, Weight, sharder_of
from dist_layerlr.sharders.base import local

WEIGHT, OPTIM, SAMPLE, RNG = "weight", "optim", "sample", "rng"
SAMPLES = 8
"""Elements by which a frozen tensor that is not saved is told from another model's."""


@dataclass(frozen=True, kw_only=True)
class Live:
    """A model and its optimizer, as one rank holds them."""

    sharder: Sharder
    weights: list[Weight]
    found: Pieces

    @cached_property
    def by_name(self) -> dict[str, Weight]:
        """Weights by canonical name."""
        return {w.name: w for w in self.weights}

    @property
    def optimizer_class(self) -> str:
        """What steps the elements: the inner optimizer of a segmented one."""
        optimizer = self.found.optimizer
        inner = (
            optimizer.inner
            if isinstance(optimizer, Segmented) and optimizer.inner is not None
            else optimizer
        )
        return type(inner).__name__

    @property
    def factor(self) -> float:
        """The schedule's multiplier: what the live rates are of their initial ones."""
        rates = ((p.group[LR], p.group.get(INITIAL_LR, 0.0)) for p in self.found.pieces)
        return next((float(lr) / float(initial) for lr, initial in rates if initial), 1.0)


def look(model: nn.Module, optimizer: Any) -> Live:
    """List everything. No sharder needs a collective for it."""
    sharder = sharder_of(model)
    # Weights come first: listing them reshards what a forward left gathered, and pieces are found
    # by identity.
    weights = sharder.weights()
    return Live(sharder=sharder, weights=weights, found=live_pieces(sharder, optimizer))


def describe(live: Live, *, frozen: bool | None) -> dict[str, Stored]:
    """The manifest's table.

    Args:
        live: this rank's.
        frozen: whether frozen parameters are saved; None: unless adapters train.
    """
    if frozen is None:
        frozen = not any(w.trainable and parse(w.name).is_adapter for w in live.weights)
    return {
        w.name: Stored(
            shape=tuple(w.shape),
            dtype=str(w.dtype).removeprefix("torch."),
            trainable=w.trainable,
            aliases=w.aliases,
            saved=frozen or w.trainable or w.is_buffer,
        )
        for w in live.weights
    }


def saved_runs(live: Live, table: Mapping[str, Stored], rank: int) -> tuple[list[Run], Scalars]:
    """Everything that this rank contributes to a checkpoint.

    Raises:
        CheckpointError: optimizer state that is not element by element.
    """
    stepped = {piece.name for piece in live.found.pieces}
    runs = [_rng_run(rank)]
    for weight in live.weights:
        if not table[weight.name].saved:
            runs += [sample for sample in [_sample(weight)] if sample is not None]
        elif weight.name not in stepped and weight.numel:
            runs.append(_weight_run(weight))
    numbers: Scalars = {}
    for piece in live.found.pieces:
        if piece.numel:
            size = prod(live.by_name[piece.name].shape)
            runs.append(piece_run(f"{WEIGHT}.{piece.name}", piece, piece.owner, size))
            runs += _state_runs(piece, live.found.optimizer, size, numbers)
    return runs, numbers


def _state_runs(piece: Piece, optimizer: Any, size: int, numbers: Scalars) -> list[Run]:
    runs = []
    for key, value in optimizer.state.get(piece.owner, {}).items():
        if (
            isinstance(value, Tensor)
            and value.ndim == 0
            and (key == "step" or local(piece.owner).ndim)
        ):
            numbers.setdefault(piece.name, {})[key] = (
                value.item(),
                str(value.dtype).removeprefix("torch."),
            )
        elif isinstance(value, Tensor) and _elementwise(local(value), local(piece.owner)):
            runs.append(piece_run(f"{OPTIM}.{piece.name}.{key}", piece, value, size))
        elif isinstance(value, (int, float)):
            numbers.setdefault(piece.name, {})[key] = (value, None)
        elif value is not None:
            what = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
            raise CheckpointError(
                f"Cannot save {key!r} of {piece.name}, a {type(value).__name__}{what}:"
                f" {type(optimizer).__name__} keeps state that is quantised or not element by"
                " element. Save it with the library's own tools, or use AdamW."
            )
    return runs


def _elementwise(value: Tensor, owner: Tensor) -> bool:
    """Whether state has one number for each element: not quantised (a tensor class of its own), not
    factored.
    """
    return type(value) in (Tensor, nn.Parameter) and value.numel() == owner.numel()


def piece_run(key: str, piece: Piece, tensor: Tensor, size: int) -> Run:
    """A piece's elements of its owner or of a state tensor laid out as the owner."""
    here = local(tensor).detach()
    if here.is_contiguous():
        flat = here.view(-1)[piece.offset : piece.offset + piece.numel]
        return Run(key=key, start=piece.start, size=size, tensor=flat)
    return Run(key=key, start=piece.start, size=size, tensor=here.reshape(-1), home=here)


def _weight_run(weight: Weight) -> Run:
    key = f"{WEIGHT}.{weight.name}"
    return Run(
        key=key, start=weight.start, size=prod(weight.shape), tensor=weight.tensor, home=weight.home
    )


def _sample(weight: Weight) -> Run | None:
    """This rank's part of a few elements, evenly spaced over the whole tensor."""
    size = prod(weight.shape)
    count = min(SAMPLES, size)
    places = [i * (size - 1) // max(count - 1, 1) for i in range(count)]
    mine = [
        i for i, place in enumerate(places) if weight.start <= place < weight.start + weight.numel
    ]
    if not mine:
        return None
    chosen = weight.tensor[[places[i] - weight.start for i in mine]]
    return Run(key=f"{SAMPLE}.{weight.name}", start=mine[0], size=count, tensor=chosen)


def _rng_run(rank: int) -> Run:
    state = read_rng()
    return Run(key=f"{RNG}.{rank}", start=0, size=state.numel(), tensor=state)


def rng_target(manifest: Manifest, index: Index, rank: int) -> Run:
    """Room for the saved random number generators of a rank.

    Rank 0's for one that the checkpoint does not know.
    """
    key = f"{RNG}.{rank if rank < manifest.ranks else 0}"
    size = sizes(index.metadata)[key][0]
    return Run(key=key, start=0, size=size, tensor=torch.empty(size, dtype=torch.uint8))


def sample_runs(live: Live, manifest: Manifest) -> list[tuple[Run, Run]]:
    """(what the live model has, room for what the checkpoint has) of every frozen tensor that was
    not saved.
    """
    pairs = []
    for weight in live.weights:
        saved = manifest.name_of(weight.name, weight.aliases)
        if (
            saved is not None
            and not manifest.parameters[saved].saved
            and (mine := _sample(weight)) is not None
        ):
            key = f"{SAMPLE}.{saved}"
            room = Run(
                key=key,
                start=mine.start,
                size=mine.size,
                tensor=torch.empty_like(mine.tensor, device="cpu"),
            )
            pairs.append((mine, room))
    return pairs


def same_values(mine: Tensor, saved: Tensor, saved_dtype: torch.dtype) -> bool:
    """Whether samples are of the same tensor, be it kept in another precision: they are compared in
    the coarser one.

    Args:
        mine: live values.
        saved: of ``mine``'s dtype.
        saved_dtype: what they were read from.
    """
    floats = saved_dtype.is_floating_point and mine.dtype.is_floating_point
    if floats and torch.finfo(saved_dtype).eps > torch.finfo(mine.dtype).eps:
        mine = mine.to(saved_dtype).to(mine.dtype)
    return torch.equal(mine, saved)


def weight_targets(live: Live, manifest: Manifest) -> list[Run]:
    """Where saved weights go: into fp32 masters where there are, else into the weights
    themselves.
    """
    stepped = {piece.name for piece in live.found.pieces}
    saved = {w.name: manifest.name_of(w.name, w.aliases) for w in live.weights}
    here = {n: s for n, s in saved.items() if s is not None and manifest.parameters[s].saved}
    runs = [
        replace(_weight_run(w), key=f"{WEIGHT}.{here[w.name]}")
        for w in live.weights
        if w.name in here and w.name not in stepped and w.numel
    ]
    runs += [
        piece_run(f"{WEIGHT}.{here[p.name]}", p, p.owner, prod(live.by_name[p.name].shape))
        for p in live.found.pieces
        if p.name in here and p.numel
    ]
    return runs
