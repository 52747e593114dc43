"""Build the optimizer of a plan.

This is the one place that chooses ordinary parameter groups or segments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor, nn
from torch.optim import Optimizer

from dist_layerlr import fields
from dist_layerlr.errors import ConfigError, PlanMismatch
from dist_layerlr.optim.groups import adopt, build_groups, built, split_by_mesh
from dist_layerlr.optim.quantised import tell_of_quantised
from dist_layerlr.optim.routed import (
    MakeOptimizers,
    check_makes,
    parts_of,
    router,
    takes_matrices,
)
from dist_layerlr.optim.segmented import MakeOptimizer, Segmented
from dist_layerlr.optim.timed import hold
from dist_layerlr.optim.trial import Verdict, remember, try_out, try_parts
from dist_layerlr.optim.validate import refuse
from dist_layerlr.plan.entries import Plan, Shape
from dist_layerlr.plan.optimizers import OPTIMIZERS_BLOCK as BLOCK
from dist_layerlr.ranks import alike, everyone, rank, together
from dist_layerlr.sharders import Layout, Sharder, sharder_of
from dist_layerlr.sharders.base import Slice
from dist_layerlr.sharders.distinct import alone_names

GROUPS, SEGMENTED, AUTO = "groups", "segmented", "auto"
EMISSIONS = (AUTO, GROUPS, SEGMENTED)


def attach(
    plan: Plan,
    model: nn.Module,
    make: MakeOptimizer | MakeOptimizers,
    *,
    emission: str = AUTO,
) -> Optimizer:
    """Build an optimizer that trains every parameter at the plan's rate, whatever shards the model.

    ``optimizer = attach(plan, model, lambda groups: torch.optim.AdamW(groups,
    weight_decay=0.01))``. Call it after FSDP or DDP has wrapped the model, and before
    ``deepspeed.initialize``. Collective: call it on all ranks.

    Args:
        plan: made from the same model before it was wrapped.
        model: plain, DDP, FSDP1 (``use_orig_params`` True or False) or FSDP2.
        make: groups -> optimizer; each group has ``params``, absolute ``lr``, ``initial_lr``,
            ``name``, and ``weight_decay`` where the plan gives one. A mapping {optimizer of the
            config's ``optimizers``: such a function} where the plan names several: what needs whole
            matrices (Muon) gets them under every sharder, see ``dist_layerlr.optim.whole``.
        emission: `groups` (ordinary parameter groups), `segmented` (one group outside, rates
            applied on slices; give it when DeepSpeed follows, then call ``bind``), or `auto`:
            segmented under DDP, FSDP1 and FSDP2, where it is at least as fast
            (benchmarks/step_cost.py), and wherever the plan names several optimizers; groups on a
            bare model, which may be wrapped later.

    Raises:
        PlanMismatch: the model's trainable parameters are not those of the plan, or it is a
            DeepSpeed engine already.
        ConfigError: an optimizer that cannot train these parameters at several rates (see
            ``check_optimizer``).
    """
    fields.one_of(lambda: EMISSIONS)("emission", emission)
    if isinstance(make, Mapping):
        return _attach_several(plan, model, make, emission)
    alike(lambda: _refuse_one(plan, make))
    with together(plan.digest):
        sharder = sharder_of(model)
        optimizer = _build(plan, sharder, make, _in_segments(sharder.layout, emission))
    layout = sharder.layout
    verdict = _tried(plan, optimizer, layout)
    if verdict.fault and emission == AUTO and layout.meshes:
        # What needs whole matrices gets them where the sharder's own tensors stand for them:
        # operations on DTensors gather what they need.
        with together(plan.digest):
            in_groups = _build(plan, sharder, make, False)
        other = _tried(plan, in_groups, layout)
        if other.fault is None:
            return in_groups
    alike(lambda: refuse(verdict, layout))
    # Warnings may be errors: then they are those of all ranks.
    alike(lambda: tell_of_quantised(optimizer, layout))
    return optimizer


def bind(plan: Plan, engine: nn.Module) -> None:
    """Tell a segmented optimizer where DeepSpeed put its parameters.

    Call it after ``deepspeed.initialize``. Collective.

    Raises:
        PlanMismatch: on all ranks alike: the engine's optimizer is not segmented, or names differ
            from the plan's.
        ConfigError: an optimizer that cannot step slices (see ``check_optimizer``).
    """
    with together(plan.digest):
        sharder = sharder_of(engine)
        found = sharder.pieces(None)
        if not isinstance(found.optimizer, Segmented):
            raise PlanMismatch(
                "bind() needs a segmented optimizer, the engine has"
                f" {type(found.optimizer).__name__}. Build it with attach(plan, model, make,"
                " emission='segmented') before deepspeed.initialize."
            )
        found.optimizer.bind(found.pieces)
    layout = sharder.layout
    if parts_of(found.optimizer) is not None:
        _place(plan, found.optimizer, sharder, found.pieces)
    owners = [piece.owner for piece in found.pieces]
    verdict = try_out(found.optimizer, layout, owners, _shapes(plan))
    alike(lambda: refuse(verdict, layout))
    alike(lambda: tell_of_quantised(found.optimizer, layout))


def _refuse_one(plan: Plan, make: MakeOptimizer) -> None:
    given = plan.config.optimizers
    if given is not None:
        raise ConfigError(
            f"Invalid make={make!r}: the config's {BLOCK!r} names {list(given.names)}. Give a"
            " function for each: attach(plan, model, {"
            + ", ".join(f"{name!r}: ..." for name in given.names)
            + "})."
        )


def _attach_several(
    plan: Plan, model: nn.Module, makes: MakeOptimizers, emission: str
) -> Optimizer:
    """Several optimizers in one, in segments on every layout. Collective.

    One that the trial shows to need whole tensors is built again as one that gets them.
    """

    def check() -> None:
        check_makes(plan, makes)
        if emission == GROUPS:
            raise ConfigError(
                "Invalid emission='groups' with several optimizers: a matrix that is cut must be"
                " put together for the step, which segments do. Leave emission out."
            )

    alike(check)
    whole: frozenset[str] = frozenset()
    if emission == SEGMENTED:
        # DeepSpeed follows, and will cut what is whole now.
        whole = frozenset(filter(partial(takes_matrices, plan), makes))
    optimizer, layout, verdicts = _build_several(plan, model, makes, whole)
    # What the trial of slices refuses may still be right on whole tensors: it is tried again there.
    faulty = frozenset(filter(lambda label: verdicts[label].fault is not None, verdicts))
    if faulty - whole and all(takes_matrices(plan, label) for label in faulty):
        optimizer, layout, verdicts = _build_several(plan, model, makes, whole | faulty)
    for verdict in verdicts.values():
        alike(partial(refuse, verdict, layout))
    alike(lambda: tell_of_quantised(optimizer, layout))
    return optimizer


def _build_several(
    plan: Plan, model: nn.Module, makes: MakeOptimizers, whole: frozenset[str]
) -> tuple[Segmented, Layout, dict[str, Verdict]]:
    """Build and try them, ``whole`` on whole tensors. Collective."""
    with together(plan.digest):
        sharder = sharder_of(model)
        optimizer = _build(plan, sharder, router(plan, makes, whole), True)
    assert isinstance(optimizer, Segmented)
    _place(plan, optimizer, sharder, alike(lambda: sharder.pieces(optimizer).pieces))
    return optimizer, sharder.layout, try_parts(optimizer, sharder.layout, _owners(optimizer), plan)


def _place(plan: Plan, optimizer: Segmented, sharder: Sharder, pieces: Sequence[Slice]) -> None:
    """Every rank tells what it holds of each name. Collective."""
    held: dict[str, list[tuple[int, int]]] = {}
    for piece in pieces:
        if piece.numel:
            held.setdefault(piece.name, []).append((piece.start, piece.numel))
    table = everyone(held)
    alone = alike(lambda: alone_names(sharder, plan.entries))
    alike(lambda: optimizer.place(pieces, table, rank(), alone))


def _owners(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _tried(plan: Plan, optimizer: Optimizer, layout: Layout) -> Verdict:
    return try_out(optimizer, layout, _owners(optimizer), _shapes(plan))


def _shapes(plan: Plan) -> list[Shape]:
    return [entry.shape for entry in plan.entries.values()]


def _in_segments(layout: Layout, emission: str) -> bool:
    # Flat tensors cannot be told apart by groups. A bare model may yet go to DeepSpeed or
    # Accelerate, which replace its parameters: only a model that is wrapped already gets segments
    # without being asked.
    return layout.flat or emission == SEGMENTED or (emission == AUTO and layout.name != "none")


def _build(plan: Plan, sharder: Sharder, make: MakeOptimizer, in_segments: bool) -> Optimizer:
    slices = sharder.slices()
    optimizer: Optimizer
    if in_segments:
        owners = {id(s.owner): s.owner for s in slices}
        optimizer = Segmented(plan, owners.values(), make, slices)
    else:
        groups = build_groups(plan, {s.name: s.owner for s in slices})
        optimizer = built(make, [part for group in groups for part in split_by_mesh(group)])
        adopt(plan, optimizer)
    remember(optimizer, make)
    hold(plan, sharder.model, optimizer, slices)
    return optimizer
