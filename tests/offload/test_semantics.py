"""What people do around a training step, streamed: the same result as resident, or a clear
error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_layerlr.errors import OffloadError
from dist_layerlr.offload.streaming import Handle, stream_on
from tests.support.families import BLOCKS, add_lora, toy_batch
from tests.support.toys import Block, DataclassBlock, InnerCheckpointBlock, KeywordBlock
from tests.support.training import (
    Case,
    assert_equal,
    attach,
    backend_of,
    exact,
    loss_of,
    make_optimizer,
    moments,
    train,
    weights,
)

LORA, FULL = Case(lora=True), Case(lora=False)
KINDS = pytest.mark.parametrize("case", [LORA, FULL], ids=["lora", "full"])
ON_CPU = pytest.mark.parametrize("device", ["cpu", "cuda"])
"""Where a device of its own adds nothing."""
Script = Callable[[nn.Module, torch.optim.Optimizer, str], None]


def compare(
    case: Case, device: str, script: Script, *, block: type[Block] = Block, **policy: Any
) -> None:
    """Run a script on the resident and on the streamed model."""
    results = []
    for streamed in (False, True):
        model = case.model(block=block)
        handle = attach(model, case, device, **policy) if streamed else None
        model = model if streamed else model.to(device)
        optimizer = make_optimizer(model)
        script(model, optimizer, device)
        if handle is not None:
            assert all(p.data_ptr() == piece_ptr for p, piece_ptr in at_rest(handle))
            handle.remove()
        results.append((weights(model), moments(model, optimizer)))
    for got, wanted in zip(results[1], results[0], strict=True):
        assert_equal(got, wanted, exact=exact(case, device))


def at_rest(handle: Handle) -> list[tuple[Tensor, int]]:
    """(streamed parameter, address of its host master)."""
    return [(master.weight.param, master.host.data_ptr()) for master, _ in handle._homes]


def two_forwards(case: Case, device: str) -> None:
    """Two forwards and a preview before one backward; more graphs alive than slots."""

    def script(model: nn.Module, optimizer: torch.optim.Optimizer, device: str) -> None:
        for step in range(3):
            for micro in range(2):
                losses = [loss_of(model, case, 4 * step + 2 * micro + i, device) for i in range(2)]
                with torch.no_grad():
                    loss_of(model, case, 99, device)
                sum(losses[1:], losses[0]).backward()
            optimizer.step()
            optimizer.zero_grad()

    compare(case, device, script)


@pytest.mark.parametrize(
    "device, case", [("cpu", LORA), ("cpu", FULL), ("sim", FULL), ("cuda", LORA)], ids=str
)
def test_two_forwards_and_a_preview_before_one_backward(case: Case, device: str):
    two_forwards(case, device)


@KINDS
@ON_CPU
def test_a_preview_between_backward_and_step_loses_no_update(case: Case, device: str):
    def script(model: nn.Module, optimizer: torch.optim.Optimizer, device: str) -> None:
        for step in range(3):
            loss_of(model, case, step, device).backward()
            with torch.no_grad():
                loss_of(model, case, 50 + step, device)
            with torch.inference_mode():
                model(**{k: v.to(device) for k, v in toy_batch(70).items()})
            optimizer.step()
            optimizer.zero_grad()

    compare(case, device, script)


@pytest.mark.parametrize(
    "device, block, reentrant",
    [
        ("cpu", KeywordBlock, None),
        ("cpu", KeywordBlock, False),
        ("cpu", DataclassBlock, True),
        ("sim", DataclassBlock, None),
        ("sim", InnerCheckpointBlock, None),
        ("cuda", KeywordBlock, False),
        ("cuda", InnerCheckpointBlock, None),
    ],
)
def test_blocks_that_take_keywords_or_dataclasses_or_checkpoint_a_part_of_themselves(
    block: type[Block], reentrant: bool | None, device: str
):
    case = Case(lora=device == "cpu", reentrant=reentrant)
    compare(case, device, lambda m, o, d: train(m, o, case, d) and None, block=block)


class _Boom(Exception):
    pass


@KINDS
@pytest.mark.parametrize("where", ["forward", "backward"])
@ON_CPU
def test_an_exception_in_the_middle_of_a_step_leaves_a_usable_model(
    case: Case, where: str, device: str
):
    armed: list[bool] = [False]

    def fail(*_: Any) -> None:
        if armed[0]:
            raise _Boom

    def script(model: nn.Module, optimizer: torch.optim.Optimizer, device: str) -> None:
        blocks: Any = model.blocks
        loss_of(model, case, 0, device).backward()
        if where == "forward":
            blocks[3].mlp[1].register_forward_pre_hook(fail)
        else:
            blocks[2].mlp[1].register_forward_hook(
                lambda m, a, out: out.register_hook(fail) and None
            )
        armed[0] = True
        with pytest.raises(_Boom):
            loss_of(model, case, 1, device).backward()
        armed[0] = False
        # What arrived before the failure is there, as in a resident model, and is stepped.
        optimizer.step()
        optimizer.zero_grad()
        train(model, optimizer, case, device)

    compare(case, device, script)


@ON_CPU
def test_autocast_trains_lora_as_resident(device: str):
    def script(model: nn.Module, optimizer: torch.optim.Optimizer, device: str) -> None:
        with torch.autocast(device, dtype=torch.bfloat16):
            train(model, optimizer, LORA, device)

    compare(LORA, device, script)


@ON_CPU
def test_autocast_of_float32_weights_that_train_needs_its_cache_off(device: str):
    def script(model: nn.Module, optimizer: torch.optim.Optimizer, device: str) -> None:
        with torch.autocast(device, dtype=torch.bfloat16, cache_enabled=False):
            train(model, optimizer, FULL, device)

    compare(FULL, device, script)
    model = FULL.model()
    with attach(model, FULL, device):
        with (
            torch.autocast(device, dtype=torch.bfloat16),
            pytest.raises(OffloadError, match="cache_enabled=False"),
        ):
            loss_of(model, FULL, 0, device)
        loss_of(model, FULL, 0, device).backward()


@pytest.mark.parametrize(
    "case, how", [(LORA, "forward"), (FULL, "wrapper")], ids=["lora-forward", "full-wrapper"]
)
@ON_CPU
def test_compiled_blocks_train_as_resident(case: Case, how: str, device: str):
    def compiled(model: nn.Module) -> None:
        blocks: Any = model.blocks
        for i, block in enumerate(blocks):
            if how == "forward":
                block.forward = torch.compile(block.forward, backend="aot_eager")
            else:
                blocks[i] = torch.compile(block, backend="aot_eager")

    results = []
    for streamed in (False, True):
        model = case.model()
        compiled(model)
        handle = attach(model, case, device) if streamed else None
        model = model if streamed else model.to(device)
        optimizer = make_optimizer(model)
        train(model, optimizer, case, device)
        if handle is not None:
            assert handle.stats().total.fetches > BLOCKS
            handle.remove()
        results.append(weights(model))
    assert_equal(results[1], results[0])


@KINDS
@ON_CPU
def test_state_dict_saves_and_loads_while_streaming(case: Case, device: str, tmp_path: Any):
    from safetensors.torch import load_file, save_file

    def script(model: nn.Module, optimizer: torch.optim.Optimizer, device: str) -> None:
        train(model, optimizer, case, device, steps=1)
        assert_equal({k: v.cpu() for k, v in model.state_dict().items()}, weights(model))
        save_file({k: v.cpu() for k, v in model.state_dict().items()}, tmp_path / "w.safetensors")
        changed = {k: v + 0.01 for k, v in load_file(tmp_path / "w.safetensors").items()}
        model.load_state_dict(changed)
        train(model, optimizer, case, device, steps=1)
        for p in model.parameters():  # as PEFT merges adapters: unseen by version counters
            p.data += 0.01
        train(model, optimizer, case, device, steps=1)

    compare(case, device, script)


@ON_CPU
def test_adapters_injected_after_attach_train_as_resident(device: str):
    results = []
    for streamed in (False, True):
        model = FULL.model().requires_grad_(False)
        handle = attach(model, FULL, device) if streamed else None
        if streamed:
            with torch.no_grad():
                loss_of_frozen(model, device)
        torch.manual_seed(1)
        add_lora(model, "to_q", "mlp.0")
        model = model if streamed else model.to(device)
        optimizer = make_optimizer(model)
        train(model, optimizer, LORA, device)
        if handle is not None:
            handle.remove()
        results.append(weights(model))
    assert_equal(results[1], results[0])


def loss_of_frozen(model: nn.Module, device: str) -> Tensor:
    return model(**{k: v.to(device) for k, v in toy_batch(0).items()}).square().mean()


@pytest.mark.parametrize("device, case", [("cpu", FULL), ("sim", LORA), ("cuda", LORA)], ids=str)
def test_an_optimizer_with_state_goes_on_after_attach_and_after_remove(case: Case, device: str):
    def script(model: nn.Module, optimizer: torch.optim.Optimizer, device: str) -> None:
        train(model, optimizer, case, device)

    wanted = case.model().to(device)
    optimizer = make_optimizer(wanted)
    for _ in range(3):
        script(wanted, optimizer, device)
    model = case.model()
    model.to("cpu" if device == "sim" else device)
    ours = make_optimizer(model)
    if device != "sim":
        script(model, ours, device)
    with stream_on(backend_of(device), model, case.policy(), optimizer=ours):
        script(model, ours, device)
        if device == "sim":
            script(model, ours, device)
    model.to(device)
    for p, state in ours.state.items():
        ours.state[p] = {k: v.to(p.device) if v.ndim else v for k, v in state.items()}
    script(model, ours, device)
    assert_equal(weights(model), weights(wanted))


@pytest.mark.parametrize("case, count", [(LORA, 2), (FULL, 2), (LORA, "auto"), (FULL, 99)], ids=str)
@ON_CPU
def test_resident_blocks_stay_and_are_evenly_spaced(case: Case, count: Any, device: str):
    model = case.model()
    with attach(model, case, device, resident_blocks=count) as handle:
        kept = [i for i, u in enumerate(handle.units) if u.resident]
        assert device == "cuda" or kept == {2: [1, 4], "auto": [], 99: [0, 1, 3, 4, 5]}[count]
        assert len(kept) < BLOCKS
    compare(case, device, lambda m, o, d: train(m, o, case, d) and None, resident_blocks=count)


@KINDS
@ON_CPU
def test_clipping_schedules_and_the_fused_optimizer_work_on_what_streaming_leaves(
    case: Case, device: str
):
    results = []
    for streamed in (False, True):
        model = case.model()
        handle = attach(model, case, device) if streamed else None
        model = model if streamed else model.to(device)
        optimizer = torch.optim.AdamW(
            [{"params": [p], "lr": 1e-3} for p in model.parameters() if p.requires_grad], fused=True
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for step in range(3):
            loss_of(model, case, step, device).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if handle is not None:
            handle.remove()
        results.append(weights(model))
    if device == "cpu":
        assert_equal(results[1], results[0])
    else:  # CPU and CUDA round a fused step differently
        torch.testing.assert_close(results[1], results[0], atol=1e-6, rtol=0)


@ON_CPU
def test_hooks_around_ours_get_what_is_not_streamed(device: str):
    packed: list[int] = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t.numel())
        return t

    counts = []
    for streamed in (False, True):
        model = LORA.model()
        handle = attach(model, LORA, device) if streamed else None
        model = model if streamed else model.to(device)
        packed.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss_of(model, LORA, 0, device).backward()
        names = (
            {n for n, _ in model.named_parameters()}
            if handle is None
            else set(handle.streamed_names())
        )
        counts.append((len(packed), names))
        if handle is not None:
            handle.remove()
    assert 0 < counts[1][0] < counts[0][0]
