"""Before a load: which checkpoint, and which plan to train with after it."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from dist_layerlr import fields, ranks
from dist_layerlr.checkpoint import folders
from dist_layerlr.checkpoint.manifest import Manifest, plan_problem, read_manifest, read_sealed
from dist_layerlr.checkpoint.schema import Parser, checked, finite
from dist_layerlr.errors import CheckpointError, ConfigError
from dist_layerlr.plan.diff import PLAN_FILE, Rows, plan_diff
from dist_layerlr.plan.entries import Plan
from dist_layerlr.plan.names import without_rank
from dist_layerlr.ranks import alike, rank_zero


def find_checkpoint(folder: str | Path) -> Path:
    """The checkpoint that ``folder`` is, or the newest complete one in it; rank 0's choice.

    Collective.

    Raises:
        CheckpointError: there is none, or a rank does not see it.
    """
    chosen = rank_zero(lambda: folders.latest(folder))
    return alike(lambda: folders.latest(chosen))


def resume_plan(folder: str | Path, plan: Plan) -> tuple[Plan, list[str]]:
    """The plan to train with after a resume, and how ``plan`` differs from the checkpoint's.

    Collective.

    Call it before ``attach``. Under ``resume_lr: plan`` it is the plan itself; under
    ``checkpoint``, names that the checkpoint knows keep its rates and weight decay.

    Raises:
        CheckpointError: no checkpoint there, a damaged one, or one of another model.
    """
    path = find_checkpoint(folder)

    def adapt() -> tuple[Plan, list[str]]:
        manifest = read_manifest(path)
        shapes = {name: entry.shape for name, entry in plan.entries.items()}
        refuse_other_model(path, plan_problem(manifest, shapes))
        return adapted(path, manifest, plan)

    return alike(adapt)


def adapted(path: Path, manifest: Manifest, plan: Plan) -> tuple[Plan, list[str]]:
    """``resume_plan`` for one rank and a manifest that is read already."""
    return inherit(_plan_rows(path, manifest), plan)


def inherit(rows: Rows, plan: Plan) -> tuple[Plan, list[str]]:
    """``resume_plan`` for the rows of the checkpoint's plan."""
    changes = plan_diff(rows, plan, called=("checkpoint's plan", "new plan"))
    if plan.config.per_layer_lr.resume_lr == "plan" or not changes:
        return plan, changes
    entries = dict(plan.entries)
    for name, entry in plan.entries.items():
        if name in rows:
            row = rows[name]
            decay, eps = row["weight_decay"], row.get("eps")
            entries[name] = replace(entry, lr=row["lr"], weight_decay=decay, eps=eps)
    # These rates hold what a run was steered to: they are where its next change begins.
    return replace(plan, entries=entries, origin=None, changes=()), changes


def _plan_rows(path: Path, manifest: Manifest) -> Mapping[str, Mapping[str, Any]]:
    """The parameters of ``plan.json``, with the fields that a comparison and a resume read."""
    content = read_sealed(path, PLAN_FILE, manifest)
    with checked(path / PLAN_FILE):
        rows = fields.mapping("parameters", fields.mapping("plan", content).get("parameters"))
        for name, row in rows.items():
            given = fields.mapping(f"parameters.{name}", row)
            for key, check in _PLAN_FIELDS.items():
                if key not in given and key != "eps":  # only where a plan sets it
                    raise ConfigError(f"Invalid parameters.{name}: {key!r} is missing")
                check(f"parameters.{name}.{key}", given.get(key))
            # Both place a name in a stack of blocks, or neither does.
            if (given.get("stack") is None) != (given.get("block") is None):
                raise fields.invalid(f"parameters.{name}.block", given.get("block"), "with a stack")
    return rows


def _or_null(check: Parser) -> Parser:
    return lambda where, value: None if value is None else check(where, value)


_PLAN_FIELDS: dict[str, Parser] = {
    "lr": fields.number(0.0),
    "weight_decay": _or_null(finite),
    "eps": _or_null(fields.number(0.0, open_low=True)),
    "numel": fields.integer(0),
    "stack": _or_null(fields.text),
    "block": _or_null(fields.integer(0)),
    "component": fields.text,
}


def refuse_other_model(path: Path, problem: str | None) -> None:
    """Raise what ``model_problem`` or ``plan_problem`` has found.

    Raises:
        CheckpointError: there is a problem.
    """
    if problem is not None:
        raise CheckpointError(f"Checkpoint {str(path)!r} is of another model: {problem}.")


def refuse_other_ranks(path: Path, manifest: Manifest, distinct: Set[str]) -> None:
    """Refuse parameters that were saved once per rank, and have no such place in this job.

    Args:
        path: of the checkpoint.
        manifest: of the checkpoint.
        distinct: live parameters that differ by rank on purpose.

    Raises:
        CheckpointError: marked otherwise than when they were saved, or another number of ranks.
    """
    saved = {own for name in manifest.parameters if (own := without_rank(name)) is not None}
    for name in sorted(saved ^ distinct):
        how = "for each rank" if name in saved else "once, for all ranks"
        raise CheckpointError(
            f"Checkpoint {str(path)!r} holds {name} {how}. Mark the model as it was marked when it"
            " was saved (dist_layerlr.sharders.mark_distinct)."
        )
    if saved and manifest.ranks != ranks.world_size():
        raise CheckpointError(
            f"Checkpoint {str(path)!r} holds {min(saved)} for each of {manifest.ranks} ranks, this"
            f" job has {ranks.world_size()}. Start it with as many."
        )
