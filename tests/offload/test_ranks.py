"""Streaming beside the plan and under DDP."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import dist_layerlr
from dist_layerlr.errors import OffloadError
from models import BLOCKS
from ranks import run_ranks
from training import Case, attach, loss_of, train, weights

LORA, FULL = Case(lora=True), Case(lora=False)
CONFIG = {
    "learning_rate": 1e-3,
    "per_layer_lr": {"enabled": True, "component_lr": {"self_attn": 4e-3, "ffn": 2e-3}, "depth_strategy": "linear"},
}


def _optimizer(plan: Any, model: nn.Module, emission: str) -> torch.optim.Optimizer:
    return dist_layerlr.attach(plan, model, lambda groups: torch.optim.AdamW(groups), emission=emission)


@pytest.mark.parametrize("emission", ["groups", "segmented"])
@pytest.mark.parametrize("case", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_proof_holds_before_during_and_after_streaming(case: Case, emission: str, device: str):
    results = []
    for streamed in (False, True):
        model = case.model()
        plan = dist_layerlr.plan_model(model, CONFIG)
        assert len({e.lr for e in plan.entries.values()}) >= 6
        if not streamed:
            model = model.to(device)
        optimizer = _optimizer(plan, model, emission)
        digests = [dist_layerlr.verify(plan, model, optimizer).digest]
        handle = attach(model, case, device) if streamed else None
        train(
            model,
            optimizer,
            case,
            device,
            after_step=lambda: digests.append(dist_layerlr.verify(plan, model, optimizer).digest),
        )
        if handle is not None:
            handle.remove()
        digests.append(dist_layerlr.verify(plan, model, optimizer).digest)
        assert digests == [plan.digest] * 5
        results.append(weights(model))
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


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
            with pytest.raises(OffloadError, match="DistributedDataParallel: stream the model first"):
                attach(wrapped, LORA, "cpu")
            handle.remove()
    with pytest.raises(OffloadError, match="streamed on 2 ranks.*stream_trainable=False"):
        attach(FULL.model(), FULL, "cpu")
    dist.barrier()
    return results


def test_ddp_trains_adapters_on_a_streamed_base_as_on_a_resident_one():
    ranks = run_ranks(_ddp, 2)
    (resident, streamed), (other, _) = ranks
    assert resident == streamed == other
