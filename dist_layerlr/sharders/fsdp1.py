"""FSDP1 (``FullyShardedDataParallel``): one flat parameter per wrapped unit.

With ``use_orig_params=True`` the original parameters stay, as 1-D views of this rank's shard, or
empty. With False only flat parameters are visible, with one learning rate each; there the rates are
applied in segments.

Private, read in torch 2.13: ``module._handle.flat_param`` and its ``_fqns``,
``_shard_param_infos``, ``_params``, ``_numels``, ``_shapes``, ``_contiguities``,
``_shared_param_infos``, ``_param_extensions``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from dist_layerlr.errors import ConfigError
from dist_layerlr.plan.names import canonical_name
from dist_layerlr.ranks import world_size
from dist_layerlr.sharders.base import (
    Layout,
    Piece,
    Pieces,
    Sharder,
    Slice,
    Weight,
    buffers,
    innermost,
    internals_moved,
    parameters_with_names,
    whole_weight,
)
from dist_layerlr.sharders.model import FLAT_PARAM, Kinds, names_of_parameters
from dist_layerlr.sharders.ranges import flat_ranges


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard(Slice):
    """What this rank's flat shard holds of one original parameter.

    ``owner`` is what an optimizer holds: the original parameter (use_orig_params), or the flat one;
    ``offset`` counts in it.
    """

    flat: Any
    """The flat parameter."""
    flat_offset: int
    """First element in the local flat shard."""
    replicas: int
    shape: tuple[int, ...]
    """Of the whole parameter."""
    aliases: tuple[str, ...]
    """Other names tied to it."""
    in_order: bool
    """Whether memory order, in which FSDP1 flattens, is the order of elements."""

    @property
    def trainable(self) -> bool:
        """Whether it requires a gradient."""
        return self.owner.requires_grad


class Fsdp1Sharder(Sharder):
    """Flat parameters, by the handle's own map of original names."""

    @classmethod
    def handles(cls, kinds: Kinds) -> bool:
        """Whether any module is a ``FullyShardedDataParallel``."""
        return any(map(_is_unit, kinds.modules))

    def _read_layout(self) -> Layout:
        # FSDP1 registers the flat parameter under its name only without use_orig_params.
        flat = any(n.rpartition(".")[2] == FLAT_PARAM for n, _ in self.model.named_parameters())
        return Layout(name="fsdp1_flat" if flat else "fsdp1", shards=True, flat=flat)

    def slices(self) -> list[Slice]:
        """Original parameters, or runs of flat ones."""
        return [shard for shard in iterate_shards(self.model) if shard.trainable]

    def pieces(self, optimizer: Any) -> Pieces:
        """Original parameters, or every run of the flat parameters that an optimizer holds."""
        inner = innermost(optimizer)
        by_owner: dict[int, list[Shard]] = {}
        trained: dict[str, bool] = {}
        for shard in iterate_shards(self.model):
            by_owner.setdefault(id(shard.owner), []).append(shard)
            trained[shard.name] = shard.trainable
        for name, param in names_of_parameters(self.model):
            # What FSDP1 ignores, or does not wrap.
            if id(param) not in by_owner and name.rpartition(".")[2] != FLAT_PARAM:
                trained.setdefault(name, param.requires_grad)
        pieces: list[Piece] = []
        strangers = 0
        for group in inner.param_groups:
            for param in group["params"]:
                found = by_owner.get(id(param), [])
                strangers += not found
                pieces += [shard.piece(group, shard.replicas) for shard in found]
        return Pieces(pieces=pieces, requires_grad=trained, strangers=strangers, optimizer=inner)

    def weights(self) -> list[Weight]:
        """Runs of the flat shards; parameters that FSDP1 was told to ignore are whole.

        Raises:
            ConfigError: a parameter that was not contiguous: FSDP1 keeps its elements in the order
                of its memory.
        """
        found = [_weight(s) for s in iterate_shards(self.model)]
        known = {name for w in found for name in (w.name, *w.aliases)}
        ignored = [
            whole_weight(name, param, world_size(), aliases=aliases, trainable=param.requires_grad)
            for param, name, aliases in parameters_with_names(self.model)
            if name not in known and name.rpartition(".")[2] != FLAT_PARAM
        ]
        return [*found, *ignored, *buffers(self.model)]


def _is_unit(kind: type[nn.Module]) -> bool:
    return any(c.__name__ == "FullyShardedDataParallel" for c in kind.__mro__)


def _weight(shard: Shard) -> Weight:
    if not shard.in_order:
        raise ConfigError(
            f"{shard.name} was not contiguous (channels_last, or transposed) when FSDP1 flattened"
            " it, so its runs cannot be saved or loaded. Make it contiguous before FSDP wraps it,"
            " or shard with FSDP2."
        )
    return Weight(
        name=shard.name,
        start=shard.start,
        numel=shard.numel,
        aliases=shard.aliases,
        tensor=shard.flat.detach().view(-1)[shard.flat_offset : shard.flat_offset + shard.numel],
        shape=shard.shape,
        trainable=shard.trainable,
        replicas=shard.replicas,
    )


def iterate_shards(model: nn.Module) -> Iterator[Shard]:
    """This rank's part of every original parameter, in flattening order.

    Raises:
        PlanMismatch: the private attributes this relies on have changed.
        ConfigError: a parameter that tensor parallelism had cut.
    """
    for path, module in model.named_modules():
        handle = getattr(module, "_handle", None)
        if handle is None or not _is_unit(type(module)):
            continue
        try:
            yield from _unit(canonical_name(path), handle.flat_param, handle)
        except AttributeError as error:
            raise internals_moved("FSDP1", "torch 2.13", str(error)) from None


def _unit(path: str, flat: Any, handle: Any) -> Iterator[Shard]:
    sharded = handle.uses_sharded_strategy
    # The handle's world is the group that shards: all ranks, or a node's under HSDP, where the
    # others hold copies. NO_SHARD shards in none.
    ranks = handle.world_size if sharded else 1
    replicas = world_size() // ranks
    infos = flat._shard_param_infos
    # Without use_orig_params FSDP1 keeps no original parameters: the flat one is the owner.
    originals = flat._params or [None] * len(flat._fqns)
    prefix = f"{path}." if path else ""
    tied = _tied(prefix, flat)
    if sharded and flat._params is None:
        _check_ranges(flat, infos, handle)
    for fqn, extension in zip(flat._fqns, flat._param_extensions, strict=True):
        if extension is not None:
            raise ConfigError(
                f"{canonical_name(prefix + fqn)} was cut by tensor parallelism before FSDP1"
                " flattened it, which keeps no global shape. Use fully_shard (FSDP2)."
            )
    columns = zip(flat._fqns, infos, originals, flat._shapes, flat._contiguities, strict=True)
    for fqn, info, param, shape, contiguous in columns:
        # Of a parameter outside this rank's shard every number is None.
        flat_offset = (info.offset_in_shard or 0) if info.in_shard else 0
        yield Shard(
            name=canonical_name(prefix + fqn),
            start=(info.intra_param_start_idx or 0) if info.in_shard else 0,
            numel=(info.numel_in_shard or 0) if info.in_shard else 0,
            owner=flat if param is None else param,
            offset=flat_offset if param is None else 0,
            flat=flat,
            flat_offset=flat_offset,
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
        # FSDP1 keeps tied parameters once, and names the others relative to the wrapped unit.
        other = ".".join(s for s in (info.module_name, info.param_name) if s)
        tied.setdefault(canonical_name(first), []).append(canonical_name(prefix + other))
    return tied


def _check_ranges(flat: Any, infos: Any, handle: Any) -> None:
    """Flattening must be what ``ranges.flat_ranges`` says: simulated large jobs rely on it too."""
    wanted = flat_ranges(list(flat._numels), handle.world_size, handle.rank)
    for fqn, info, (start, numel) in zip(flat._fqns, infos, wanted, strict=True):
        live = (info.intra_param_start_idx, info.numel_in_shard) if info.in_shard else (0, 0)
        if live != (start, numel):
            raise internals_moved(
                "FSDP1", "torch 2.13", f"the shard of {fqn} ({live}, computed {(start, numel)})"
            )
