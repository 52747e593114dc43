"""What an adapter answers about live, sharded parameters: the pieces that this rank's optimizer steps.

Rates, element counts, optimizer state and observed updates all follow from the pieces, the same way for every sharder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_layerlr.errors import ConfigError, PlanMismatch
from dist_layerlr.groups import ParamGroup
from dist_layerlr.model import live_parameters, unwrap
from dist_layerlr.names import canonical_name
from dist_layerlr.plan import Plan
from dist_layerlr.segmented import MakeOptimizer, Segmented, Slice, local

GROUPS, SEGMENTED, AUTO = "groups", "segmented", "auto"
EMISSIONS = (AUTO, GROUPS, SEGMENTED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A run of elements of one named parameter inside one tensor that the optimizer steps."""

    name: str
    """Canonical name."""
    group: ParamGroup
    """The live group that steps it."""
    owner: Tensor
    """The optimizer's parameter, key of its state."""
    offset: int
    """First element in the flattened local owner."""
    numel: int
    """Elements here; 0 for an empty shard."""
    start: int
    """First element in the flattened, unsharded parameter."""
    replicas: int = 1
    """Ranks that step each element."""

    def of(self, tensor: Tensor) -> Tensor:
        """The same run of a tensor laid out as the owner: its value, gradient or a moment. Flat, local."""
        return local(tensor).detach().reshape(-1)[self.offset : self.offset + self.numel]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """What this rank holds of one parameter, trained or frozen, or of one persistent buffer."""

    name: str
    """Canonical name; the first one where several are tied."""
    aliases: tuple[str, ...] = ()
    """Other names of the same tensor."""
    tensor: Tensor
    """Flat, local, the live storage itself; empty where the rank holds nothing. See ``home``."""
    home: Tensor | None = None
    """Set where the layout has no flat view (channels_last ...): ``tensor`` is a copy of this live tensor."""
    start: int = 0
    """First element in the flattened, unsharded tensor."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    trainable: bool = False
    """Whether it requires a gradient. Under ZeRO its fp32 master, among the pieces, is then the truth."""
    is_buffer: bool = False
    replicas: int = 1
    """Ranks that hold each element."""

    @property
    def numel(self) -> int:
        """Elements here; ``math.prod(shape)`` over all ranks."""
        return self.tensor.numel()

    @property
    def dtype(self) -> torch.dtype:
        """As stored here; ZeRO's low-precision copies are bf16 or fp16."""
        return self.tensor.dtype

    def settle(self) -> None:
        """Call after writing into ``tensor``: copies it to ``home``, if there is one."""
        if self.home is not None:
            self.home.copy_(self.tensor.view(self.home.shape))


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """All pieces of this rank."""

    pieces: list[Piece] = field(default_factory=list)
    strangers: int = 0
    """Tensors in the optimizer that are no parameter of the model (stale ones)."""
    optimizer: Any = None
    """The innermost optimizer, whose ``state`` is keyed by owners."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveParam:
    """How this rank's optimizer trains one parameter."""

    lr: float
    weight_decay: float
    numel: int
    """Elements that this rank steps; 0 for an empty shard."""
    replicas: int = 1
    """Number of ranks that step each element."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StatePiece:
    """Optimizer state of one piece."""

    start: int
    """First element in the flattened, unsharded parameter."""
    tensors: Mapping[str, Tensor]
    """State by key: flat tensors as long as the piece, or scalars (``step``)."""


class Adapter(Protocol):
    """One sharder. Knows how it hides names, and where its optimizer keeps the truth."""

    label: str
    """For people: `fsdp2`, `zero 2` ..."""

    def handles(self, model: nn.Module) -> bool:
        """Whether this sharder wraps the model."""
        ...

    def attach(self, plan: Plan, model: nn.Module, make: MakeOptimizer, emission: str) -> Optimizer:
        """Build the optimizer on live tensors, as ordinary groups or in segments."""
        ...

    def pieces(self, model: nn.Module, optimizer: Any) -> Pieces:
        """List what this rank's optimizer steps."""
        ...

    def weights(self, model: nn.Module) -> list[Weight]:
        """List what this rank holds of every parameter, frozen ones included, and of every persistent buffer."""
        ...

    def refresh(self, model: nn.Module, optimizer: Any) -> None:
        """Bring every copy that the sharder keeps in line with the weights, and with the masters where it has them.

        Collective. Call it after writing into ``weights`` or ``pieces``.
        """
        ...


def resolve(found: Pieces) -> Pieces:
    """Look inside a segmented optimizer: its inner groups hold the rates, and only bound slices are stepped."""
    optimizer = found.optimizer
    if not isinstance(optimizer, Segmented) or optimizer.inner is None:
        return found
    groups = optimizer.groups_by_name()
    pieces = [
        replace(p, group=groups[p.name])
        for p in found.pieces
        if p.name in groups and (optimizer.steps(p.name, p.owner, p.offset, p.numel) or not p.numel)
    ]
    return replace(found, pieces=pieces)


def segment_whole(plan: Plan, model: nn.Module, make: MakeOptimizer) -> Segmented:
    """A segmented optimizer on parameters that are stepped whole, or as whole local shards."""
    live = {name: p for name, p in live_parameters(model).items() if p.requires_grad}
    return segment(plan, [Slice(name=n, owner=p, offset=0, numel=local(p).numel()) for n, p in live.items()], make)


def segment(plan: Plan, slices: Iterable[Slice], make: MakeOptimizer) -> Segmented:
    """A segmented optimizer on the owners of ``slices``."""
    slices = list(slices)
    owners = {id(s.owner): s.owner for s in slices}
    return Segmented(plan, owners.values(), make, slices)


def read_back(found: Pieces) -> dict[str, LiveParam]:
    """{canonical name: live rate, weight decay, local elements}; pieces of one name are added up."""
    live: dict[str, LiveParam] = {}
    for piece in found.pieces:
        before = live.get(piece.name)
        live[piece.name] = LiveParam(
            lr=float(piece.group["lr"]),
            weight_decay=float(piece.group.get("weight_decay", 0.0)),
            numel=piece.numel + (before.numel if before else 0),
            replicas=piece.replicas,
        )
    return live


def repeated(found: Pieces) -> list[str]:
    """Names with two pieces that overlap: stepped twice."""
    seen: dict[str, list[tuple[int, int]]] = {}
    twice: dict[str, None] = {}
    for piece in found.pieces:
        end = piece.start + piece.numel
        for start, stop in seen.setdefault(piece.name, []):
            if max(start, piece.start) < min(stop, end) or (start, stop) == (piece.start, end):
                twice[piece.name] = None
        seen[piece.name].append((piece.start, end))
    return list(twice)


def state(found: Pieces) -> dict[str, list[StatePiece]]:
    """{canonical name: this rank's optimizer state}, views where the layout allows; empty before the first step."""
    result: dict[str, list[StatePiece]] = {}
    for piece in found.pieces:
        held = found.optimizer.state.get(piece.owner, {}) if found.optimizer is not None else {}
        tensors = {
            key: value if value.ndim == 0 else piece.of(value)
            for key, value in held.items()
            if isinstance(value, Tensor)
        }
        if tensors:
            result.setdefault(piece.name, []).append(StatePiece(start=piece.start, tensors=tensors))
    return result


def innermost(optimizer: Any) -> Any:
    """Look through wrappers such as AcceleratedOptimizer to the torch optimizer.

    Raises:
        ConfigError: there is none.
    """
    while not isinstance(optimizer, Optimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    while type(optimizer).__name__ == "AcceleratedOptimizer":
        optimizer = optimizer.optimizer
    if not hasattr(optimizer, "param_groups"):
        raise ConfigError(f"Invalid optimizer={optimizer!r}: give the torch optimizer that is stepped.")
    return optimizer


def pieces_by_identity(
    groups: Iterable[ParamGroup],
    names: Mapping[int, str],
    place: Callable[[Tensor], tuple[int, int, int]],
) -> tuple[list[Piece], int]:
    """Pieces of groups whose tensors are the model's own parameters, and the number of strangers.

    Args:
        groups: the live ``param_groups``.
        names: {id of a live parameter: canonical name}.
        place: parameter -> (start, local elements, replicas).
    """
    pieces: list[Piece] = []
    strangers = 0
    for group in groups:
        for param in group["params"]:
            name = names.get(id(param))
            if name is None:
                strangers += 1
                continue
            start, numel, replicas = place(param)
            pieces.append(
                Piece(name=name, group=group, owner=param, offset=0, numel=numel, start=start, replicas=replicas)
            )
    return pieces, strangers


def names_by_id(model: nn.Module) -> dict[int, str]:
    """{id of a live parameter: canonical name}."""
    return {id(param): name for name, param in live_parameters(model).items()}


def flat_view(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    """(flat local tensor, None) where a view exists, else (flat copy, the local tensor itself)."""
    here = local(tensor).detach()
    return (here.view(-1), None) if here.is_contiguous() else (here.reshape(-1), here)


def whole_weight(name: str, tensor: Tensor, replicas: int, **fields: Any) -> Weight:
    """A tensor that this rank holds whole."""
    flat, home = flat_view(tensor)
    return Weight(name=name, tensor=flat, home=home, shape=tuple(tensor.shape), replicas=replicas, **fields)


def tied_names(model: nn.Module) -> dict[int, list[str]]:
    """{id of a live parameter: its canonical names}, in the module's order; more than one where weights are tied."""
    names: dict[int, list[str]] = {}
    for raw, param in unwrap(model).named_parameters(remove_duplicate=False):
        known = names.setdefault(id(param), [])
        if canonical_name(raw) not in known:
            known.append(canonical_name(raw))
    return names


def parameters_with_names(model: nn.Module) -> list[tuple[nn.Parameter, str, tuple[str, ...]]]:
    """(live parameter, canonical name, its other names)."""
    names = tied_names(model)
    return [(p, names[id(p)][0], tuple(names[id(p)][1:])) for p in unwrap(model).parameters()]


def buffers(model: nn.Module) -> list[Weight]:
    """Persistent buffers: every sharder keeps them whole on every rank."""
    found: dict[int, Weight] = {}
    for path, module in unwrap(model).named_modules():
        for leaf, buffer in module.named_buffers(recurse=False):
            if leaf not in module._non_persistent_buffers_set and id(buffer) not in found:
                name = canonical_name(f"{path}.{leaf}" if path else leaf)
                found[id(buffer)] = whole_weight(name, buffer, world_size(), is_buffer=True)
    return list(found.values())


def world_size() -> int:
    """Ranks in the default process group; 1 without one."""
    dist = torch.distributed
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def internals_moved(library: str, version: str, what: str) -> PlanMismatch:
    """The one wording for a private attribute that is no longer what it was."""
    return PlanMismatch(
        f"Cannot read back {library}: {what} is not what it was in {version}, which this adapter was written for. "
        f"Use that version, or report the one you have."
    )
