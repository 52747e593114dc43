"""DTensors with any placement on any mesh: trained, proven, gathered, saved, loaded and exported as
if one process had done it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from dist_layerlr import export_weights, load_checkpoint, save_checkpoint, verify
from dist_layerlr.weights.gather import LiveWeights
from tests.support.cases import At, Cases, Outcomes
from tests.support.meshes import (
    EXACT,
    LAYOUTS,
    Trained,
    hybrid_and_tensor_parallel,
    unsharded,
)
from tests.support.ranks import run_ranks

STEPS = 2
cases = Cases(world_size=4)
OTHERS = {"plain": "last dimension", "fsdp2": "last dimension"}
"""Which layout loads what another has saved; the rest are loaded without any placement."""


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    return cases.run(request)


def gathered(model: Any) -> dict[str, Tensor]:
    """All whole tensors, on rank 0."""
    source = LiveWeights(model)
    source.check(source.table)
    found = {name: source.fetch(name) for name in source.table}
    return {name: value for name, value in found.items() if value is not None}


def agrees(found: dict[str, Tensor], wanted: dict[str, Tensor], what: str) -> None:
    if dist.get_rank() == 0:
        assert found.keys() == wanted.keys(), what
        for name, value in found.items():
            assert torch.allclose(value, wanted[name], rtol=0, atol=EXACT), (what, name)


def check(name: str, place: Any, at: At, emission: str) -> None:
    """Every door, one after the other, against one process."""
    trained = Trained(place, emission=emission)
    for number in range(STEPS):
        trained.step(number)
    proof = verify(trained.plan, trained.model, trained.optimizer, deep=True, steps=STEPS)
    assert proof.parameters == len(trained.plan.entries)
    agrees(gathered(trained.model), unsharded(STEPS), "trained and gathered")
    path = at.folder / "checkpoints"
    save_checkpoint(path, trained.plan, trained.model, trained.optimizer, step=STEPS)
    export_weights(trained.model, at.folder, format="diffusers")
    if at.rank == 0:
        file = load_file(at.folder / "diffusion_pytorch_model.safetensors")
        agrees(file, unsharded(STEPS), "exported")
    # Into another layout, and into itself: other weights and moments, until they are loaded.
    for target in (LAYOUTS[OTHERS.get(name, "plain")], place):
        other = Trained(target, emission=emission, seed=1)
        other.step(0)
        restored = load_checkpoint(path, other.plan, other.model, other.optimizer)
        assert restored.step == STEPS and not restored.fresh
        agrees(gathered(other.model), unsharded(STEPS), "loaded")
        other.step(STEPS)
        agrees(gathered(other.model), unsharded(STEPS + 1), "trained on")


def matrix(name: str, emission: str) -> Callable[[Outcomes], None]:
    def body(at: At) -> None:
        check(name, LAYOUTS[name], at, emission)

    slug = name.replace(" ", "_")
    body.__name__ = f"test_{slug}_is_as_one_process_is_with_{emission}"
    return cases(body)


for _name in LAYOUTS:
    for _emission in ("groups", "segmented") if "parallel" in _name else ("segmented",):
        _test = matrix(_name, _emission)
        globals()[_test.__name__] = _test


def on_eight(rank: int, world_size: int, folder: Path) -> None:
    check("", hybrid_and_tensor_parallel, At(rank, world_size, folder), "auto")


def test_hybrid_and_tensor_parallel_is_as_one_process_is(tmp_path: Path) -> None:
    """On a mesh of three dimensions, hence on 8 ranks."""
    run_ranks(on_eight, 8, tmp_path)
