"""The live side: what of a model and its optimizer is saved, and where a load puts it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from dist_layerlr import ranks
from dist_layerlr.checkpoint.dcp import Scalars, StoredSpan, sizes
from dist_layerlr.checkpoint.index import OPTIM, RNG, WEIGHT, Index
from dist_layerlr.checkpoint.manifest import Manifest, TensorRecord
from dist_layerlr.checkpoint.rng import read_rng
from dist_layerlr.checkpoint.samples import sample_of
from dist_layerlr.errors import CheckpointError
from dist_layerlr.optim.any_whole import AnyWhole
from dist_layerlr.optim.fused import STEP
from dist_layerlr.optim.groups import OPTIMIZER
from dist_layerlr.optim.readback import factor_in_force, live_pieces, state_of
from dist_layerlr.optim.routed import Routed, parts_of
from dist_layerlr.optim.segmented import Segmented
from dist_layerlr.optim.timed import step_of
from dist_layerlr.plan.names import of_rank, parse, without_rank
from dist_layerlr.sharders import Piece, Pieces, Sharder, Weight, sharder_of
from dist_layerlr.sharders.base import local
from dist_layerlr.sharders.distinct import distinct_names

Counters = dict[str, tuple[float, str | None]]
"""{state key: (value, dtype of the tensor that held it, or None for a plain number)}."""


@dataclass(frozen=True, kw_only=True)
class Live:
    """A model and its optimizer, as one rank holds them."""

    sharder: Sharder
    weights: list[Weight]
    """A name has one for each separate run of its elements. Names of parameters that differ by rank
    on purpose end in ``@rankN`` here, and in the checkpoint."""
    found: Pieces

    @cached_property
    def by_name(self) -> dict[str, Weight]:
        """One weight of each canonical name, for what all of them have in common."""
        return {w.name: w for w in self.weights}

    @cached_property
    def of_all_ranks(self) -> dict[str, Weight]:
        """``by_name``, and what other ranks hold under names of their own."""
        table: dict[str, Weight] = {}
        for name, weight in self.by_name.items():
            own = without_rank(name)
            if own is None:
                table[name] = weight
                continue
            for rank in range(ranks.world_size()):
                aliases = tuple(of_rank(str(without_rank(a)), rank) for a in weight.aliases)
                named = of_rank(own, rank)
                table[named] = replace(weight, name=named, aliases=aliases)
        return table

    @cached_property
    def distinct(self) -> frozenset[str]:
        """Parameters that differ by rank on purpose."""
        return frozenset(own for name in self.by_name if (own := without_rank(name)) is not None)

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
        if self.routed is not None:
            return "+".join(map(self.routed.kind_of, self.routed.parts))
        if isinstance(optimizer, Segmented) and optimizer.inner is not None:
            optimizer = optimizer.inner
        return type(optimizer).__name__

    @cached_property
    def routed(self) -> Routed | None:
        """The several optimizers of a plan that names them."""
        return parts_of(self.found.optimizer)

    @cached_property
    def steppers(self) -> dict[str, str]:
        """{name: class of the optimizer that steps it}; empty where there is one for all."""
        if self.routed is None:
            return {}
        return {p.name: self.routed.kind_of(p.group[OPTIMIZER]) for p in self.found.pieces}

    def is_own(self, piece: Piece, key: str) -> bool:
        """Whether an entry of the state of a piece's tensor is of the optimizer that steps it."""
        return self.routed is None or self.routed.takes(piece.group[OPTIMIZER], key)

    @property
    def factor(self) -> float:
        """The schedule's multiplier that is in force."""
        return factor_in_force(self.found)


def look(model: nn.Module, optimizer: Any) -> Live:
    """List everything. No sharder needs a collective for it.

    Raises:
        CheckpointError: an optimizer that keeps its state where nobody can list it, or a parameter
            that differs by rank and is sharded as well.
    """
    if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__):
        raise CheckpointError(
            "Cannot save or load ZeroRedundancyOptimizer: each rank keeps the state of its own"
            " parameters in an optimizer inside, and a load would leave that empty. Use its own"
            " consolidate_state_dict, or shard with FSDP2 or ZeRO."
        )
    routed = parts_of(optimizer if optimizer is not None else getattr(model, "optimizer", None))
    for label, part in routed.parts.items() if routed is not None else ():
        if isinstance(part, AnyWhole):
            raise CheckpointError(
                f"Cannot save or load {label} ({part.kind}): it keeps its state for whole matrices,"
                " each on one rank. Use torch.optim.Muon, whose momentum lies with the weights."
            )
    sharder = sharder_of(model)
    # Weights come first: listing them reshards what a forward left gathered, and pieces are found
    # by identity.
    weights = sharder.weights()
    found = live_pieces(sharder, optimizer)
    # From here on a name that differs by rank is one name for each rank.
    apart = distinct_names(model, {weight.name for weight in weights if not weight.is_buffer})
    if apart:
        weights = [_of_this_rank(weight) if weight.name in apart else weight for weight in weights]
        pieces = [
            replace(p, name=of_rank(p.name, ranks.rank()), replicas=1) if p.name in apart else p
            for p in found.pieces
        ]
        found = replace(found, pieces=pieces)
        _check_whole(weights)
    return Live(sharder=sharder, weights=weights, found=found)


def _of_this_rank(weight: Weight) -> Weight:
    aliases = tuple(of_rank(alias, ranks.rank()) for alias in weight.aliases)
    return replace(weight, name=of_rank(weight.name, ranks.rank()), aliases=aliases, replicas=1)


def _check_whole(weights: Iterable[Weight]) -> None:
    """What is saved once per rank must be whole on each."""
    held: Counter[str] = Counter()
    for weight in weights:
        held[weight.name] += weight.numel
    for weight in weights:
        own = without_rank(weight.name)
        if own is not None and held[weight.name] != prod(weight.shape):
            raise CheckpointError(
                f"Cannot save or load {own}: it differs by rank on purpose (mark_distinct) and is"
                f" sharded as well, so that this rank holds {held[weight.name]} of its"
                f" {prod(weight.shape)} elements. Give it a placement on a mesh of all ranks that"
                " hold a part of it (expert parallelism as Shard), and no mark."
            )


def describe(live: Live, *, frozen: bool | None) -> dict[str, TensorRecord]:
    """The manifest's table.

    Args:
        live: this rank's.
        frozen: whether frozen parameters are saved; None: unless adapters train.
    """
    if frozen is None:
        frozen = not any(w.trainable and parse(w.name).is_adapter for w in live.weights)
    table: dict[str, TensorRecord] = {}
    for name, weight in live.of_all_ranks.items():
        table[name] = TensorRecord(
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
            # A few values of a frozen weight that is not saved: a load compares them, so that an
            # adapter is not put onto another base.
            sample = sample_of(weight, weight.name)
            spans += [sample] if sample is not None else []
        # What is stepped is saved from its owner below: under ZeRO that is the fp32 master, of
        # which the weight here is a rounded copy.
        elif weight.name not in live.stepped and weight.numel:
            spans.append(_weight_span(weight, weight.name))
    numbers: Scalars = {}
    # An owner has many pieces: names that share a flat tensor, or runs of one DTensor.
    # Its state is read once: each counter on a device is waited for.
    states: dict[int, tuple[dict[str, Tensor], Counters]] = {}
    apart = step_of(live.found.optimizer) is not None
    for piece in live.found.pieces:
        if not piece.numel:
            continue
        owner = id(piece.owner)
        # Under a plan with timings names that share a tensor have counters of their own.
        if owner not in states or apart:
            states[owner] = _read_state(piece, live.found.optimizer)
        tensors, counters = states[owner]
        if apart and counters.get(STEP, (1.0, None))[0] == 0.0:
            # What has not been stepped yet only has room for state.
            tensors, counters = {"": tensors[""]}, {}
        size = live.size(piece.name)
        for key, tensor in tensors.items():
            # Several optimizers may share a flat tensor, whose state then has the keys of all of
            # them.
            if key and not live.is_own(piece, key):
                continue
            kind = f"{OPTIM}.{piece.name}.{key}" if key else f"{WEIGHT}.{piece.name}"
            spans.append(piece_span(kind, piece, tensor, size))
        own = {key: value for key, value in counters.items() if live.is_own(piece, key)}
        if own:
            numbers.setdefault(piece.name, {}).update(own)
    return spans, numbers


def _read_state(piece: Piece, optimizer: Any) -> tuple[dict[str, Tensor], Counters]:
    """({state key: elementwise state, local}, counters) of a piece's owner; itself under ``""``."""
    tensors = {"": local(piece.owner)}
    counters: Counters = {}
    for key, value in state_of(optimizer, piece).items():
        if _is_counter(key, value, piece.owner):
            counters[key] = (value.item(), str(value.dtype).removeprefix("torch."))
        elif isinstance(value, Tensor) and _elementwise(local(value), tensors[""]):
            tensors[key] = local(value)
        elif isinstance(value, (int, float)):
            counters[key] = (value, None)
        elif value is not None:
            what = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
            raise CheckpointError(
                f"Cannot save {key!r} of {piece.name}, a {type(value).__name__}{what}:"
                f" {type(optimizer).__name__} keeps state that is quantised or not element by"
                " element. Save it with the library's own tools, or use AdamW."
            )
    return tensors, counters


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
    """A piece's elements of its owner or of a state tensor laid out as the owner.

    Raises:
        CheckpointError: a part of a tensor that lies in memory in another order.
    """
    here = local(tensor).detach()
    flat, home = here, None
    if here.is_contiguous():
        flat = here.view(-1)[piece.offset : piece.offset + piece.numel]
    elif piece.numel == here.numel():
        # No view shows the elements in order. The copy is all of the tensor; a load copies it back
        # (write_home).
        flat, home = here.reshape(-1), here
    else:
        raise CheckpointError(
            f"{key} is cut along a later dimension than the first and lies in memory in another"
            " order (channels_last, or transposed). Make it contiguous before it is placed."
        )
    return StoredSpan(
        name=key,
        start=piece.start,
        numel=flat.numel(),
        size=size,
        replicas=piece.replicas,
        tensor=flat,
        home=home,
    )


def _weight_span(weight: Weight, saved_name: str) -> StoredSpan:
    return StoredSpan(
        name=f"{WEIGHT}.{saved_name}",
        start=weight.start,
        numel=weight.tensor.numel(),
        size=prod(weight.shape),
        # Running statistics of each rank's own batches may differ; rank 0's are kept.
        replicas=1 if weight.is_buffer else weight.replicas,
        tensor=weight.tensor,
        home=weight.home,
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
        mine = sample_of(weight, saved)
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


def weight_targets(live: Live, manifest: Manifest) -> list[StoredSpan]:
    """Where saved weights go: into fp32 masters where there are, else into the weights."""
    saved_names: dict[str, str] = {}
    for weight in live.weights:
        saved = manifest.name_of(weight.name, weight.aliases)
        if saved is not None and manifest.parameters[saved].saved:
            saved_names[weight.name] = saved
    spans: list[StoredSpan] = []
    for weight in live.weights:
        # What is stepped is read into its owner; `Sharder.refresh` makes the weight from it
        # afterwards.
        if weight.name in saved_names and weight.name not in live.stepped and weight.numel:
            spans.append(_weight_span(weight, saved_names[weight.name]))
    for piece in live.found.pieces:
        if piece.name in saved_names and piece.numel:
            key = f"{WEIGHT}.{saved_names[piece.name]}"
            spans.append(piece_span(key, piece, piece.owner, live.size(piece.name)))
    return spans
