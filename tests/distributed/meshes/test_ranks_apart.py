"""Parameters that every rank keeps for itself: refused unless marked, and then saved per rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel as DDP

from dist_layerlr import (
    attach,
    export_weights,
    load_checkpoint,
    plan_model,
    save_checkpoint,
    verify,
)
from dist_layerlr.checkpoint import resume_plan
from dist_layerlr.errors import CheckpointError, ConfigError, LayerLRError, PlanMismatch
from dist_layerlr.export import export_checkpoint
from dist_layerlr.optim import optimizer_state
from dist_layerlr.sharders import mark_distinct
from dist_layerlr.weights.gather import LiveWeights
from tests.support.cases import At, Cases, Outcomes
from tests.support.drivers import start_deepspeed
from tests.support.meshes import CONFIG, Net, Trained, adamw, mesh, shard

NAME = "experts.w"
WHO = r"experts\.w: ranks 0 and 1 hold different values of the same elements"
cases = Cases(before=start_deepspeed)


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    return cases.run(request)


def own_experts(net: Net) -> None:
    """As after construction with a seed for each rank."""
    generator = torch.Generator().manual_seed(50 + dist.get_rank())
    net.experts.w.data = torch.randn(net.experts.w.shape, generator=generator, dtype=torch.float64)


def ddp(net: Net) -> Any:
    own_experts(net)
    DDP._set_params_and_buffers_to_ignore_for_model(net, [NAME])
    return DDP(net, find_unused_parameters=True)


def fsdp2(net: Net) -> Net:
    own_experts(net)
    return shard(net, mesh(dist.get_world_size()), ignored_params={net.experts.w})


WRAPS = {"ddp": ddp, "fsdp2": fsdp2}


def trained(wrap: Any, steps: int = 1) -> Trained:
    found = Trained(wrap)
    for number in range(steps):
        found.backward(number)
        found.optimizer.step()
        found.optimizer.zero_grad()
    return found


def save(run: Trained, folder: Path) -> None:
    save_checkpoint(folder, run.plan, run.model, run.optimizer, step=1)


def load(run: Trained, folder: Path) -> None:
    load_checkpoint(folder, run.plan, run.model, run.optimizer)


def held(run: Trained) -> dict[str, torch.Tensor]:
    """This rank's experts and their moments."""
    state = optimizer_state(run.model, run.optimizer)[NAME]
    experts: Any = run.model.get_parameter(
        ("module." if hasattr(run.model, "module") else "") + NAME
    )
    moments = {key: value.clone() for span in state for key, value in span.tensors.items()}
    return {"weight": experts.detach().clone().flatten(), **moments}


@cases
def test_experts_of_each_rank_are_refused_by_name_until_they_are_marked(at: At) -> None:
    for name, wrap in WRAPS.items():
        run = trained(wrap)
        verify(run.plan, run.model, run.optimizer)
        with pytest.raises(PlanMismatch, match=WHO):
            verify(run.plan, run.model, run.optimizer, deep=True)
        with pytest.raises(CheckpointError, match=WHO):
            save(run, at.folder / name)
        assert not (at.folder / name).exists()
        with pytest.raises(PlanMismatch, match=WHO):
            export_weights(run.model, at.folder / name, format="diffusers")


@cases
def test_marked_ones_are_saved_and_loaded_for_each_rank(at: At) -> None:
    for name, wrap in WRAPS.items():
        run = trained(wrap, 2)
        mark_distinct(run.model, ["experts.*"])
        verify(run.plan, run.model, run.optimizer, deep=True, steps=2)
        save(run, at.folder / name)
        wanted = held(run)
        other = trained(wrap, 1)
        mark_distinct(other.model, ["experts.*"])
        assert resume_plan(at.folder / name, other.plan) == (other.plan, [])
        load(other, at.folder / name)
        found = held(other)
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), name
        by_rank: list[Any] = [None] * at.world_size
        dist.all_gather_object(by_rank, found["weight"])
        assert not torch.equal(by_rank[0], by_rank[1])
        for number in (2, 3):
            for each in (run, other):
                each.optimizer.zero_grad()
                each.backward(number)
                each.optimizer.step()
        assert torch.equal(held(run)["weight"], held(other)["weight"])


@cases
def test_a_checkpoint_of_each_ranks_own_goes_nowhere_else(at: At) -> None:
    run = trained(ddp)
    mark_distinct(run.model, ["experts.*"])
    save(run, at.folder / "apart")
    with pytest.raises(CheckpointError, match=rf"holds {NAME} for each rank. Mark the model"):
        load(trained(ddp), at.folder / "apart")
    with pytest.raises(CheckpointError, match=rf"holds {NAME} for each rank: there is one tensor"):
        export_checkpoint(at.folder / "apart", at.folder / "out", format="diffusers")
    with pytest.raises(PlanMismatch, match=rf"Cannot gather {NAME}: it differs by rank on purpose"):
        export_weights(run.model, at.folder / "out", format="diffusers")
    whole = trained(DDP)
    save(whole, at.folder / "one")
    mark_distinct(whole.model, ["experts.*"])
    with pytest.raises(CheckpointError, match=rf"holds {NAME} once, for all ranks. Mark the model"):
        load(whole, at.folder / "one")


@cases
def test_a_mark_that_matches_nothing_is_refused(at: At) -> None:
    with pytest.raises(ConfigError, match=r"'expert\.\*' of distinct parameters: it matches none"):
        mark_distinct(Net(), ["expert.*"])


@cases
def test_one_bit_of_one_copy_or_moment_is_found(at: At) -> None:
    run = trained(DDP)
    verify(run.plan, run.model, run.optimizer, deep=True)
    moment = optimizer_state(run.model, run.optimizer)["head.weight"][0].tensors["exp_avg_sq"]
    before = moment.clone()
    if at.rank == 1:
        moment[3] = torch.nextafter(moment[3], torch.tensor(1.0, dtype=moment.dtype))
    with pytest.raises(
        CheckpointError, match=r"Cannot save optim\.head\.weight\.exp_avg_sq: ranks"
    ):
        save(run, at.folder / "moment")
    moment.copy_(before)
    frozen = run.model.module.still.weight.data
    if at.rank == 1:
        frozen[2, 2] = -frozen[2, 2]
    with pytest.raises(PlanMismatch, match=r"still\.weight: ranks 0 and 1"):
        verify(run.plan, run.model, run.optimizer, deep=True)


@cases
def test_running_statistics_of_each_rank_are_no_difference(at: At) -> None:
    run = trained(lambda net: DDP(net, broadcast_buffers=False))
    run.model.module.seen.add_(at.rank)
    verify(run.plan, run.model, run.optimizer, deep=True)
    save(run, at.folder / "buffers")
    LiveWeights(run.model).check(["seen", NAME])


@cases
def test_state_inside_a_zero_redundancy_optimizer_is_not_left_out_in_silence(at: At) -> None:
    net = Net()
    plan = plan_model(net, CONFIG)
    model = DDP(net)
    groups = [{"params": [net.get_parameter(n)], "lr": e.lr} for n, e in plan.entries.items()]
    optimizer = ZeroRedundancyOptimizer(groups, torch.optim.AdamW, lr=1.0)
    with pytest.raises(CheckpointError, match="Cannot save or load ZeroRedundancyOptimizer"):
        save_checkpoint(at.folder / "zero", plan, model, optimizer, step=1)
    assert not (at.folder / "zero").exists()


class Stage(nn.Module):
    """A pipeline stage: what it holds depends on the rank."""

    def __init__(self, layer: int):
        super().__init__()
        self.layers = nn.ModuleDict({str(layer): nn.Linear(3, 3)})


@cases
def test_stages_of_a_pipeline_are_refused_on_all_ranks(at: At) -> None:
    stage = Stage(at.rank)
    plan = plan_model(stage, CONFIG)
    optimizer = attach_alone(plan, stage)
    with pytest.raises(LayerLRError, match="plans differ between ranks"):
        verify(plan, stage, optimizer)
    with pytest.raises(PlanMismatch, match=r"hold different parameters: \['layers.0.bias'"):
        LiveWeights(stage)
    torch.manual_seed(at.rank)
    same_names = Stage(0)
    plan = plan_model(same_names, CONFIG)
    optimizer = attach(plan, same_names, adamw)
    with pytest.raises(PlanMismatch, match=r"layers\.0\.weight: ranks 0 and 1"):
        verify(plan, same_names, optimizer, deep=True)


def attach_alone(plan: Any, stage: nn.Module) -> torch.optim.Optimizer:
    """As one who builds the groups by hand: attach itself would refuse two plans."""
    return torch.optim.AdamW(
        [{"params": [stage.get_parameter(n)], "lr": e.lr} for n, e in plan.entries.items()]
    )


@cases
def test_deepspeeds_experts_of_each_rank_are_refused_by_name(at: At) -> None:
    import deepspeed
    from deepspeed.moe.layer import MoE

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Linear(5, 8)
            self.moe = MoE(8, nn.Linear(8, 8), num_experts=2, ep_size=2, k=1, min_capacity=64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.moe(self.emb(x))[0]

    torch.manual_seed(at.rank)
    model: Any = Mixture()
    plan = plan_model(model, CONFIG)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 0},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
    }
    optimizer = attach(plan, model, adamw)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    with pytest.raises(PlanMismatch, match=r"deepspeed_experts.*: ranks 0 and 1 hold different"):
        verify(plan, engine, deep=True)
    with pytest.raises(CheckpointError, match=r"deepspeed_experts.*: ranks 0 and 1 hold different"):
        save_checkpoint(at.folder / "moe", plan, engine, step=1)
