"""A backward or a copy that fails: nothing of it may reach a later step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dist_layerlr.errors import OffloadError
from dist_layerlr.offload import budget
from dist_layerlr.offload import engine as engine_module
from dist_layerlr.offload.masters import payload_bytes
from dist_layerlr.offload.streaming import Handle, stream_on
from dist_layerlr.offload.units import find_units
from tests.support.adversary import Adversary
from tests.support.families import toy_batch
from tests.support.toys import WIDTH
from tests.support.training import (
    Case,
    assert_equal,
    attach,
    loss_of,
    make_optimizer,
    train,
    weights,
)

LORA, FULL = Case(lora=True), Case(lora=False)


class _Boom(Exception):
    pass


def _fail_in_backward(model: Any, case: Case, device: str) -> None:
    hook = model.blocks[2].register_full_backward_hook(_raise)
    with pytest.raises(_Boom):
        loss_of(model, case, 7, device).backward()
    hook.remove()


def _raise(*_: Any) -> None:
    raise _Boom


@pytest.mark.parametrize("device", ["cpu"])
@pytest.mark.parametrize("late", ["held", "dropped"])
@pytest.mark.parametrize("case", [LORA, FULL], ids=["lora", "full"])
def test_a_backward_that_failed_on_a_device_never_settles_behind_the_callers_back(
    case: Case, late: str, device: str, monkeypatch: pytest.MonkeyPatch
):
    held: list[Any] = []  # what the device's thread still holds when the caller goes on
    queue = engine_module.at_end_of_backward

    def hold(call: Any) -> None:
        if late == "held":
            held.append(call)
        queue(call)

    def script(model: Any, handle: Handle | None) -> dict[str, torch.Tensor]:
        optimizer = make_optimizer(model)
        loss_of(model, case, 0, device).backward()
        _fail_in_backward(model, case, device)
        if handle is not None and case is FULL:
            assert model.blocks[5].attn.to_q.weight.grad is None  # neither put back nor zeroed
            x = torch.ones(2, WIDTH)
            for use in (
                lambda: model.blocks[1](x),
                lambda: loss_of(model, case, 1, device),
                optimizer.step,
            ):
                with pytest.raises(OffloadError, match=r"handle\.recover\(\)"):
                    use()
            handle.recover()
        loss_of(model, case, 2, device).backward()  # on top of what had arrived
        optimizer.step()
        optimizer.zero_grad()
        if handle is not None:
            hook = model.blocks[3].register_forward_pre_hook(lambda *_: held.clear())
            loss_of(model, case, 3, device)
            hook.remove()
        train(model, optimizer, case, device)
        return weights(model)

    wanted = script(case.model(), None)
    model = case.model()
    with attach(model, case, device) as handle:
        monkeypatch.setattr(engine_module, "at_end_of_backward", hold)
        assert handle._engine is not None
        handle._engine.device_type = "cuda"  # as if another thread ran the backward
        assert_equal(script(model, handle), wanted)


class _Failing(Adversary):
    """Fails once: at the ``at``-th copy from now on."""

    at = -1

    def upload(self, target: torch.Tensor, source: torch.Tensor, after: Any, then: Any) -> Any:
        self.at -= 1
        if self.at == 0:
            raise _Boom
        return super().upload(target, source, after, then)


@pytest.mark.parametrize("device", ["cpu"])
@pytest.mark.parametrize("staged", [False, True])
def test_a_fetch_that_fails_is_made_anew(
    staged: bool, device: str, monkeypatch: pytest.MonkeyPatch
):
    case = LORA
    pool = {"pinned_pool_mb": 1} if staged else {}
    if staged:
        specs = find_units(case.model(), case.policy())
        size = 2 * payload_bytes(specs[0], None) + budget.grad_staging_bytes(specs)
        monkeypatch.setattr(budget, "MEBIBYTE", size)

    def outputs(model: Any) -> list[torch.Tensor]:
        x = torch.ones(2, WIDTH)
        # Units that were fetched ahead lose their slots unused.
        alone = [model.blocks[i](x) for i in (0, 4, 1, 5, 2, 0, 3)]
        return [*alone, model(**toy_batch(0))]

    failed: list[int] = []
    with torch.no_grad():
        wanted = outputs(case.model())
        for at in range(1, 18):
            model, backend = case.model(), _Failing(device)
            with stream_on(backend, model, case.policy(**pool)):
                outputs(model)
                backend.at = at
                for _ in range(3):
                    try:
                        found = outputs(model)
                        assert all(map(torch.equal, found, wanted)), f"copy {at}"
                    except _Boom:
                        failed.append(at)
    # Once each; of the rest some were fetched ahead, and not needed.
    assert len(set(failed)) == len(failed) >= 5
