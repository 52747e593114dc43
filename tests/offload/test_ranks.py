"""Streaming beside the plan and under DDP."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import dist_layerlr
from dist_layerlr.errors import OffloadError
from tests.support.families import BLOCKS
from tests.support.ranks import run_ranks
from tests.support.training import Case, assert_equal, attach, exact, loss_of, train, weights

LORA, FULL = Case(lora=True), Case(lora=False)
CONFIG = {
    "learning_rate": 1e-3,
    "per_layer_lr": {
        "enabled": True,
        "component_lr": {"self_attn": 4e-3, "ffn": 2e-3},
        "depth_strategy": "linear",
    },
}


def _optimizer(plan: Any, model: nn.Module, emission: str) -> torch.optim.Optimizer:
    return dist_layerlr.attach(
        plan, model, lambda groups: torch.optim.AdamW(groups), emission=emission
    )


@pytest.mark.parametrize("emission", ["groups", "segmented"])
@pytest.mark.parametrize("case", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_proof_holds_before_during_and_after_streaming(case: Case, emission: str, device: str):
    resident, streamed = (
        _proven(case, emission, device, streamed=streamed) for streamed in (False, True)
    )
    assert_equal(streamed, resident, exact=exact(case, device))


def _proven(case: Case, emission: str, device: str, *, streamed: bool) -> dict[str, torch.Tensor]:
    """Weights of a training with a proof at every step."""
    model = case.model()
    plan = dist_layerlr.plan_model(model, CONFIG)
    assert len({e.lr for e in plan.entries.values()}) >= 6
    model = model if streamed else model.to(device)
    optimizer = _optimizer(plan, model, emission)

    def prove() -> None:
        assert dist_layerlr.verify(plan, model, optimizer).digest == plan.digest

    prove()
    with attach(model, case, device) if streamed else nullcontext():
        prove()
        train(model, optimizer, case, device, after_step=prove)
    prove()
    return weights(model)


def _ddp(rank: int, world_size: int) -> Any:
    results = []
    for streamed in (False, True):
        model = LORA.model()
        plan = dist_layerlr.plan_model(model, CONFIG)
        handle = attach(model, LORA, "cpu") if streamed else None
        if handle is not None:
            handle.exclude_from_ddp()
        wrapped = DDP(model)
        optimizer = dist_layerlr.attach(plan, wrapped, lambda groups: torch.optim.AdamW(groups))
        for step in range(3):
            loss_of(wrapped, LORA, 2 * step + rank, "cpu").backward()
            optimizer.step()
            optimizer.zero_grad()
            dist_layerlr.verify(plan, wrapped, optimizer)
        results.append({n: p.tolist() for n, p in weights(model).items()})
        if handle is not None:
            assert handle.stats().total.fetches == 2 * BLOCKS - 3 + 2 * 2 * (BLOCKS - 3)
            with pytest.raises(
                OffloadError, match="DistributedDataParallel: stream the model first"
            ):
                attach(wrapped, LORA, "cpu")
            handle.remove()
            assert "_ddp_params_and_buffers_to_ignore" not in vars(model)
    with pytest.raises(OffloadError, match="streamed on 2 ranks.*stream_trainable=False"):
        attach(FULL.model(), FULL, "cpu")
    _refuse_sharded()
    dist.barrier()
    return results


def _refuse_sharded() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    model: Any = LORA.model()
    layer = model.blocks[1].attn.to_k
    layer.weight = nn.Parameter(
        distribute_tensor(layer.weight.data, mesh, [Replicate()]), requires_grad=False
    )
    with pytest.raises(
        OffloadError, match="blocks.1.attn.to_k.weight is a DTensor.*CPUOffloadPolicy"
    ):
        attach(model, LORA, "cpu")
    model = LORA.model()
    fully_shard(model.blocks[0], mesh=mesh)
    with pytest.raises(OffloadError, match="'blocks.0' is a FSDPModule.*CPUOffloadPolicy"):
        attach(model, LORA, "cpu")


def test_ddp_trains_adapters_on_a_streamed_base_as_on_a_resident_one():
    ranks = run_ranks(_ddp, 2)
    (resident, streamed), (other, _) = ranks
    assert resident == streamed == other
