"""The orthogonal factor is that of torch's public step; nothing that stays is used up for it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_layerlr import PlanMismatch, attach, effect_check, plan_model
from dist_layerlr.optim.orthogonal import orthogonalise
from dist_layerlr.optim.readback import optimizer_state

SETTINGS: dict[str, Any] = {"ns_coefficients": (3.4445, -4.775, 2.0315), "eps": 1e-7, "ns_steps": 5}
CONFIG = {
    "learning_rate": 1e-3,
    "per_layer_lr": {"enabled": True, "component_lr": {}, "depth_strategy": "flat"},
    "optimizers": {"muon": {"lr_multiplier": 20}, "adamw": "rest"},
}


def by_a_public_step(matrix: Tensor) -> Tensor:
    """A weight of 0 after one step of torch.optim.Muon at rate 1, which it scales by the shape."""
    weight = nn.Parameter(torch.zeros_like(matrix))
    weight.grad = matrix.clone()
    torch.optim.Muon(
        [weight], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, adjust_lr_fn="original"
    ).step()
    scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
    return -weight.detach() / scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 13), (13, 7), (8, 8)])
def test_the_factor_is_what_a_public_step_moves_a_weight_by(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape).to(dtype)
    wanted = by_a_public_step(matrix)
    (found,) = orthogonalise([(matrix.clone(), (), SETTINGS)])
    torch.testing.assert_close(
        found.to(dtype), wanted, rtol=1e-2 if dtype.itemsize == 2 else 1e-6, atol=0
    )


def test_parts_of_a_fused_matrix_are_matrices_of_their_own() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(24, 8)
    (found,) = orthogonalise([(matrix.clone(), (8, 8, 8), SETTINGS)])
    for part, factor in zip(matrix.split(8), found.split(8), strict=True):
        assert torch.equal(factor.float(), by_a_public_step(part))


def make_models() -> list[nn.ModuleDict]:
    """Twice the same, with bf16 weights."""
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        # Wide: torch adds a transposed factor in another way, which rounds otherwise in bf16.
        block = nn.ModuleDict({"attn": nn.ModuleDict({"to_q": nn.Linear(12, 8)})})
        found.append(nn.ModuleDict({"blocks": nn.ModuleList([block])}).to(torch.bfloat16))
    return found


def give_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def attached(model: nn.Module, **settings: Any) -> tuple[Any, Any]:
    plan = plan_model(model, CONFIG)
    muon = partial(torch.optim.Muon, weight_decay=0.1, **settings)
    return plan, attach(plan, model, {"muon": muon, "adamw": torch.optim.AdamW})


def test_weights_of_bf16_are_stepped_to_the_bit_as_torch_steps_them() -> None:
    mine, theirs = make_models()
    plan, optimizer = attached(mine)
    weight, _ = theirs.parameters()
    reference = torch.optim.Muon([weight], lr=2e-2, weight_decay=0.1)
    for step in range(4):
        give_gradients(mine, step)
        give_gradients(theirs, step)
        with effect_check(plan, mine, optimizer):
            optimizer.step()
        reference.step()
        assert torch.equal(next(mine.parameters()), weight), step


def test_the_momentum_of_bf16_weights_is_not_used_up() -> None:
    """Without Nesterov it is what is orthogonalised; torch's own Muon normalises it in place."""
    mine, _ = make_models()
    plan, optimizer = attached(mine, nesterov=False)
    wanted = torch.zeros(8, 12, dtype=torch.bfloat16)
    for step in range(3):
        give_gradients(mine, step)
        weight, _ = mine.parameters()
        assert weight.grad is not None
        wanted.lerp_(weight.grad, 0.05)
        with effect_check(plan, mine, optimizer):
            optimizer.step()
    (span,) = optimizer_state(mine, optimizer)["blocks.0.attn.to_q.weight"]
    assert torch.equal(span.tensors["muon_momentum"].view(8, 12), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_that_is_held_still_must_not_move_by_less_than_it_is_rounded(
    dtype: torch.dtype,
) -> None:
    for held in ({"lr_multiplier": 0}, {"lr_multiplier": 20}):
        mine = make_models()[0].to(dtype)
        plan = plan_model(mine, {**CONFIG, "optimizers": {"muon": held, "adamw": "rest"}})
        optimizer = attach(plan, mine, {"muon": torch.optim.Muon, "adamw": torch.optim.AdamW})
        # Either the plan holds it, or the schedule is at 0.
        factor = 0.0 if held["lr_multiplier"] else None
        for group in optimizer.param_groups:
            group["lr"] *= 1.0 if factor is None else factor
        give_gradients(mine, 0)
        weight, _ = mine.parameters()
        assert weight.grad is not None
        (along,) = orthogonalise([(weight.grad.clone(), (), SETTINGS)])
        with pytest.raises(PlanMismatch, match="to_q.weight: planned lr 0, the step moved it at"):
            with effect_check(plan, mine, optimizer, factor=factor):
                optimizer.step()
                weight.data.add_(along.to(dtype), alpha=-2e-3)


def test_torch_still_normalises_that_momentum_and_rounds_the_decay_of_many_at_once() -> None:
    """Two silent faults of torch 2.13 in bf16; when it mends one, docs/proof.md must be told."""
    gradient = torch.randn(8, 12, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    weight = nn.Parameter(torch.zeros(8, 12, dtype=torch.bfloat16))
    weight.grad = gradient
    reference = torch.optim.Muon([weight], lr=2e-2, nesterov=False)
    reference.step()
    kept = reference.state[weight]["momentum_buffer"]
    assert not torch.equal(kept, torch.zeros_like(kept).lerp_(gradient, 0.05))
    assert float(kept.norm()) == pytest.approx(1.0, abs=0.01)
    many, one = gradient.clone(), gradient.clone()
    torch._foreach_mul_([many], 0.998)
    one.mul_(0.998)
    assert not torch.equal(many, one)
