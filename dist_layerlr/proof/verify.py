"""The proof: on every rank, each trainable name is stepped once, live, whole, at the plan's rate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from dist_layerlr import checks
from dist_layerlr.adapters import LiveParam, Pieces, StatePiece, base, detect
from dist_layerlr.agreement import SHOWN, Problem, mismatch, together
from dist_layerlr.errors import PlanMismatch
from dist_layerlr.guard import check_optimizer
from dist_layerlr.plan import Plan, PlanEntry
from dist_layerlr.segmented import MakeOptimizer, Segmented, Slice

_ROUNDING = 1e-7
"""Relative; some optimizers keep their rate as a float32 tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What was verified."""

    sharder: str
    ranks: int
    parameters: int
    elements: int
    groups: int
    digest: str
    step_factor: float

    def line(self) -> str:
        """One line for the log."""
        return (
            f"[per_layer_lr] verified on {self.ranks} rank{'s' if self.ranks > 1 else ''} ({self.sharder}): "
            f"{self.parameters} parameters, {self.elements:,} elements, each stepped once at its planned learning rate "
            f"and weight decay; plan {self.digest}"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def attach(plan: Plan, model: nn.Module, make: MakeOptimizer, *, emission: str = base.AUTO) -> Optimizer:
    """Build an optimizer that trains every parameter at the plan's rate, whatever shards the model.

    ``optimizer = attach(plan, model, lambda groups: torch.optim.AdamW(groups, weight_decay=0.01))``. Call it after FSDP
    or DDP has wrapped the model, and before ``deepspeed.initialize``. Collective: call it on all ranks.

    Args:
        plan: made from the same model before it was wrapped.
        model: plain, DDP, FSDP1 (``use_orig_params`` True or False) or FSDP2.
        make: groups -> optimizer; each group has ``params``, absolute ``lr``, ``initial_lr``, ``name``, and
            ``weight_decay`` where the plan gives one.
        emission: `groups` (ordinary parameter groups), `segmented` (one group outside, rates applied on slices; give it
            when DeepSpeed follows, then call ``bind``), or `auto`: segmented under DDP, FSDP1 and FSDP2, where it is at
            least as fast (benchmarks/step_cost.py); groups on a bare model, which may be wrapped later.

    Raises:
        PlanMismatch: the model's trainable parameters are not those of the plan, or it is a DeepSpeed engine already.
        ConfigError: an optimizer that cannot train these parameters at several rates (see ``check_optimizer``).
    """
    checks.one_of(lambda: base.EMISSIONS)("emission", emission)
    with together(plan.digest):
        optimizer = detect(model).attach(plan, model, make, emission)
        check_optimizer(optimizer, model)
    return optimizer


def bind(plan: Plan, engine: nn.Module) -> None:
    """Tell a segmented optimizer where DeepSpeed put its parameters. Call it after ``deepspeed.initialize``. Collective.

    Raises:
        PlanMismatch: on all ranks alike: the engine's optimizer is not segmented, or names differ from the plan's.
        ConfigError: an optimizer that cannot step slices (see ``check_optimizer``).
    """
    with together(plan.digest):
        optimizer = detect(engine).pieces(engine, None).optimizer
        if not isinstance(optimizer, Segmented):
            raise PlanMismatch(
                f"bind() needs a segmented optimizer, the engine has {type(optimizer).__name__}. "
                "Build it with attach(plan, model, make, emission='segmented') before deepspeed.initialize."
            )
        optimizer.unbind()
        found = detect(engine).pieces(engine, None)
        optimizer.bind([Slice(name=p.name, owner=p.owner, offset=p.offset, numel=p.numel) for p in found.pieces])
        check_optimizer(optimizer, engine)


def read_back(model: nn.Module, optimizer: Any = None) -> dict[str, LiveParam]:
    """{canonical name: lr, weight decay, local elements} of this rank, from the live optimizer and shards."""
    return base.read_back(detect(model).pieces(model, optimizer))


def optimizer_state(model: nn.Module, optimizer: Any = None) -> dict[str, list[StatePiece]]:
    """{canonical name: this rank's optimizer state}, wherever the sharder keeps it. Never runs a step to create it."""
    return base.state(detect(model).pieces(model, optimizer))


def verify(plan: Plan, model: nn.Module, optimizer: Any = None, *, factor: float = 1.0) -> Proof:
    """Compare the live optimizer with the plan on every rank. Collective: call it on all ranks.

    It needs no ``attach``: it audits a model and optimizer that anybody prepared.

    Args:
        plan: of this model.
        model: as it is trained: plain, DDP, FSDP1, FSDP2, or a DeepSpeed engine.
        optimizer: the one that is stepped; a DeepSpeed engine brings its own.
        factor: the schedule's multiplier that is in force.

    Raises:
        PlanMismatch: on all ranks alike, naming the first ten parameters, the rank, the likely cause and its fix.
    """
    adapter = detect(model)
    with together(plan.digest) as problems:
        found = adapter.pieces(model, optimizer)
        live = base.read_back(found)
        problems += _local_problems(plan, found, live, factor, _default_decay(model, optimizer))
    _check_elements(plan, live)
    return Proof(
        sharder=adapter.label,
        ranks=base.world_size(),
        parameters=len(plan.entries),
        elements=sum(e.numel for e in plan.entries.values()),
        groups=len(plan.groups),
        digest=plan.digest,
        step_factor=factor,
    )


def _default_decay(model: nn.Module, optimizer: Any) -> float:
    """The optimizer's own weight decay, for entries that the plan leaves to it."""
    live = getattr(model, "optimizer", None) if optimizer is None else optimizer
    while live is not None:
        defaults = getattr(live, "defaults", None)
        if isinstance(defaults, dict) and "weight_decay" in defaults:
            return float(defaults["weight_decay"])
        live = getattr(live, "optimizer", None)
    return 0.0


def _local_problems(
    plan: Plan, found: Pieces, live: Mapping[str, LiveParam], factor: float, default_decay: float
) -> list[Problem]:
    problems: list[Problem] = []
    for name, entry in plan.entries.items():
        if name not in live:
            problems.append(("not stepped", f"{name}: not stepped by the optimizer"))
        else:
            problems += _compare(entry, live[name], factor, default_decay)
    problems += [
        ("unplanned", f"{n}: stepped at lr {p.lr:g}, not in the plan") for n, p in live.items() if n not in plan.entries
    ]
    problems += [("repeated", f"{n}: stepped by two groups") for n in base.repeated(found)]
    if found.strangers:
        problems.append(("not stepped", f"{found.strangers} tensors in the optimizer are no parameters of the model"))
    return problems


def _compare(entry: PlanEntry, live: LiveParam, factor: float, default_decay: float) -> list[Problem]:
    problems: list[Problem] = []
    wanted = entry.lr * factor
    if not math.isclose(live.lr, wanted, rel_tol=_ROUNDING, abs_tol=0.0):
        problems.append(("lr", f"{entry.name}: planned lr {wanted:.6g}, live {live.lr:.6g}"))
    decay = default_decay if entry.weight_decay is None else entry.weight_decay
    if not math.isclose(live.weight_decay, decay, rel_tol=1e-9, abs_tol=0.0):
        problems.append(("weight decay", f"{entry.name}: planned weight decay {decay:g}, live {live.weight_decay:g}"))
    return problems


def _check_elements(plan: Plan, live: Mapping[str, LiveParam]) -> None:
    """Local element counts, summed over ranks, must equal the true sizes."""
    names = sorted(plan.entries)
    counts = torch.tensor([live[n].numel for n in names], dtype=torch.int64)
    if dist.is_available() and dist.is_initialized():
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        counts = counts.to(device)
        dist.all_reduce(counts)
    problems: list[Problem] = []
    for name, count in zip(names, counts.tolist(), strict=True):
        wanted = plan.entries[name].numel * live[name].replicas
        if count != wanted:
            problems.append(("elements", f"{name}: {count} elements stepped over all ranks, {wanted} expected"))
    if problems:
        raise mismatch(0, problems[:SHOWN], len(problems))
