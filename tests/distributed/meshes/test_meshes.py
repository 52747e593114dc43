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
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor, Partial, Shard

from dist_layerlr import (
    attach,
    effect_check,
    export_weights,
    load_checkpoint,
    plan_model,
    save_checkpoint,
    verify,
)
from dist_layerlr.errors import CheckpointError, ConfigError, PlanMismatch
from dist_layerlr.sharders import placement
from dist_layerlr.weights.gather import LiveWeights
from tests.support.cases import At, Cases, Outcomes
from tests.support.meshes import (
    CONFIG,
    EXACT,
    LAYOUTS,
    Net,
    Trained,
    adamw,
    cut,
    hybrid_and_tensor_parallel,
    loss,
    mesh,
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
    wrong: list[Any] = [None]
    if dist.get_rank() == 0:
        wrong[0] = sorted(found.keys() ^ wanted.keys())
        for name in found.keys() & wanted.keys():
            if not torch.allclose(found[name], wanted[name], rtol=0, atol=EXACT):
                wrong[0].append(name)
    # All ranks hear of it: none may wait for one that has failed.
    dist.broadcast_object_list(wrong)
    assert not wrong[0], (what, wrong[0])


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


@cases
def test_effects_of_sequence_parallel_norms_are_seen_at_their_rates(at: At) -> None:
    """Their gradients are addends on each rank: one of them alone shows another rate."""
    net = Net()
    plan = plan_model(net, CONFIG)
    model = LAYOUTS["sequence parallel"](net)
    optimizer = attach(plan, model, lambda g: torch.optim.SGD(g, lr=1.0, weight_decay=0.1))
    loss(model, 0).backward()
    with effect_check(plan, model, optimizer) as rates:
        optimizer.step()
    for name, rate in rates.items():
        assert rate == pytest.approx(plan.entries[name].lr, rel=1e-6), name
    assert "blocks.1.norm.weight" in rates


@cases
def test_halves_of_the_ranks_that_train_apart_are_refused(at: At) -> None:
    """Each half shards a copy of the model, and nobody synchronises the halves."""
    trained = Trained(LAYOUTS["two meshes"], seed=at.rank // 2)
    verify(trained.plan, trained.model, trained.optimizer)
    told = r"ranks [01] and [23] hold different values"
    with pytest.raises(PlanMismatch, match=told):
        verify(trained.plan, trained.model, trained.optimizer, deep=True)
    with pytest.raises(CheckpointError, match=told):
        save_checkpoint(at.folder / "no", trained.plan, trained.model, trained.optimizer, step=0)
    with pytest.raises(PlanMismatch, match=told):
        export_weights(trained.model, at.folder, format="diffusers")


@cases
def test_what_no_placement_describes_is_refused_by_name(at: At) -> None:
    on = mesh(4)
    halves = DTensor.from_local(torch.ones(2, 3), on, [Shard(0)], shape=(20, 3), stride=(3, 1))
    addend = DTensor.from_local(torch.ones(2, 3), on, [Partial()])
    for odd, told in (
        (halves, r"gives this rank \(5, 3\), but it holds \(2, 3\)"),
        (addend, "has its value on no rank. Place parameters as Shard or Replicate"),
    ):
        model: Any = nn.Module()
        model.odd = nn.Parameter(odd)
        with pytest.raises(PlanMismatch, match=rf"odd.* is placed as .*{told}"):
            LiveWeights(model)


@cases
def test_a_parameter_in_too_many_runs_is_refused_by_name(at: At) -> None:
    trained = Trained(LAYOUTS["last dimension"])
    limit, placement.MAX_RUNS = placement.MAX_RUNS, 4
    try:
        with pytest.raises(PlanMismatch, match=r"weight .* in \d+ separate runs .*, at most 4 can"):
            LiveWeights(trained.model)
    finally:
        placement.MAX_RUNS = limit


@cases
def test_fsdp1_over_tensor_parallelism_is_refused_by_name(at: At) -> None:
    net, on = Net(), mesh(2, 2)
    plan = plan_model(net, CONFIG)
    cut(net, on["tp"])
    cpu = torch.device("cpu")
    model = FSDP(net, device_mesh=on["dp"], use_orig_params=True, device_id=cpu)
    with pytest.raises(ConfigError, match=r"blocks\.0\.up\.weight was cut by tensor parallelism"):
        attach(plan, model, adamw)


def on_eight(rank: int, world_size: int, folder: Path) -> None:
    check("", hybrid_and_tensor_parallel, At(rank, world_size, folder), "auto")


def test_hybrid_and_tensor_parallel_is_as_one_process_is(tmp_path: Path) -> None:
    """On a mesh of three dimensions, hence on 8 ranks."""
    run_ranks(on_eight, 8, tmp_path)
