"""Checkpoints know which optimizer owns which state, in every layout."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest

import dist_layerlr
from dist_layerlr.checkpoint import read_manifest
from dist_layerlr.errors import CheckpointError
from tests.support.cases import At, Outcomes, items_of, run_bodies
from tests.support.drivers import start_deepspeed
from tests.support.naive_deepspeed import silence
from tests.support.several import (
    BAR,
    CONFIG,
    LAYOUTS,
    NET,
    STEPS,
    Run,
    adamw,
    distance,
    reference_of,
)

HALF = STEPS // 2
SHORT = {("fsdp1_flat", "zero 2"), ("zero 3", "fsdp2"), ("fsdp2", "fsdp1_flat"), ("zero 1", "ddp")}
SHARDED = [layout for layout in LAYOUTS if layout not in ("none", "zero 0")]
PAIRS = [
    pytest.param(pair, marks=[] if pair in SHORT else [pytest.mark.full])
    for pair in product(SHARDED, SHARDED)
]


def resumed(before: str, after: str, at: At) -> float:
    """Half of the steps under one layout, the other half under another."""
    with silence():
        run = Run(NET, before)
        run.train(HALF)
        dist_layerlr.save_checkpoint(at.folder, run.plan, run.model, run.optimizer, step=HALF)
        later = Run(NET, after)
        found = dist_layerlr.load_checkpoint(at.folder, later.plan, later.model, later.optimizer)
        assert not found.fresh and not found.changes
        later.train(HALF, first=HALF)
        proof = dist_layerlr.verify(later.plan, later.model, later.optimizer, deep=True)
        assert proof.optimizers == {"Muon": 24, "AdamW": 53}
        return distance(later.weights(), reference_of(NET))


def other(**rules: Any) -> dict[str, Any]:
    return {**CONFIG, "optimizers": {"muon": {"lr_multiplier": 3.0, **rules}, "adamw": "rest"}}


def a_changed_name_starts_fresh(at: At) -> list[Any]:
    """Feed-forwards go from AdamW to Muon, attention back to AdamW."""
    with silence():
        run = Run(NET, "fsdp2", config=other(components=["self_attn"]))
        run.train(2)
        dist_layerlr.save_checkpoint(at.folder, run.plan, run.model, run.optimizer, step=2)
        manifest = read_manifest(next(at.folder.glob("step_*")))
        later = Run(NET, "fsdp2", config=other(components=["ffn"]))
        found = dist_layerlr.load_checkpoint(at.folder, later.plan, later.model, later.optimizer)
        states = dist_layerlr.optim.optimizer_state(later.model, later.optimizer)
        later.train(1, first=2)
        keys = dist_layerlr.optim.optimizer_state(later.model, later.optimizer)
    key = "blocks.0.mlp.0.weight"
    return [
        sorted(found.fresh),
        [text for text in found.changes if "starts fresh" in text],
        {name: len(names) for name, names in manifest.optimizers.items()},
        key in states,
        sorted(keys[key][0].tensors),
    ]


def a_counter_cannot_be_shared(at: At) -> str:
    """In one flat tensor, a matrix that comes to AdamW would get the counter of the others."""
    with silence():
        run = Run(NET, "fsdp1_flat")
        run.train(1)
        dist_layerlr.save_checkpoint(at.folder, run.plan, run.model, run.optimizer, step=1)
        later = Run(NET, "fsdp1_flat", config=other(components=["ffn"]))
        with pytest.raises(CheckpointError) as caught:
            dist_layerlr.load_checkpoint(at.folder, later.plan, later.model, later.optimizer)
        later.train(1)
    return str(caught.value)


def one_for_all_becomes_several(at: At) -> list[Any]:
    with silence():
        flat = {key: value for key, value in CONFIG.items() if key != "optimizers"}
        run = Run(NET, "ddp", makes=adamw, config=flat)
        run.train(1)
        dist_layerlr.save_checkpoint(at.folder, run.plan, run.model, run.optimizer, step=1)
        later = Run(NET, "fsdp2")
        found = dist_layerlr.load_checkpoint(at.folder, later.plan, later.model, later.optimizer)
        steps = dist_layerlr.optim.optimizer_state(later.model, later.optimizer)
    return [len(found.fresh), float(steps["blocks.0.norm1.weight"][0].tensors["step"])]


BODIES = {
    "fresh": a_changed_name_starts_fresh,
    "shared": a_counter_cannot_be_shared,
    "becomes": one_for_all_becomes_several,
}


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[Outcomes]:
    bodies: dict[str, Any] = dict(BODIES)
    for item in items_of(request):
        if hasattr(item, "callspec"):
            before, after = item.callspec.params["pair"]
            bodies[f"{before} -> {after}"] = lambda at, b=before, a=after: resumed(b, a, at)
    yield run_bodies(bodies, 2, start_deepspeed)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: " to ".join(pair))
def test_a_resume_in_another_layout_ends_where_one_run_ends(
    pair: tuple[str, str], outcomes: Outcomes
) -> None:
    for far in outcomes.settle(" -> ".join(pair)):
        assert far < BAR


def test_a_name_whose_optimizer_changed_starts_fresh_and_all_ranks_say_so(
    outcomes: Outcomes,
) -> None:
    first, second = outcomes.settle("fresh")
    assert first == second
    fresh, told, owned, has_state, keys = first
    assert len(fresh) == 24 and all(".weight" in name for name in fresh)
    assert len(told) == 2 and all("starts fresh" in text for text in told)
    assert "stepped by AdamW before, by Muon now" in " ".join(told)
    assert owned == {"Muon": 12, "AdamW": 65}
    assert not has_state
    assert keys == ["muon_momentum"]


def test_a_counter_that_would_be_anothers_is_refused(outcomes: Outcomes) -> None:
    for text in outcomes.settle("shared"):
        assert "attn" in text and "no step counter" in text


def test_a_checkpoint_of_one_optimizer_is_taken_by_several(outcomes: Outcomes) -> None:
    for fresh, counted in outcomes.settle("becomes"):
        assert (fresh, counted) == (24, 1.0)
