"""FSDP1 (``FullyShardedDataParallel``): one flat parameter per wrapped unit.

With ``use_orig_params=True`` the original parameters stay, as 1-D views of this rank's shard, or empty. With False only
flat parameters are visible, with one learning rate each; here per-name views of the flat shard are stepped instead.

Private, read in torch 2.13: ``module._handle.flat_param`` and its ``_fqns``, ``_shard_param_infos``, ``_params``,
``_numels``, ``_shared_param_infos``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_layerlr.adapters.base import MakeOptimizer, Piece, Pieces, innermost, internals_moved, world_size
from dist_layerlr.errors import PlanMismatch
from dist_layerlr.groups import build_groups
from dist_layerlr.names import canonical_name
from dist_layerlr.plan import Plan
from dist_layerlr.segments import flat_ranges

VIEWS = "_dist_layerlr_views"  # attribute of an optimizer that steps views; never checkpointed


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

    def attach(self, plan: Plan, model: nn.Module, make: MakeOptimizer) -> Optimizer:
        """Groups on the original parameters, or on views of the flat shards."""
        shards = [s for s in iterate_shards(model) if s.flat.requires_grad or s.param is not None]
        if all(s.param is not None for s in shards):
            live = {s.name: s.param for s in shards if s.param is not None and s.param.requires_grad}
            return make(build_groups(plan, live))
        views = FlatViews(shards)
        return views.drive(make(build_groups(plan, views.by_name())))

    def pieces(self, model: nn.Module, optimizer: Any) -> Pieces:
        """Views, original parameters, or whole flat parameters that somebody else put into an optimizer."""
        inner = innermost(optimizer)
        views: FlatViews | None = getattr(inner, VIEWS, None)
        by_owner: dict[int, list[tuple[Shard, int]]] = {}
        for shard in iterate_shards(model):
            view = views.view_of(shard) if views is not None else None
            owner = view if view is not None else shard.param if shard.param is not None else shard.flat
            offset = shard.offset if owner is shard.flat else 0
            by_owner.setdefault(id(owner), []).append((shard, offset))
        pieces: list[Piece] = []
        strangers = 0
        for group in inner.param_groups:
            for param in group["params"]:
                found = by_owner.get(id(param), [])
                strangers += not found
                pieces += [
                    Piece(
                        name=s.name, group=group, owner=param, offset=offset, numel=s.numel, start=s.start,
                        replicas=s.replicas,
                    )
                    for s, offset in found
                ]  # fmt: skip
        return Pieces(pieces=pieces, strangers=strangers, optimizer=inner)


def iterate_shards(model: nn.Module) -> Iterator[Shard]:
    """This rank's part of every original parameter, in flattening order.

    Raises:
        PlanMismatch: the private attributes this relies on have changed.
    """
    for path, module in model.named_modules():
        handle = getattr(module, "_handle", None)
        if handle is None or not any(c.__name__ == "FullyShardedDataParallel" for c in type(module).__mro__):
            continue
        flat = handle.flat_param
        try:
            yield from _unit(canonical_name(path), flat, handle)
        except AttributeError as error:
            raise internals_moved("FSDP1", "torch 2.13", str(error)) from None


def _unit(path: str, flat: Any, handle: Any) -> Iterator[Shard]:
    sharded = handle.uses_sharded_strategy
    ranks = handle.world_size if sharded else 1
    replicas = world_size() // ranks
    infos = flat._shard_param_infos
    originals = flat._params or [None] * len(flat._fqns)
    prefix = f"{path}." if path else ""
    if sharded and flat._params is None:
        _check_ranges(flat, infos, handle)
    for fqn, info, param in zip(flat._fqns, infos, originals, strict=True):
        numel = info.numel_in_shard or 0
        yield Shard(
            name=canonical_name(prefix + fqn),
            flat=flat,
            param=param,
            offset=info.offset_in_shard or 0 if info.in_shard else 0,
            numel=numel if info.in_shard else 0,
            start=info.intra_param_start_idx or 0 if info.in_shard else 0,
            replicas=replicas,
        )


def _check_ranges(flat: Any, infos: Any, handle: Any) -> None:
    """Flattening must be what ``segments.flat_ranges`` says, which the simulation of large jobs uses too."""
    wanted = flat_ranges(list(flat._numels), handle.world_size, handle.rank)
    for fqn, info, (start, numel) in zip(flat._fqns, infos, wanted, strict=True):
        live = (info.intra_param_start_idx, info.numel_in_shard) if info.in_shard else (0, 0)
        if live != (start, numel):
            raise internals_moved("FSDP1", "torch 2.13", f"the shard of {fqn} ({live}, computed {(start, numel)})")


class FlatViews:
    """Per-name Parameters that share storage with the flat shards, and the hooks that keep them fresh."""

    def __init__(self, shards: list[Shard]):
        self._shards = [s for s in shards if s.flat.requires_grad]
        self._views = [nn.Parameter(s.flat.data[s.offset : s.offset + s.numel]) for s in self._shards]
        self._index = {(s.name): i for i, s in enumerate(self._shards)}

    def by_name(self) -> dict[str, Tensor]:
        """{canonical name: view}; empty views where this rank holds nothing, so that groups agree on all ranks."""
        return {s.name: v for s, v in zip(self._shards, self._views, strict=True)}

    def view_of(self, shard: Shard) -> Tensor | None:
        """The view that is stepped for a shard."""
        index = self._index.get(shard.name)
        return None if index is None else self._views[index]

    def drive(self, optimizer: Optimizer) -> Optimizer:
        """Bind gradients before each step; clear the flat gradients after it and in ``zero_grad``."""
        optimizer.register_step_pre_hook(lambda *_: self._bind())
        optimizer.register_step_post_hook(lambda *_: self._clear())
        original = optimizer.zero_grad

        def zero_grad(set_to_none: bool = True) -> None:
            self._clear()
            original(set_to_none)

        optimizer.zero_grad = zero_grad  # type: ignore[method-assign]
        setattr(optimizer, VIEWS, self)
        return optimizer

    @torch.no_grad()
    def _bind(self) -> None:
        for shard, view in zip(self._shards, self._views, strict=True):
            flat = shard.flat
            # FSDP may have reallocated the shard (lazy init, offload).
            live = flat.data[shard.offset : shard.offset + shard.numel]
            if live.numel() != shard.numel:
                raise PlanMismatch(
                    f"The flat shard of {shard.name} has {flat.numel()} elements inside optimizer.step(). "
                    "Step outside summon_full_params and after backward has finished."
                )
            if view.data_ptr() != live.data_ptr():
                view.data = live
            gradient = flat.grad
            view.grad = None if gradient is None else gradient[shard.offset : shard.offset + shard.numel]

    def _clear(self) -> None:
        for shard in self._shards:
            shard.flat.grad = None
