"""Try an optimizer before it trains: may its parameters be cut, does each group keep its own rate?

A name says nothing: a subclass of AdamW may clip by a norm, and a wrapper may hide Muon. So the
optimizer steps scratch parameters, whole and in the way in which the sharder will hand over the
real ones, with the same gradients. Equal: it may train them. Different: it would train another
model than the unsharded run does, although every group reports the planned rate.
"""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from dist_layerlr.optim.facts import different, facts_of, lasting, note_counters, rebuild
from dist_layerlr.optim.groups import NAME, WEIGHT_DECAY
from dist_layerlr.optim.routed import parts_of
from dist_layerlr.optim.scratch import FEW, RATES, STEPS, Scratch, make_scratch
from dist_layerlr.optim.segmented import MakeOptimizer, Segmented
from dist_layerlr.optim.ways import Cut, Trained, Way, shapes_on_meshes, stepped
from dist_layerlr.optim.whole import NeedsWhole
from dist_layerlr.plan.entries import Plan, Shape
from dist_layerlr.ranks import any_rank
from dist_layerlr.sharders.base import Layout, ParamGroup

SAME = 1e-4
"""A difference below this share of the move, and a few roundings, is no difference."""
HEARD = 2.0
"""Five times the rate must move weights at least so many times as far. Most move five times as far;
a few, such as MADGRAD, by a lower power of the rate, sharded or not."""
BLOCKS: Shape = (64, 128)
"""8,192 elements: optimizers that keep their state in quantised blocks do so from 4,096 on."""
_SMALL: dict[int, Shape] = {0: (), 1: (37,), 2: (12, 20), 3: (7, 6, 5), 4: (8, 4, 3, 3)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a trial has shown."""

    optimizer: str
    """Class name."""
    way: str
    """How parameters were handed over."""
    deviation: float = 0.0
    """Largest distance from the unsharded result, in largest moves of a parameter."""
    fault: str | None = None
    """What went wrong, in words; None: it trains as it would unsharded."""
    tried: bool = True
    """False if it could not be built anew on scratch parameters, so that nothing is known."""
    said: str = ""
    """The line for several optimizers."""

    @property
    def line(self) -> str:
        """For the log."""
        if self.said:
            return self.said
        if not self.tried:
            return f"{self.optimizer} could not be tried on scratch parameters"
        if self.way == Cut.WHOLE.value:
            return f"{self.optimizer} heeds the rate of each group"
        return f"{self.optimizer} steps {self.way} as it steps whole parameters"


_MAKERS: WeakKeyDictionary[Optimizer, MakeOptimizer] = WeakKeyDictionary()
_SEEN: dict[Any, Verdict] = {}


def remember(optimizer: Optimizer, make: MakeOptimizer) -> None:
    """Keep how an optimizer was built: a later trial builds it the same way."""
    _MAKERS[optimizer] = make


def try_out(
    optimizer: Any, layout: Layout, owners: Iterable[Tensor], shapes: Sequence[Shape]
) -> Verdict:
    """Step scratch parameters whole, and as a sharder hands them over. Collective; never raises.

    Ranks agree: where one finds a fault, all do, though each in its own words.

    Args:
        optimizer: the live one; a segmented one stands for what is inside it.
        layout: of the sharder.
        owners: what the optimizer holds.
        shapes: of the model's whole trainable parameters; the same on all ranks.
    """
    distinct = list(dict.fromkeys(owners))
    segmented = isinstance(optimizer, Segmented)
    if parts_of(optimizer) is not None:
        return _of_all(_try_parts(optimizer, layout, distinct, shapes))
    return try_way(
        optimizer, Way.of(layout, distinct, len(shapes), segmented=segmented), distinct, shapes
    )


def try_parts(
    optimizer: Any, layout: Layout, owners: Iterable[Tensor], plan: Plan
) -> dict[str, Verdict]:
    """``try_out`` of each optimizer among several, by the plan's names. Collective."""
    shapes = [entry.shape for entry in plan.entries.values()]
    return _try_parts(optimizer, layout, list(dict.fromkeys(owners)), shapes)


def _try_parts(
    optimizer: Any, layout: Layout, owners: Sequence[Tensor], shapes: Sequence[Shape]
) -> dict[str, Verdict]:
    routed = parts_of(optimizer)
    assert routed is not None
    found: dict[str, Verdict] = {}
    for label, part in routed.parts.items():
        if isinstance(part, NeedsWhole):  # whole matrices, whatever shards them
            remember(part.template, part.make)
            matrices = [entry.shape for entry in part.entries.values()]
            found[label] = try_way(part.template, Way(cut=Cut.WHOLE), owners, matrices)
        else:
            remember(part, routed.makes[label])
            way = Way.of(layout, owners, len(shapes), segmented=True)
            found[label] = try_way(part, way, owners, shapes)
    return found


def _of_all(verdicts: Mapping[str, Verdict]) -> Verdict:
    """One verdict for several optimizers: the first with a fault, else all in one line."""
    for verdict in verdicts.values():
        if verdict.fault is not None:
            return verdict
    return replace(
        next(iter(verdicts.values())),
        optimizer=" and ".join(v.optimizer for v in verdicts.values()),
        tried=all(v.tried for v in verdicts.values()),
        said=", ".join(v.line for v in verdicts.values()),
    )


def try_way(optimizer: Any, way: Way, owners: Sequence[Tensor], shapes: Sequence[Shape]) -> Verdict:
    """As ``try_out``, in a given way. Collective; never raises."""
    inner = optimizer
    if isinstance(optimizer, Segmented) and optimizer.inner is not None:
        inner = optimizer.inner
    subject = _Subject.of(optimizer, inner, owners, shapes)
    key = (subject.key, way)
    found = _SEEN.get(key)
    # A trial on DTensors is collective: if one rank makes it, all must.
    if any_rank(found is None):
        found = _try(subject, way)
        if any_rank(found.fault is not None) and found.fault is None:
            found = replace(found, fault="it failed on another rank")
        # The trial has shown which of the facts are counters: they are in no key from now on.
        _SEEN[_Subject.of(optimizer, inner, owners, shapes).key, way] = found
    assert found is not None
    return found


def try_here(
    optimizer: Any, layout: Layout, owners: Iterable[Tensor], shapes: Sequence[Shape]
) -> Verdict | None:
    """As ``try_out``, for this rank alone, so not collective. None where a trial would be."""
    distinct = list(dict.fromkeys(owners))
    segmented = isinstance(optimizer, Segmented)
    way = Way.of(layout, distinct, len(shapes), segmented=segmented)
    if way.cut is Cut.DTENSORS or not distinct:
        return None
    inner = optimizer.inner if segmented and optimizer.inner is not None else optimizer
    return _try(_Subject.of(optimizer, inner, distinct, shapes), way)


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """An optimizer, and what decides how it behaves."""

    name: str
    make: MakeOptimizer
    is_rebuilt: bool
    """Whether nobody has told how it is made, so that its constructor is called anew."""
    kinds: tuple[tuple[str, float | None], ...]
    """(name, weight decay) of groups that differ in their settings."""
    ndims: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    device: torch.device
    key: Any

    @classmethod
    def of(
        cls, optimizer: Any, inner: Any, owners: Sequence[Tensor], shapes: Iterable[Shape]
    ) -> _Subject:
        make = _MAKERS.get(optimizer) if isinstance(optimizer, Optimizer) else None
        ndims = tuple(sorted({len(shape) for shape in shapes}))
        dtypes = tuple(sorted({owner.dtype for owner in owners}, key=str))
        devices = [owner.device for owner in owners if not owner.is_meta]
        device = devices[0] if devices else torch.device("cpu")
        groups = different(inner.param_groups)
        return cls(
            name=type(inner).__name__,
            make=make or rebuild(inner),
            is_rebuilt=make is None,
            kinds=tuple((g.get(NAME, "group"), g.get(WEIGHT_DECAY)) for g in groups),
            ndims=ndims,
            dtypes=dtypes,
            device=device,
            key=(
                lasting(inner),
                make is None,
                ndims,
                dtypes,
                device.type,
            ),
        )


def _try(subject: _Subject, way: Way) -> Verdict:
    for scratch, its_way in _scratches(subject, way):
        verdict = _compare(subject, scratch, its_way)
        if verdict.fault is not None or not verdict.tried:
            return verdict
    return Verdict(optimizer=subject.name, way=way.text)


def _scratches(subject: _Subject, way: Way) -> Iterator[tuple[Scratch, Way]]:
    """Small parameters first: an optimizer that mixes elements may be slow on large ones."""
    kinds = subject.kinds or (("group", None),)

    def scratch(shapes: Sequence[Shape], steps: int, dtype: torch.dtype) -> Scratch:
        return make_scratch(kinds, shapes, steps=steps, dtype=dtype, device=subject.device)

    shapes = [_SMALL.get(n, (4, 3, *[2] * (n - 2))) for n in subject.ndims]
    if way.turns and len(shapes) == 1:
        shapes *= 2  # so that each turn has a parameter of every group
    large, matrices = [BLOCKS], way
    if way.cut is Cut.DTENSORS:
        shapes = shapes_on_meshes(way.placed)
        matrices = replace(way, placed=tuple(p for p in way.placed if p[2] == 2))
        large = [(16 * rows, 16 * columns) for rows, columns in shapes_on_meshes(matrices.placed)]
    yield scratch(shapes, STEPS, torch.float32), way
    for dtype in subject.dtypes:
        if dtype is not torch.float32:
            yield scratch(shapes, FEW, dtype), way
    if way.cut is not Cut.WHOLE and 2 in subject.ndims and large:
        yield scratch(large, FEW, torch.float32), matrices


def _compare(subject: _Subject, scratch: Scratch, way: Way) -> Verdict:
    def found(deviation: float = 0.0, fault: str | None = None, tried: bool = True) -> Verdict:
        return Verdict(
            optimizer=subject.name, way=way.text, deviation=deviation, fault=fault, tried=tried
        )

    whole, problem = _attempt(subject, scratch, Way(cut=Cut.WHOLE))
    if whole is None:
        # What fails on scratch parameters may train the real ones (pairs of LoRA matrices, or
        # gradients with a graph), and says so in its first step if it does not. But nothing is
        # known of how it could be cut. A closure nobody gives: no trainer of ours, or DeepSpeed's.
        one_rate = replace(scratch, groups=tuple(replace(g, lr=RATES[0]) for g in scratch.groups))
        if _attempt(subject, one_rate, Way(cut=Cut.WHOLE))[0] is not None:
            return found(fault=f"it trains at one learning rate; at two {problem}")
        unknown = way.cut is Cut.WHOLE or subject.is_rebuilt
        if unknown and "closure" not in str(problem).lower():
            return found(tried=False)
        return found(fault=problem)
    problem = _rate_fault(scratch, whole)
    if problem is not None or way.cut is Cut.WHOLE:
        return found(fault=problem)
    cut, problem = _attempt(subject, scratch, way)
    if cut is None:
        return found(fault=problem)
    return found(*_difference(scratch, whole.last, cut.last))


def _attempt(subject: _Subject, scratch: Scratch, way: Way) -> tuple[Trained | None, str | None]:
    """(weights after training, what was raised instead)."""
    made: list[tuple[Optimizer, dict[str, Any]]] = []

    def make(groups: list[ParamGroup]) -> Optimizer:
        optimizer = subject.make(groups)
        made.append((optimizer, facts_of(optimizer)))
        return optimizer

    try:
        with _quiet(subject.device):
            trained = stepped(make, scratch, way)
    except Exception as error:
        first = str(error).partition("\n")[0]
        return None, f"it raised {type(error).__name__}: {first[:160]}"
    for optimizer, before in made:
        after = facts_of(optimizer)
        changed = {name for name in after if before.get(name) != after[name]}
        note_counters(optimizer, changed)
    return trained, None


@contextlib.contextmanager
def _quiet(device: torch.device) -> Iterator[None]:
    """Leave no trace: no output, no warning, no random number drawn, nothing compiled."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        # Of this rank's device alone: asking another card for its state puts a context onto it.
        card: Any = getattr(torch, device.type, None)
        if hasattr(card, "get_rng_state"):  # torch.cpu has none: its generator is torch's own
            stack.enter_context(torch.random.fork_rng([device], device_type=device.type))
            card.manual_seed(0)
        else:
            stack.enter_context(torch.random.fork_rng([]))
        torch.default_generator.manual_seed(0)
        if "torch._dynamo" in sys.modules:
            # Some optimizers compile their step for every shape, which takes seconds. What has
            # not imported the compiler compiles nothing.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _rate_fault(scratch: Scratch, whole: Trained) -> str | None:
    """Whether each group moved, and farther where its rate is higher."""
    if len(scratch.gradients) < STEPS:
        return None  # The first scratch has been looked at; some move nothing for ten steps.
    moves = [0.0] * len(scratch.groups)
    for part in scratch.parts:
        move = whole.last[part.places].double() - whole.first[part.places].double()
        moves[part.group] += float(move.abs().sum())
    for slow, fast in zip(moves[::2], moves[1::2], strict=True):
        if not slow > 0.0 or not fast < float("inf"):
            return f"at a learning rate of {RATES[0]:g} it moved scratch weights by {slow:.3g}"
        if fast < HEARD * slow:
            return (
                f"a learning rate {RATES[1] / RATES[0]:g} times as high moved scratch weights"
                f" {fast / slow:.2f} times as far"
            )
    return None


def _difference(scratch: Scratch, whole: Tensor, cut: Tensor) -> tuple[float, str | None]:
    """(largest distance in moves, what to say of it)."""
    worst = 0.0
    eps = torch.finfo(scratch.weights.dtype).eps
    for part in scratch.parts:
        start, wanted, got = (t[part.places].double() for t in (scratch.weights, whole, cut))
        move = float((wanted - start).abs().max())
        apart = float((wanted - got).abs().max())
        rounding = 8.0 * eps * float(wanted.abs().max())
        if not apart <= SAME * move + rounding:
            worst = max(worst, apart / move if move > 0.0 else float("inf"))
    if worst == 0.0:
        return 0.0, None
    return worst, f"it ends {worst:.2g} of its move away from the unsharded result"
