"""Learning rates from shapes: what was tuned on a small model, carried to a larger one. Pure.

Adam moves an element by its rate, however small the gradient. A matrix that sums over m times as
many inputs therefore changes its output m times as much in one step, and its rate is divided by m:
muP (Tensor Programs V, 2203.03466, table 8, for Adam). CompleteP (2505.01618, table 1 and equation
40) adds the depth L of the residual stream, here over that of the base model:

====================  ================  ==========  =====================
parameter             learning rate     decay       epsilon
====================  ================  ==========  =====================
matrix of a block     m^-1 L^(alpha-1)  m           m^-1 L^-alpha
vector of a block     L^(alpha-1)       1           m^-1 L^-alpha
matrix elsewhere      m^-1              m           m^-1
others, embeddings    1                 1           m^-1
====================  ================  ==========  =====================

For a matrix m is the growth of its fan-in, for the others that of the dimension which grew most; a
matrix whose fan-in did not grow (a patch embedding) is one of the others.
muP is the table without L. AdamW multiplies decay by the rate, so the product stays what it was.
What belongs to the model itself stays with the user: initial weights of variance 1 / fan-in, an
output layer that begins at 0 or at variance 1 / fan-in^2, and for CompleteP residual branches
multiplied by L^-alpha.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import log, prod
from typing import Protocol

from dist_layerlr.errors import ConfigError, ModelSourceError
from dist_layerlr.plan.components import Label
from dist_layerlr.plan.entries import ParamInfo, PlanEntry, Shape
from dist_layerlr.plan.name_rules import EMBED
from dist_layerlr.plan.names import ParamPath, parse
from dist_layerlr.plan.read import read_model
from dist_layerlr.plan.stacks import Location, StackMap
from dist_layerlr.plan.width import COMPLETEP, WIDTH_BLOCK, WidthScales, WidthScaling

_MATRIX_LEAVES = ("weight", "lora_A", "lora_B")
Key = tuple[str | None, tuple[str, ...], str]


class Placed(Protocol):
    """What is known of a parameter before its rate: see ``plan/build.py``."""

    @property
    def info(self) -> ParamInfo: ...  # noqa: D102
    @property
    def path(self) -> ParamPath: ...  # noqa: D102
    @property
    def location(self) -> Location | None: ...  # noqa: D102
    @property
    def label(self) -> Label: ...  # noqa: D102


def scaled(
    entries: Mapping[str, PlanEntry], placed: Iterable[Placed], given: WidthScaling | None
) -> dict[str, PlanEntry]:
    """Multiply rates, decay and epsilon of every entry by what its shape says.

    Args:
        entries: by name.
        placed: all parameters of the model.
        given: the block; None leaves everything as it is.

    Raises:
        ConfigError: the base model cannot be read, or a name is not in it, or in another shape.
    """
    if given is None:
        return dict(entries)
    base = _Base(given)
    found = dict(entries)
    for p in placed:
        entry = found.get(p.info.name)
        if entry is None:
            continue
        scales = _scales(p, base, given)
        decay = entry.weight_decay
        found[entry.name] = replace(
            entry,
            width=scales,
            lr=entry.lr * scales.lr,
            weight_decay=None if decay is None else decay * scales.weight_decay,
            eps=None if given.eps is None else given.eps * scales.eps,
        )
    return found


class _Base:
    """Shapes and depths of the base model."""

    def __init__(self, given: WidthScaling):
        try:
            infos = read_model(given.base)
        except ModelSourceError as error:
            raise ConfigError(f"Invalid {WIDTH_BLOCK}.base={given.base!r}: {error}") from None
        self._source = given.base
        paths = [parse(info.name) for info in infos]
        stacks = StackMap(paths)
        self._shapes: dict[str, Shape] = {}
        self._in_stack: dict[Key, Shape] = {}
        self._depths: dict[str, int] = {}
        for info, path in zip(infos, paths, strict=True):
            location = stacks.locate(path)
            self._shapes[info.name] = info.shape
            self._in_stack.setdefault(_key(path, location), info.shape)
            if location is not None:
                self._depths[location.stack] = location.blocks

    def shape(self, p: Placed) -> Shape:
        """The shape of the same parameter there; of a block that is not there, another's."""
        found = self._shapes.get(p.info.name)
        if found is None:
            found = self._in_stack.get(_key(p.path, p.location))
        if found is None or len(found) != len(p.info.shape):
            what = "is not in it" if found is None else f"is {found} there"
            raise ConfigError(
                f"Invalid {WIDTH_BLOCK}.base={self._source!r}: {p.info.name} {p.info.shape} {what}."
                " Give a smaller model of the same classes, adapters included: names as this one"
                " has them, blocks and widths fewer."
            )
        return found

    def depth_ratio(self, location: Location | None) -> float:
        """Number of blocks over the base's; 1 outside of blocks."""
        if location is None:
            return 1.0
        return location.blocks / self._depths.get(location.stack, location.blocks)


def _key(path: ParamPath, location: Location | None) -> Key:
    if location is None:
        return None, path.owner, path.leaf
    return location.stack, path.owner[location.depth :], path.leaf


def _scales(p: Placed, base: _Base, given: WidthScaling) -> WidthScales:
    there = base.shape(p)
    grown = [a / b if b else 1.0 for a, b in zip(p.info.shape, there, strict=True)]
    depth = base.depth_ratio(p.location) if given.rule == COMPLETEP else 1.0
    in_depth = depth ** (given.alpha - 1.0)
    # The first dimension is the output, of linear layers and convolutions alike; GPT-2's Conv1D is
    # the other way round.
    inputs = slice(0, 1) if p.info.owner_class == "Conv1D" else slice(1, None)
    width = prod(grown[inputs]) if _is_matrix(p, grown) else 1.0
    if width != 1.0:
        lr, decay, kind = in_depth / width, width, "fan-in"
    else:
        # Vectors, tables, and matrices whose inputs are as many as before.
        width = max(grown, key=lambda ratio: abs(log(ratio)), default=1.0)
        lr, decay, kind = in_depth, 1.0, "width"
    why = f"{kind} x {width:g}" + (f", depth x {depth:g}" if depth != 1.0 else "")
    return WidthScales(
        lr=lr, weight_decay=decay, eps=1.0 / width / depth**given.alpha, why=f"{given.rule}: {why}"
    )


def _is_matrix(p: Placed, grown: list[float]) -> bool:
    """Whether it maps a vector to a vector; tables of vectors and biases do not."""
    owner = p.info.owner_class
    if len(grown) < 2:
        return False
    if p.path.leaf not in _MATRIX_LEAVES:
        # Tokens and modulation tables grow in one dimension; fused experts in two or more.
        return sum(ratio != 1.0 for ratio in grown) > 1
    # A table of vectors has an output layer's shape, (vocabulary, width). Its class tells them
    # apart; from a file alone its name does, where it does not grow in its output as an embedder's
    # matrices do.
    if owner is not None:
        return "embed" not in owner.lower()
    return grown[0] != 1.0 or p.label.fine != EMBED
