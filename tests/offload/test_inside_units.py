"""What happens inside of a unit's forward, while the hooks of its modules rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.toys import WIDTH
from tests.support.training import Case, assert_equal, attach

LORA, FULL = Case(lora=True), Case(lora=False)
BOTH = pytest.mark.parametrize("case", [LORA, FULL], ids=["lora", "full"])
DEVICES = pytest.mark.parametrize("device", ["cpu", "sim", "cuda"])


def _run(model: Any, device: str) -> dict[str, Tensor]:
    """Outputs and gradients of three passes through four blocks."""
    found: dict[str, Tensor] = {}
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(3, WIDTH, generator=generator).to(device).requires_grad_()
        for block in model.blocks[:4]:
            x = block(x)
        found[f"output {step}"] = x.detach().cpu()
        x.square().sum().backward()
    for name, param in model.named_parameters():
        if param.grad is not None:
            found[name] = param.grad.detach().cpu().clone()
    return found


def _compare(case: Case, device: str, interrupt: Any) -> None:
    """With something in the middle of the third block, between its attention and its MLP."""
    twin, model = case.model().to(device), case.model()
    for one in (twin, model):
        one.blocks[2].mlp.register_forward_pre_hook(
            lambda module, args, one=one: (interrupt(one, args[0]),)
        )
    wanted = _run(twin, device)
    with attach(model, case, device):
        assert_equal(_run(model, device), wanted)


def another_unit_inside(case: Case, device: str) -> None:
    """The last block runs in the middle of the third."""
    _compare(case, device, lambda model, x: x + model.blocks[5](x))


def module_alone(device: str) -> None:
    """An MLP runs without its block, behind a forward of the block."""
    model, x = LORA.model(), torch.ones(2, WIDTH).to(device)
    with attach(model, LORA, device), torch.no_grad():
        model.blocks[1](x)
        model.blocks[1].mlp(x)


@BOTH
@DEVICES
def test_a_unit_inside_of_another_ones_forward_takes_its_place_for_a_while(case: Case, device: str):
    another_unit_inside(case, device)


@BOTH
@DEVICES
def test_a_backward_inside_of_a_units_forward_takes_its_place_for_a_while(case: Case, device: str):
    def interrupt(model: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            start = x.detach().requires_grad_()
            # The block was computed in an earlier forward, so backward alone asks for it.
            (gradient,) = torch.autograd.grad(model.blocks[5](start).sum(), start)
        return x + gradient

    _compare(case, device, interrupt)


@BOTH
@DEVICES
def test_an_exception_in_a_unit_leaves_hooks_that_work(case: Case, device: str):
    def script(model: Any) -> list[Tensor]:
        x = torch.ones(2, WIDTH).to(device)
        with pytest.raises(RuntimeError):
            model.blocks[2](torch.ones(2, WIDTH + 1).to(device))
        return [model.blocks[2].mlp(x).detach().cpu(), model.blocks[2](x).detach().cpu()]

    twin, model = case.model().to(device), case.model()
    wanted = script(twin)
    with attach(model, case, device) as handle:
        assert all(map(torch.equal, script(model), wanted))
        streamed = set(handle.streamed_names())
        at_rest = [p for n, p in model.named_parameters() if n in streamed]
        assert all(p.device.type == "cpu" for p in at_rest)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@DEVICES
def test_a_hook_of_the_caller_sees_the_weight_where_it_is_computed(device: str):
    model = LORA.model()
    seen: list[str] = []
    with attach(model, LORA, device):
        for block in model.blocks:
            block.mlp[2].register_forward_pre_hook(
                lambda m, args: seen.append(m.weight.device.type)
            )
        with torch.no_grad():
            for block in (model.blocks[1], model.blocks[3]):
                block(torch.ones(2, WIDTH).to(device))
            model.blocks[1].mlp(torch.ones(2, WIDTH).to(device))  # without its unit
    assert seen == [device] * 3
