"""What a sharder answers about one model: which spans of its parameters this rank holds.

Rates, element counts, optimizer state and observed updates all follow from these answers, the same
way for every sharder. A sharder is bound to a model and knows no optimizer of this project:
``dist_layerlr.optim`` builds and reads those.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dist_layerlr.errors import ConfigError, PlanMismatch
from dist_layerlr.plan.names import canonical_name
from dist_layerlr.ranks import world_size
from dist_layerlr.sharders.model import Kinds, live_parameters, names_of_parameters, unwrap

ParamGroup = dict[str, Any]
"""One entry of a torch optimizer's ``param_groups``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a model is wrapped: facts that decide what may train it, save it and clip it."""

    name: str
    """`none`, `ddp`, `dtensor`, `fsdp1`, `fsdp1_flat`, `fsdp2` or `zero`."""
    stage: int | None = None
    """DeepSpeed's ZeRO stage, 0 to 3; None under every other sharder."""
    shards: bool = False
    """Whether optimizers step parts of parameters: slices of tensors, not whole ones."""
    flat: bool = False
    """Whether parameters share flat tensors, so that ordinary parameter groups cannot tell names
    apart."""
    meshes: bool = False
    """Whether parameters may lie on meshes of some of the ranks: how many other ranks hold a copy
    is then known from what all of them hold."""
    engine_steps: bool = False
    """Whether an engine owns the optimizer: it steps, clips and scales the loss itself."""

    @property
    def label(self) -> str:
        """For people: `unsharded`, `fsdp2`, `zero 2` ..."""
        if self.stage is not None:
            return f"{self.name} {self.stage}"
        return "unsharded" if self.name == "none" else self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """The elements [start, start + numel) of a named parameter, flattened and unsharded."""

    name: str
    """Canonical name."""
    start: int
    numel: int
    """0 where this rank holds nothing of the parameter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice(Span):
    """A span, and where it lies in a tensor that an optimizer holds."""

    owner: Tensor
    """The optimizer's parameter, key of its state."""
    offset: int
    """First element in the flattened local owner."""

    def of(self, tensor: Tensor) -> Tensor:
        """The same slice of a tensor laid out as the owner: its value, gradient or a moment.

        Flat, local.
        """
        return local(tensor).detach().reshape(-1)[self.offset : self.offset + self.numel]

    def piece(self, group: ParamGroup, replicas: int) -> Piece:
        """This slice, stepped by a group; quicker than ``replace`` for thousands of them."""
        return Piece(
            name=self.name,
            start=self.start,
            numel=self.numel,
            owner=self.owner,
            offset=self.offset,
            group=group,
            replicas=replicas,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece(Slice):
    """A slice that a live parameter group steps."""

    group: ParamGroup
    replicas: int = 1
    """Ranks that step each element."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldSpan(Span):
    """A span, and the memory in which this rank holds its elements."""

    tensor: Tensor
    """Flat, local, the live storage itself, ``numel`` elements. See ``home``."""
    home: Tensor | None = None
    """Set where the layout has no flat view (channels_last ...): ``tensor`` is a copy of this live
    tensor."""

    def write_home(self) -> None:
        """Call after writing into ``tensor``: copies it to ``home``, if there is one."""
        if self.home is not None:
            self.home.copy_(self.tensor.view(self.home.shape))


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight(HeldSpan):
    """What this rank holds of one parameter, trained or frozen, or of one persistent buffer.

    A parameter has as many of them as this rank holds separate runs of its elements.
    """

    aliases: tuple[str, ...] = ()
    """Other names of the same tensor; ``name`` is the first one."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    trainable: bool = False
    """Whether it requires a gradient. Under ZeRO its fp32 master, among the pieces, is then the
    truth."""
    is_buffer: bool = False
    replicas: int = 1
    """Ranks that hold each element."""

    @property
    def dtype(self) -> torch.dtype:
        """As stored here; ZeRO's low-precision copies are bf16 or fp16."""
        return self.tensor.dtype


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """Everything that this rank's optimizer steps."""

    pieces: list[Piece] = field(default_factory=list)
    requires_grad: Mapping[str, bool] = field(default_factory=dict)
    """What the model shows now: {name: whether it is trained}, tied parameters once."""
    strangers: int = 0
    """Tensors in the optimizer that are no parameter of the model (stale ones)."""
    optimizer: Any = None
    """The innermost optimizer, whose ``state`` is keyed by owners."""


class Sharder(ABC):
    """One model, as one sharder wraps it.

    It knows how names are hidden, and where the truth about weights is kept.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.layout = self._read_layout()

    @classmethod
    @abstractmethod
    def handles(cls, kinds: Kinds) -> bool:
        """Whether this sharder wraps a model of these kinds."""

    @abstractmethod
    def _read_layout(self) -> Layout:
        """Read the layout off the model."""

    @abstractmethod
    def slices(self) -> list[Slice]:
        """Where each trainable name lies in the tensors that an optimizer is to be built on.

        Raises:
            PlanMismatch: the optimizer exists already, inside the wrapped model.
        """

    @abstractmethod
    def pieces(self, optimizer: Any) -> Pieces:
        """List what the parameter groups of a live optimizer hold, by name."""

    @abstractmethod
    def weights(self) -> list[Weight]:
        """List what this rank holds of every parameter and every persistent buffer."""

    def true_weights(self) -> list[Weight]:
        """``weights``, with fp32 masters in place of what is made from them.

        A name may then have several spans.
        """
        return self.weights()

    def refresh(self) -> None:  # noqa: B027 - most sharders keep no copies
        """Bring the copies that the sharder keeps in line with the weights, or with its masters.

        Collective. Call it after writing into ``weights`` or ``pieces``.
        """

    def reshard(self) -> None:  # noqa: B027 - most sharders never take the trained tensors away
        """Put the tensors that an optimizer steps back where the model shows them."""


def local(tensor: Tensor) -> Tensor:
    """This rank's part, without autograd and without DTensor dispatch afterwards."""
    if not isinstance(tensor, DTensor):
        return tensor
    # With gradients on, each call records an autograd node, which takes twice the time. So does
    # switching them off: who reads thousands of tensors does that once.
    if not torch.is_grad_enabled():
        return tensor.to_local()
    with torch.no_grad():
        return tensor.to_local()


def local_gradient(owner: Tensor) -> Tensor:
    """The gradient of this rank's part of a tensor that an optimizer holds. It has one.

    Sequence parallelism leaves the gradient of a replicated parameter as one addend on each rank
    (``Partial``): it is summed here, which is collective over the tensor's mesh.
    """
    gradient = owner.grad
    assert gradient is not None
    if isinstance(gradient, DTensor) and isinstance(owner, DTensor):
        # Ranks that share the tensor all see these placements, so all of them enter the collective
        # or none does.
        if gradient.placements != owner.placements:
            gradient = gradient.redistribute(placements=owner.placements)
    return local(gradient)


def sample_places(numel: int, count: int) -> list[int]:
    """At most ``count`` evenly spaced positions in ``numel`` elements, the first and last included.

    Checkpoints hold values at these positions: another formula could not compare them.
    """
    count = min(count, numel)
    return [i * (numel - 1) // max(count - 1, 1) for i in range(count)]


def sample(tensor: Tensor, count: int) -> Tensor:
    """A copy of the elements of a flat tensor at ``sample_places``."""
    return tensor[sample_places(tensor.numel(), count)]


def is_optimizer(value: Any) -> bool:
    """Whether this is an optimizer or stands for one."""
    return isinstance(getattr(value, "param_groups", None), list)


def live_optimizer(optimizer: Any) -> Any:
    """The torch optimizer inside the wrappers of trainers and engines; what is none stays as it is.

    A look-ahead around another optimizer is none of them: it is what is stepped.
    """
    while is_optimizer(inner := getattr(optimizer, "optimizer", None)):
        # Accelerate's wrappers are torch optimizers by inheritance alone.
        wraps = any(c.__name__ == "AcceleratedOptimizer" for c in type(optimizer).__mro__)
        if isinstance(optimizer, Optimizer) and not wraps:
            break
        optimizer = inner
    return optimizer


def innermost(optimizer: Any) -> Any:
    """As ``live_optimizer``, where there must be one.

    Raises:
        ConfigError: there is none.
    """
    optimizer = live_optimizer(optimizer)
    if not hasattr(optimizer, "param_groups"):
        raise ConfigError(
            f"Invalid optimizer={optimizer!r}: give the torch optimizer that is stepped."
        )
    return optimizer


PiecesOf = Callable[[str, Tensor, ParamGroup], Iterable[Piece]]
"""(name, parameter, the group that steps it) -> its pieces on this rank."""


def _by_identity(
    groups: Iterable[ParamGroup], names: Mapping[int, str], pieces_of: PiecesOf
) -> tuple[list[Piece], int]:
    """Pieces of groups whose tensors are the model's own parameters, and the number of strangers.

    Args:
        groups: the live ``param_groups``.
        names: {id of a live parameter: canonical name}.
        pieces_of: what this rank holds of one of them.
    """
    pieces: list[Piece] = []
    strangers = 0
    for group in groups:
        for param in group["params"]:
            name = names.get(id(param))
            if name is None:
                strangers += 1
            else:
                pieces += pieces_of(name, param, group)
    return pieces, strangers


@torch.no_grad()
def pieces_of_parameters(model: nn.Module, optimizer: Any, pieces_of: PiecesOf) -> Pieces:
    """What an optimizer holds whose tensors are the model's own parameters."""
    inner = innermost(optimizer)
    live = live_parameters(model)
    names: dict[int, str] = {}
    trained: dict[str, bool] = {}
    for name, param in live.items():
        names[id(param)] = name
        trained[name] = param.requires_grad
    found, strangers = _by_identity(inner.param_groups, names, pieces_of)
    return Pieces(pieces=found, requires_grad=trained, strangers=strangers, optimizer=inner)


@torch.no_grad()
def whole_slices(model: nn.Module) -> list[Slice]:
    """Trainable parameters that an optimizer holds whole, or as whole local shards."""
    return [
        Slice(name=name, start=0, numel=local(param).numel(), owner=param, offset=0)
        for name, param in live_parameters(model).items()
        if param.requires_grad
    ]


def flat_view(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    """(flat local tensor, None) where a view exists, else (flat copy, the local tensor itself)."""
    here = local(tensor).detach()
    return (here.view(-1), None) if here.is_contiguous() else (here.reshape(-1), here)


def whole_weight(name: str, tensor: Tensor, replicas: int, **fields: Any) -> Weight:
    """A tensor that this rank holds whole."""
    flat, home = flat_view(tensor)
    shape = tuple(tensor.shape)
    return Weight(
        name=name,
        start=0,
        numel=flat.numel(),
        tensor=flat,
        home=home,
        shape=shape,
        replicas=replicas,
        **fields,
    )


def tied_names(model: nn.Module) -> dict[int, list[str]]:
    """{id of a live parameter: its canonical names}, in the module's order.

    More than one where weights are tied.
    """
    names: dict[int, list[str]] = {}
    for name, param in names_of_parameters(model, tied=True):
        known = names.setdefault(id(param), [])
        if name not in known:
            known.append(name)
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
            # Private, read in torch 2.13: the one place that tells persistent buffers, short of a
            # state_dict, which FSDP's hooks make collective.
            if leaf not in module._non_persistent_buffers_set and id(buffer) not in found:
                name = canonical_name(f"{path}.{leaf}" if path else leaf)
                # A buffer that several modules share is one, under its first name.
                found[id(buffer)] = whole_weight(name, buffer, world_size(), is_buffer=True)
    return list(found.values())


def internals_moved(library: str, version: str, what: str) -> PlanMismatch:
    """The one wording for a private attribute that is no longer what it was."""
    return PlanMismatch(
        f"Cannot read back {library}: {what} is not what it was in {version}, which this adapter"
        " was written for. Use that version, or report the one you have."
    )
