"""Code around a streamed model that would train silently wrong: the resident numbers, or a clear
error."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from dist_layerlr.errors import OffloadError
from dist_layerlr.offload.streaming import stream_on
from tests.support.families import MIN_NUMEL, add_lora, toy_batch
from tests.support.toys import WIDTH, Block, Toy
from tests.support.training import (
    Case,
    assert_equal,
    attach,
    backend_of,
    loss_of,
    make_optimizer,
    train,
    weights,
)

LORA, FULL = Case(lora=True), Case(lora=False)
KINDS = pytest.mark.parametrize("case", [LORA, FULL], ids=["lora", "full"])
ON_CPU = pytest.mark.parametrize("device", ["cpu"])


class ComplexBlock(Block):
    """Saves a conjugate and a negative view of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(0.1 * torch.randn(WIDTH, WIDTH, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x + (x.to(torch.complex64) @ self.mix.mH).real + x @ self.mix.conj().imag


class NormalisedBlock(Block):
    """Writes to its own weight, as models with forced weight normalisation do."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mlp[0].weight.copy_(functional.normalize(self.mlp[0].weight, dim=1))
        return super().forward(x)


@KINDS
@ON_CPU
def test_conjugate_and_negative_views_of_complex_weights_train_as_resident(case: Case, device: str):
    results = []
    for streamed in (False, True):
        model = case.model(block=ComplexBlock)
        handle = attach(model, case, device) if streamed else None
        train(model, make_optimizer(model), case, device)
        if handle is not None:
            assert "blocks.0.mix" in handle.streamed_names()
            handle.remove()
        results.append(weights(model))
    assert_equal(results[1], results[0])


@ON_CPU
def test_a_prediction_draws_none_of_the_users_random_numbers(device: str):
    with attach(LORA.model(), LORA, device) as handle:
        before = torch.get_rng_state()
        handle.predict(8)
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("grad", [True, False])
@KINDS
@ON_CPU
def test_weights_written_in_their_own_forward_are_refused(case: Case, grad: bool, device: str):
    model = case.model(block=NormalisedBlock)
    with (
        attach(model, case, device),
        torch.set_grad_enabled(grad),
        pytest.raises(OffloadError, match=r"blocks\.0 were written to during"),
    ):
        model(**toy_batch(0))


def _step_in_backward(model: nn.Module) -> None:
    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: torch.optim.SGD([p], lr=0.1).step())


@ON_CPU
def test_optimizers_that_step_during_backward_are_refused(device: str):
    model = FULL.model()
    with attach(model, FULL, device):
        _step_in_backward(model)
        with pytest.raises(OffloadError, match="Step after backward"):
            loss_of(model, FULL, 0, device).backward()
    before = weights(model)
    with pytest.raises(
        OffloadError, match=r"blocks\.0\.attn\.to_q\.weight has a post-accumulate-grad hook"
    ):
        attach(model, FULL, device)
    assert_equal(weights(model), before)


@ON_CPU
def test_a_weight_frozen_between_forward_and_backward_gets_no_gradient(device: str):
    model = FULL.model()
    with attach(model, FULL, device):
        loss = loss_of(model, FULL, 0, device)
        frozen, *rest = [p for p in model.parameters() if p.numel() >= MIN_NUMEL]
        frozen.requires_grad_(False)
        loss.backward()
        assert frozen.grad is None and all(p.grad is not None for p in rest)


@ON_CPU
def test_memory_shared_with_other_processes_under_a_stream_is_refused(device: str):
    model = FULL.model()
    with attach(model, FULL, device):
        model.share_memory()
        with pytest.raises(OffloadError, match="share_memory"):
            loss_of(model, FULL, 0, device)


@ON_CPU
def test_a_part_of_a_block_that_is_called_alone_loses_no_update(device: str):
    results = []
    for streamed in (False, True):
        model: Any = FULL.model()
        handle = attach(model, FULL, device) if streamed else None
        optimizer = make_optimizer(model)
        for step in range(3):
            loss_of(model, FULL, step, device).backward()
            with torch.no_grad():
                model.blocks[1].mlp[0](torch.ones(1, WIDTH))
            optimizer.step()
            optimizer.zero_grad()
        if handle is not None:
            handle.remove()
        results.append(weights(model))
    assert_equal(results[1], results[0])


@ON_CPU
def test_adapters_merged_into_a_mapped_file_are_seen(device: str, tmp_path: Path):
    torch.manual_seed(0)
    plain = Toy().requires_grad_(False)
    save_file(plain.state_dict(), tmp_path / "model.safetensors")
    model = add_lora(plain, "to_q")
    x = toy_batch(0)["x"]
    with stream_on(
        backend_of(device), model, LORA.policy(host="file"), files=tmp_path / "model.safetensors"
    ):
        wanted = model(x).detach()
        for module in model.modules():
            if hasattr(module, "merge"):
                module.merge()
        torch.testing.assert_close(model(x).detach(), wanted)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, x: torch.func.grad(lambda v: model(v).sum())(x),
        lambda model, x: torch.func.jvp(model, (x,), (x,)),
    ],
    ids=["grad", "jvp"],
)
@ON_CPU
def test_function_transforms_are_refused(call: Callable[[nn.Module, Tensor], Any], device: str):
    model, x = LORA.model(), toy_batch(0)["x"]
    with attach(model, LORA, device):
        with pytest.raises(OffloadError, match=r"torch\.func"):
            call(model, x)
        loss_of(model, LORA, 0, device).backward()


@ON_CPU
def test_a_second_thread_is_refused_while_the_first_one_goes_on(device: str):
    model: Any = LORA.model()
    wanted = model(**toy_batch(0)).detach()
    errors: list[BaseException] = []

    def other() -> None:
        try:
            model(**toy_batch(1))
        except OffloadError as error:
            errors.append(error)

    def in_the_middle(*_: Any) -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    with attach(model, LORA, device):
        hook = model.blocks[2].attn.register_forward_hook(in_the_middle)
        assert torch.equal(model(**toy_batch(0)), wanted)
        hook.remove()
        assert len(errors) == 1 and "Two threads" in str(errors[0])
