"""Other rates while a run trains: the plan changes, and the live optimizer with it, everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from dist_layerlr.optim.readback import factor_in_force, live_pieces
from dist_layerlr.optim.regroup import regroup, regroup_problems
from dist_layerlr.plan.entries import Plan
from dist_layerlr.plan.steer import Changes, steered
from dist_layerlr.proof.reapply import reapply
from dist_layerlr.proof.verify import verify
from dist_layerlr.ranks import alike, together
from dist_layerlr.sharders import sharder_of


def steer(
    plan: Plan,
    model: nn.Module,
    optimizer: Any = None,
    *,
    changes: Mapping[str, Any] | Changes,
    factor: float | None = None,
    scheduler: Any = None,
) -> Plan:
    """Change rates between two steps of a loop of your own, and prove them. Collective.

    ``plan = steer(plan, model, optimizer, changes={"scale": [{"component": "ffn", "by": 0.5}]})``.
    Go on with the plan that is returned. Keep the changes in your checkpoints (``extra``), and
    after a restart make the plan with ``steered(plan, *changes)`` before ``attach``.

    Args:
        plan: in force.
        model: as it is trained.
        optimizer: the one that is stepped; a DeepSpeed engine brings its own.
        changes: what ``steered`` takes. The same on all ranks.
        factor: the schedule's multiplier in force. None: the one that the live groups are at; give
            it where every rate is 0, of which it cannot be read.
        scheduler: see ``reapply``.

    Raises:
        ConfigError: a bad change; nothing has changed then.
        PlanMismatch: ranks were given different changes, or the optimizer cannot take them; nothing
            has changed then either.
    """
    new = alike(lambda: steered(plan, changes))
    put_in_force(new, model, optimizer, factor=factor, scheduler=scheduler)
    verify(new, model, optimizer, factor=factor)
    return new


def put_in_force(
    plan: Plan,
    model: nn.Module,
    optimizer: Any = None,
    *,
    factor: float | None = None,
    scheduler: Any = None,
) -> None:
    """Give a live optimizer the rates of another plan of the same names. Collective.

    The schedule's multiplier stays, and so does all state.

    Args:
        plan: to be in force.
        model: as it is trained.
        optimizer: the one that is stepped; a DeepSpeed engine brings its own.
        factor: see ``steer``.
        scheduler: see ``reapply``.

    Raises:
        PlanMismatch: plans differ between ranks, or the optimizer steps names in one piece that
            are to have different rates. Nothing has changed then.
    """
    sharder = sharder_of(model)
    # The digest is compared between ranks before any of them writes.
    with together(plan.digest) as problems:
        in_force = factor_in_force(live_pieces(sharder, optimizer)) if factor is None else factor
        found = sharder.pieces(optimizer)
        problems += regroup_problems(plan, sharder, found)
    alike(lambda: regroup(plan, found))
    reapply(plan, model, optimizer, factor=in_force, scheduler=scheduler)
