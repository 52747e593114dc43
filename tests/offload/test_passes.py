"""The passes of a streamed model: their docstring shows the table that runs, and real scripts walk
it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_layerlr.errors import OffloadError
from dist_layerlr.offload import passes
from dist_layerlr.offload.engine import Engine
from dist_layerlr.offload.passes import TRANSITIONS, Pass, Trigger
from tests.support.training import Case, attach, loss_of

LORA, FULL = Case(lora=True), Case(lora=False)


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> list[Pass]:
    """The passes that any engine was in, one entry per change."""
    found: list[Pass] = []
    change = Engine._change_pass

    def noting(self: Engine, trigger: Trigger) -> None:
        before = self._pass
        change(self, trigger)
        if self._pass is not before:
            found.append(self._pass)

    monkeypatch.setattr(Engine, "_change_pass", noting)
    return found


def test_the_table_in_the_docstring_is_the_table_that_runs():
    assert passes.__doc__ is not None
    body = passes.__doc__.split("=\n")[2]
    found: dict[tuple[Pass, Trigger], Pass] = {}
    for line in body.splitlines()[:4]:
        name, *cells = [
            line[i:j].strip() for i, j in ((0, 22), (22, 44), (44, 58), (58, 80), (80, 99))
        ]
        for trigger, cell in zip(Trigger, cells, strict=True):
            word = cell.partition("(")[0].strip()
            if word:
                found[Pass[name], trigger] = Pass[name if word == "itself" else word]
    assert found == TRANSITIONS


def test_a_pass_that_does_not_follow_is_an_error():
    engine = attach(LORA.model(), LORA, "cpu")._engine
    assert engine is not None
    engine._change_pass(Trigger.BACKWARD_BEGINS)
    with pytest.raises(AssertionError, match="backward begins while backward"):
        engine._change_pass(Trigger.BACKWARD_BEGINS)


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("lora", [True, False])
def test_a_step_is_a_forward_and_a_backward_and_recomputation_is_part_of_the_backward(
    lora: bool, reentrant: bool | None, walked: list[Pass]
):
    case = Case(lora=lora, reentrant=reentrant)
    model = case.model()
    with attach(model, case, "cpu"):
        for step in range(2):
            loss_of(model, case, step, "cpu").backward()
    assert walked == [Pass.FORWARD, Pass.OUTSIDE, Pass.BACKWARD, Pass.OUTSIDE] * 2


def test_a_gradient_taken_inside_the_forward_is_a_backward_in_a_forward(walked: list[Pass]):
    model = FULL.model()
    last: nn.Module = model.blocks[-1]

    def hook(module: nn.Module, args: object, output: object) -> None:
        if torch.is_grad_enabled():
            first = output[0] if isinstance(output, tuple) else output
            assert isinstance(first, torch.Tensor)
            torch.autograd.grad(first.sum(), inputs[0], retain_graph=True)

    inputs: list[torch.Tensor] = []
    model.blocks[0].register_forward_pre_hook(
        lambda m, args, kwargs: inputs.append(next(v for v in (*args, *kwargs.values()))),
        with_kwargs=True,
    )
    last.register_forward_hook(hook)
    with attach(model, FULL, "cpu"):
        loss_of(model, FULL, 0, "cpu")
    assert walked == [Pass.FORWARD, Pass.BACKWARD_IN_FORWARD, Pass.FORWARD, Pass.OUTSIDE]


def test_a_backward_that_fails_ends_before_the_caller_goes_on(walked: list[Pass]):
    model = FULL.model()

    def fail(gradient: torch.Tensor) -> None:
        raise ValueError("bad gradient")

    with attach(model, FULL, "cpu") as handle:
        hook = model.blocks[0].register_full_backward_hook(lambda m, i, o: fail(o[0]))
        with pytest.raises(ValueError, match="bad gradient"):
            loss_of(model, FULL, 0, "cpu").backward()
        hook.remove()
        assert handle._engine is not None and handle._engine._pass is Pass.OUTSIDE
    assert walked == [Pass.FORWARD, Pass.OUTSIDE, Pass.BACKWARD, Pass.OUTSIDE]


def test_a_forward_that_is_refused_never_begins(walked: list[Pass]):
    model = LORA.model()
    with attach(model, LORA, "cpu") as handle:
        weight = handle._homes[0][0].weight.param
        data, weight.data = weight.data, weight.data.clone()
        with pytest.raises(OffloadError, match="was moved"):
            loss_of(model, LORA, 0, "cpu")
        weight.data = data
        loss_of(model, LORA, 0, "cpu")
    assert walked == [Pass.FORWARD, Pass.OUTSIDE]
