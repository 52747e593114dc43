"""The live side: what of a model and its optimizer is saved, and where a load puts it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from dist_layerlr.checkpoint.dcp import Scalars, StoredSpan, sizes
from dist_layerlr.checkpoint.index import OPTIM, RNG, SAMPLE, SAMPLES, WEIGHT, Index
from dist_layerlr.checkpoint.manifest import Manifest, TensorRecord
from dist_layerlr.checkpoint.rng import read_rng
from dist_layerlr.errors import CheckpointError
from dist_layerlr.optim.readback import factor_in_force, live_pieces
from dist_layerlr.optim.segmented import Segmented
from dist_layerlr.plan.names import parse
from dist_layerlr.sharders import Piece, Pieces, Sharder, Weight, sharder_of
from dist_layerlr.sharders.base import local, sample_places


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

    @cached_property
    def stepped(self) -> frozenset[str]:
        """Names whose truth is with the optimizer: its owner is the weight, or the fp32 master."""
        return frozenset(piece.name for piece in self.found.pieces)

    def size(self, name: str) -> int:
        """Elements of the whole tensor."""
        return prod(self.by_name[name].shape)

    @property
    def optimizer_class(self) -> str:
        """What steps the elements: the inner optimizer of a segmented one."""
        optimizer = self.found.optimizer
        if isinstance(optimizer, Segmented) and optimizer.inner is not None:
            optimizer = optimizer.inner
        return type(optimizer).__name__

    @property
    def factor(self) -> float:
        """The schedule's multiplier that is in force."""
        return factor_in_force(self.found)


def look(model: nn.Module, optimizer: Any) -> Live:
    """List everything. No sharder needs a collective for it."""
    sharder = sharder_of(model)
    # Weights come first: listing them reshards what a forward left gathered, and pieces are found
    # by identity.
    weights = sharder.weights()
    return Live(sharder=sharder, weights=weights, found=live_pieces(sharder, optimizer))


def describe(live: Live, *, frozen: bool | None) -> dict[str, TensorRecord]:
    """The manifest's table.

    Args:
        live: this rank's.
        frozen: whether frozen parameters are saved; None: unless adapters train.
    """
    if frozen is None:
        frozen = not any(w.trainable and parse(w.name).is_adapter for w in live.weights)
    table: dict[str, TensorRecord] = {}
    for weight in live.weights:
        table[weight.name] = TensorRecord(
            shape=tuple(weight.shape),
            dtype=str(weight.dtype).removeprefix("torch."),
            trainable=weight.trainable,
            aliases=weight.aliases,
            saved=frozen or weight.trainable or weight.is_buffer,
        )
    return table


def saved_spans(
    live: Live, table: Mapping[str, TensorRecord], rank: int
) -> tuple[list[StoredSpan], Scalars]:
    """Everything that this rank contributes to a checkpoint.

    Raises:
        CheckpointError: optimizer state that is not element by element.
    """
    spans = [_rng_span(rank)]
    for weight in live.weights:
        if not table[weight.name].saved:
            sample = _sample(weight, weight.name)
            spans += [sample] if sample is not None else []
        elif weight.name not in live.stepped and weight.numel:
            spans.append(_weight_span(weight, weight.name))
    numbers: Scalars = {}
    for piece in live.found.pieces:
        if piece.numel:
            size = live.size(piece.name)
            spans.append(piece_span(f"{WEIGHT}.{piece.name}", piece, piece.owner, size))
            spans += _state_spans(piece, live.found.optimizer, size, numbers)
    return spans, numbers


def _state_spans(piece: Piece, optimizer: Any, size: int, numbers: Scalars) -> list[StoredSpan]:
    """Spans of elementwise state. Counters are added to ``numbers``."""
    spans = []
    for key, value in optimizer.state.get(piece.owner, {}).items():
        if _is_counter(key, value, piece.owner):
            dtype = str(value.dtype).removeprefix("torch.")
            numbers.setdefault(piece.name, {})[key] = (value.item(), dtype)
        elif isinstance(value, Tensor) and _elementwise(local(value), local(piece.owner)):
            spans.append(piece_span(f"{OPTIM}.{piece.name}.{key}", piece, value, size))
        elif isinstance(value, (int, float)):
            numbers.setdefault(piece.name, {})[key] = (value, None)
        elif value is not None:
            what = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
            raise CheckpointError(
                f"Cannot save {key!r} of {piece.name}, a {type(value).__name__}{what}:"
                f" {type(optimizer).__name__} keeps state that is quantised or not element by"
                " element. Save it with the library's own tools, or use AdamW."
            )
    return spans


def _is_counter(key: str, value: object, owner: Tensor) -> bool:
    """Whether a state tensor is one number for all elements.

    A 0-d parameter has 0-d moments, which are elementwise state; its ``step`` is not.
    """
    if not isinstance(value, Tensor) or value.ndim:
        return False
    return key == "step" or local(owner).ndim > 0


def _elementwise(value: Tensor, owner: Tensor) -> bool:
    """Whether state has one number for each element.

    Quantised state has a tensor class of its own, and factored state fewer elements.
    """
    return type(value) in (Tensor, nn.Parameter) and value.numel() == owner.numel()


def piece_span(key: str, piece: Piece, tensor: Tensor, size: int) -> StoredSpan:
    """A piece's elements of its owner or of a state tensor laid out as the owner."""
    here = local(tensor).detach()
    flat, home = here, None
    if here.is_contiguous():
        flat = here.view(-1)[piece.offset : piece.offset + piece.numel]
    else:
        # No view shows the elements in order. Only whole tensors keep such a layout, so that the
        # copy is all of it; a load copies it back (write_home).
        flat, home = here.reshape(-1), here
    return StoredSpan(
        name=key, start=piece.start, numel=flat.numel(), size=size, tensor=flat, home=home
    )


def _weight_span(weight: Weight, saved_name: str) -> StoredSpan:
    return StoredSpan(
        name=f"{WEIGHT}.{saved_name}",
        start=weight.start,
        numel=weight.tensor.numel(),
        size=prod(weight.shape),
        tensor=weight.tensor,
        home=weight.home,
    )


def _sample(weight: Weight, saved_name: str) -> StoredSpan | None:
    """This rank's part of a few elements, evenly spaced over the whole tensor."""
    places = sample_places(prod(weight.shape), SAMPLES)
    mine: list[int] = []
    for number, place in enumerate(places):
        if weight.start <= place < weight.start + weight.numel:
            mine.append(number)
    if not mine:
        return None
    # The sample is itself a tensor of up to SAMPLES elements, of which each rank holds a span.
    chosen = weight.tensor[[places[number] - weight.start for number in mine]]
    return StoredSpan(
        name=f"{SAMPLE}.{saved_name}",
        start=mine[0],
        numel=len(mine),
        size=len(places),
        tensor=chosen,
    )


def _rng_span(rank: int) -> StoredSpan:
    return _whole(f"{RNG}.{rank}", read_rng())


def _whole(key: str, tensor: Tensor) -> StoredSpan:
    numel = tensor.numel()
    return StoredSpan(name=key, start=0, numel=numel, size=numel, tensor=tensor)


def rng_target(manifest: Manifest, index: Index, rank: int) -> StoredSpan:
    """Room for the saved random number generators of a rank.

    Rank 0's for one that the checkpoint does not know.
    """
    key = f"{RNG}.{rank if rank < manifest.ranks else 0}"
    size = sizes(index.metadata)[key][0]
    return _whole(key, torch.empty(size, dtype=torch.uint8))


def sample_spans(live: Live, manifest: Manifest) -> list[tuple[StoredSpan, StoredSpan]]:
    """(live values, room for the saved ones) of every frozen tensor that was not saved."""
    pairs = []
    for weight in live.weights:
        saved = manifest.name_of(weight.name, weight.aliases)
        if saved is None or manifest.parameters[saved].saved:
            continue
        mine = _sample(weight, saved)
        if mine is not None:
            room = StoredSpan(
                name=mine.name,
                start=mine.start,
                numel=mine.numel,
                size=mine.size,
                tensor=torch.empty_like(mine.tensor, device="cpu"),
            )
            pairs.append((mine, room))
    return pairs


def same_values(mine: Tensor, saved: Tensor, saved_dtype: torch.dtype) -> bool:
    """Whether samples are of the same tensor, be it kept in another precision.

    They are compared in the coarser one.

    Args:
        mine: live values.
        saved: of ``mine``'s dtype.
        saved_dtype: what they were read from.
    """
    floats = saved_dtype.is_floating_point and mine.dtype.is_floating_point
    if floats and torch.finfo(saved_dtype).eps > torch.finfo(mine.dtype).eps:
        mine = mine.to(saved_dtype).to(mine.dtype)
    return torch.equal(mine, saved)


def weight_targets(live: Live, manifest: Manifest) -> list[StoredSpan]:
    """Where saved weights go: into fp32 masters where there are, else into the weights."""
    saved_names: dict[str, str] = {}
    for weight in live.weights:
        saved = manifest.name_of(weight.name, weight.aliases)
        if saved is not None and manifest.parameters[saved].saved:
            saved_names[weight.name] = saved
    spans: list[StoredSpan] = []
    for weight in live.weights:
        if weight.name in saved_names and weight.name not in live.stepped and weight.numel:
            spans.append(_weight_span(weight, saved_names[weight.name]))
    for piece in live.found.pieces:
        if piece.name in saved_names and piece.numel:
            key = f"{WEIGHT}.{saved_names[piece.name]}"
            spans.append(piece_span(key, piece, piece.owner, live.size(piece.name)))
    return spans
