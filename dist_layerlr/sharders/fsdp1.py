"""FSDP1 (``FullyShardedDataParallel``): one flat parameter per wrapped unit.

With ``use_orig_params=True`` the original parameters stay, as 1-D views of this rank's shard, or empty. With False only
flat parameters are visible, with one learning rate each; there the rates are applied in segments.

Private, read in torch 2.13: ``module._handle.flat_param`` and its ``_fqns``, ``_shard_param_infos``, ``_params``,
``_numels``, ``_shapes``, ``_contiguities``, ``_shared_param_infos``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from dist_layerlr.adapters.base import (
    GROUPS,
    Piece,
    Pieces,
    Weight,
    buffers,
    innermost,
    internals_moved,
    parameters_with_names,
    resolve,
    segment,
    whole_weight,
    world_size,
)
from dist_layerlr.errors import ConfigError
from dist_layerlr.groups import build_groups
from dist_layerlr.model import FLAT_PARAM
from dist_layerlr.names import canonical_name
from dist_layerlr.plan import Plan
from dist_layerlr.segmented import MakeOptimizer, Slice
from dist_layerlr.segments import flat_ranges


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """What this rank's flat shard holds of one original parameter."""

    name: str
    flat: Any
    param: Tensor | None
    """The original parameter object, with use_orig_params."""
    offset: int
    """First element in the local flat shard."""
    numel: int
    start: int
    """First element in the flattened original parameter."""
    replicas: int
    shape: tuple[int, ...]
    """Of the whole parameter."""
    aliases: tuple[str, ...]
    """Other names tied to it."""
    in_order: bool
    """Whether memory order, in which FSDP1 flattens, is the order of elements."""

    @property
    def owner(self) -> Any:
        """What an optimizer holds: the original parameter, or the flat one."""
        return self.flat if self.param is None else self.param

    @property
    def trainable(self) -> bool:
        """Whether it requires a gradient."""
        return bool(self.owner.requires_grad)


class Fsdp1Adapter:
    """Flat parameters, by the handle's own map of original names."""

    def __init__(self) -> None:
        self.label = "fsdp1"

    def handles(self, model: nn.Module) -> bool:
        """Whether any module is a ``FullyShardedDataParallel``."""
        found = any(c.__name__ == "FullyShardedDataParallel" for m in model.modules() for c in type(m).__mro__)
        if found and any(n.rpartition(".")[2] == "_flat_param" for n, _ in model.named_parameters()):
            self.label = "fsdp1 flat"
        return found

    def attach(self, plan: Plan, model: nn.Module, make: MakeOptimizer, emission: str) -> Optimizer:
        """Segments, or groups on the original parameters; flat parameters are always stepped in segments."""
        shards = [s for s in iterate_shards(model) if s.trainable]
        if emission != GROUPS or any(s.param is None for s in shards):
            return segment(plan, [_slice(s) for s in shards], make)
        return make(build_groups(plan, {s.name: s.param for s in shards if s.param is not None}))

    def pieces(self, model: nn.Module, optimizer: Any) -> Pieces:
        """Original parameters, or runs of flat parameters that a segmented or a naive optimizer holds."""
        inner = innermost(optimizer)
        by_owner: dict[int, list[Slice]] = {}
        shards = {s.name: s for s in iterate_shards(model)}
        for shard in shards.values():
            by_owner.setdefault(id(shard.owner), []).append(_slice(shard))
        pieces: list[Piece] = []
        strangers = 0
        for group in inner.param_groups:
            for param in group["params"]:
                found = by_owner.get(id(param), [])
                strangers += not found
                pieces += [
                    Piece(
                        name=s.name, group=group, owner=param, offset=s.offset, numel=s.numel,
                        start=shards[s.name].start, replicas=shards[s.name].replicas,
                    )
                    for s in found
                ]  # fmt: skip
        return resolve(Pieces(pieces=pieces, strangers=strangers, optimizer=inner))

    def weights(self, model: nn.Module) -> list[Weight]:
        """Runs of the flat shards; parameters that FSDP1 was told to ignore are whole.

        Raises:
            ConfigError: a parameter that was not contiguous: FSDP1 keeps its elements in the order of its memory.
        """
        found = [_weight(s) for s in iterate_shards(model)]
        known = {name for w in found for name in (w.name, *w.aliases)}
        ignored = [
            whole_weight(name, param, world_size(), aliases=aliases, trainable=param.requires_grad)
            for param, name, aliases in parameters_with_names(model)
            if name not in known and name.rpartition(".")[2] != FLAT_PARAM
        ]
        return [*found, *ignored, *buffers(model)]

    def refresh(self, model: nn.Module, optimizer: Any) -> None:
        """Nothing to do: low-precision and gathered copies are made anew in every forward."""


def _weight(shard: Shard) -> Weight:
    if not shard.in_order:
        raise ConfigError(
            f"{shard.name} was not contiguous (channels_last, or transposed) when FSDP1 flattened it, so its runs "
            "cannot be saved or loaded. Make it contiguous before FSDP wraps it, or shard with FSDP2."
        )
    flat = shard.flat.detach().view(-1)[shard.offset : shard.offset + shard.numel]
    return Weight(
        name=shard.name, aliases=shard.aliases, tensor=flat, start=shard.start, shape=shard.shape,
        trainable=shard.trainable, replicas=shard.replicas,
    )  # fmt: skip


def _slice(shard: Shard) -> Slice:
    offset = 0 if shard.param is not None else shard.offset
    return Slice(name=shard.name, owner=shard.owner, offset=offset, numel=shard.numel)


def iterate_shards(model: nn.Module) -> Iterator[Shard]:
    """This rank's part of every original parameter, in flattening order.

    Raises:
        PlanMismatch: the private attributes this relies on have changed.
    """
    for path, module in model.named_modules():
        handle = getattr(module, "_handle", None)
        if handle is None or not any(c.__name__ == "FullyShardedDataParallel" for c in type(module).__mro__):
            continue
        try:
            yield from _unit(canonical_name(path), handle.flat_param, handle)
        except AttributeError as error:
            raise internals_moved("FSDP1", "torch 2.13", str(error)) from None


def _unit(path: str, flat: Any, handle: Any) -> Iterator[Shard]:
    sharded = handle.uses_sharded_strategy
    ranks = handle.world_size if sharded else 1
    replicas = world_size() // ranks
    infos = flat._shard_param_infos
    originals = flat._params or [None] * len(flat._fqns)
    prefix = f"{path}." if path else ""
    tied = _tied(prefix, flat)
    if sharded and flat._params is None:
        _check_ranges(flat, infos, handle)
    columns = zip(flat._fqns, infos, originals, flat._shapes, flat._contiguities, strict=True)
    for fqn, info, param, shape, contiguous in columns:
        numel = info.numel_in_shard or 0
        yield Shard(
            name=canonical_name(prefix + fqn),
            flat=flat,
            param=param,
            offset=info.offset_in_shard or 0 if info.in_shard else 0,
            numel=numel if info.in_shard else 0,
            start=info.intra_param_start_idx or 0 if info.in_shard else 0,
            replicas=replicas,
            shape=tuple(shape),
            aliases=tuple(tied.get(canonical_name(fqn), ())),
            in_order=contiguous,
        )


def _tied(prefix: str, flat: Any) -> dict[str, list[str]]:
    """{first name in the unit: canonical other names}."""
    tied: dict[str, list[str]] = {}
    for info in flat._shared_param_infos:
        first = ".".join(s for s in (info.prim_module_name, info.prim_param_name) if s)
        other = ".".join(s for s in (info.module_name, info.param_name) if s)
        tied.setdefault(canonical_name(first), []).append(canonical_name(prefix + other))
    return tied


def _check_ranges(flat: Any, infos: Any, handle: Any) -> None:
    """Flattening must be what ``segments.flat_ranges`` says, which the simulation of large jobs uses too."""
    wanted = flat_ranges(list(flat._numels), handle.world_size, handle.rank)
    for fqn, info, (start, numel) in zip(flat._fqns, infos, wanted, strict=True):
        live = (info.intra_param_start_idx, info.numel_in_shard) if info.in_shard else (0, 0)
        if live != (start, numel):
            raise internals_moved("FSDP1", "torch 2.13", f"the shard of {fqn} ({live}, computed {(start, numel)})")
