"""TableAdamW against torch's AdamW, in Triton's interpreter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

import dist_layerlr as dl
from dist_layerlr.optim import TableAdamW, tables
from dist_layerlr.optim.segmented import Segmented
from dist_layerlr.optim.trial import remember, try_out
from dist_layerlr.sharders import Layout
from dist_layerlr.sharders.base import Slice
from launch.trainer.optimizers import make_optimizer, read_optimizer
from tests.support.naive import CONFIG, fill_grads, make_model
from tests.support.table_adamw import (
    SHAPES,
    assert_close,
    give_gradients,
    groups,
    table_kernel,
    tensors,
    train,
)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tables.Kind]]:
    """The kinds that were launched."""
    found: list[tables.Kind] = []
    real = table_kernel.adamw

    class Counted:
        def __getitem__(self, grid: Any) -> Callable[..., Any]:
            found.append(grid)
            return real[grid]  # type: ignore[no-any-return]

    monkeypatch.setattr(table_kernel, "adamw", Counted())
    yield found


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("kind", ["fused", "foreach", None])
def test_ten_steps_at_many_rates_are_those_of_torch(kind: str | None, capturable: bool) -> None:
    reference = AdamW(groups(tensors()), **({kind: True} if kind else {}))
    found = train(TableAdamW(groups(tensors()), capturable=capturable))
    assert_close(found, train(reference))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions_are_those_of_torchs_fused_kernel(dtype: torch.dtype) -> None:
    found = train(TableAdamW(groups(tensors(dtype))))
    wanted = train(AdamW(groups(tensors(dtype)), fused=True))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_bfloat16_parameters_may_keep_their_moments_in_float32() -> None:
    optimizer = TableAdamW(groups(tensors(torch.bfloat16)), state_dtype="float32")
    found = train(optimizer)
    # The same, with the parameters rounded after each step.
    params = tensors(torch.bfloat16)
    wide = [nn.Parameter(p.detach().float()) for p in params]
    reference = AdamW(groups(wide), fused=True)
    for step in range(10):
        give_gradients(params, step)
        for p, w in zip(params, wide, strict=True):
            assert p.grad is not None
            w.grad = p.grad.float()
        reference.step()
        for w in wide:
            w.data.copy_(w.bfloat16())
    for a, b in zip(found, wide, strict=True):
        torch.testing.assert_close(a, b.detach().bfloat16(), rtol=2**-7, atol=1e-6)
    state = optimizer.state[optimizer.param_groups[1]["params"][0]]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
    moments = reference.state[wide[1]]
    torch.testing.assert_close(state["exp_avg"], moments["exp_avg"], rtol=1e-5, atol=1e-7)


def views() -> list[Tensor]:
    """Parts of tensors: with gaps, transposed, channels last, and at an odd address."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(40, 30, generator=generator)
    image = torch.randn(4, 3, 5, 5, generator=generator).to(memory_format=torch.channels_last)
    return [whole[:20, ::2], whole[20:].T, image, torch.randn(99, generator=generator)[1:]]


def test_views_with_gaps_and_other_orders_of_memory_are_stepped_in_place() -> None:
    found, wanted = views(), views()
    bases = [t if t._base is None else t._base for t in found]
    before = [base.clone() for base in bases]
    ours, theirs = TableAdamW(groups(found)), AdamW(groups(wanted))
    assert_close(train(ours), train(theirs))
    # Columns between those of the first view belong to nobody.
    assert torch.equal(bases[0][:20, 1::2], before[0][:20, 1::2])


def test_gradients_of_another_order_than_the_parameter_are_read_right() -> None:
    results = []
    for make in (TableAdamW, AdamW):
        param = nn.Parameter(torch.ones(6, 4))
        optimizer = make([param], lr=1e-2)
        for step in range(3):
            param.grad = torch.arange(24.0).reshape(4, 6).T + step
            optimizer.step()
        results.append(param.detach())
    assert_close(results[:1], results[1:])


def test_any_number_of_rates_is_one_launch_for_each_precision(launches: list[Any]) -> None:
    params = [*tensors(), *tensors(torch.bfloat16)]
    optimizer = TableAdamW(groups(params))
    train(optimizer, range(1))
    assert len(launches) == 2 and len(optimizer.param_groups) == 2 * len(SHAPES)
    blocks = sum(-(-p.numel() // table_kernel.BLOCK) for p in params)
    assert sum(grid[0] for grid in launches) == blocks
    train(optimizer, range(1, 4))
    assert len(launches) == 8


def test_a_changed_rate_an_added_group_and_a_late_gradient_are_followed() -> None:
    results = []
    for make in (TableAdamW, AdamW):
        params = tensors()
        optimizer = make(groups(params[:4]))
        train(optimizer, range(3))
        optimizer.param_groups[1]["lr"] = 0.02
        optimizer.param_groups[2].update(weight_decay=0.3, betas=(0.8, 0.95), eps=1e-4)
        train(optimizer, range(3, 5))
        optimizer.add_param_group({"params": params[4:], "lr": 5e-3})
        train(optimizer, range(5, 8))
        # The first has no gradient for a while, so that its counter falls behind.
        for step in range(8, 11):
            give_gradients(params, step)
            params[0].grad = None
            optimizer.step()
        assert [int(optimizer.state[p]["step"]) for p in params] == [8, 11, 11, 11, 6, 6, 6]
        results.append(train(optimizer, range(11, 13)))
    assert_close(*results)


def test_state_passes_to_torch_and_back() -> None:
    wanted = train(AdamW(groups(tensors())), range(9))
    params = tensors()
    optimizer: torch.optim.Optimizer = AdamW(groups(params))
    for number, make in enumerate((TableAdamW, partial(AdamW, foreach=False), TableAdamW)):
        train(optimizer, range(2 * number, 2 * number + 2))
        saved = copy.deepcopy(optimizer.state_dict())
        # Of other settings, which the load replaces.
        optimizer = make([{"params": [p], "lr": 7.0} for p in params])
        optimizer.load_state_dict(saved)
    assert_close(train(optimizer, range(6, 9)), wanted)
    assert set(optimizer.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq"}
    assert not optimizer.param_groups[0].keys() & {"fused", "foreach", "amsgrad"}


def test_a_load_keeps_moments_at_the_precision_that_was_asked_for() -> None:
    optimizer = TableAdamW(groups(tensors(torch.bfloat16)), state_dtype=torch.float32)
    train(optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    again = TableAdamW(groups(tensors(torch.bfloat16)), state_dtype=torch.float32)
    again.load_state_dict(saved)
    for number, group in enumerate(again.param_groups):
        (param,) = group["params"]
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(again.state[param][key], saved["state"][number][key])


def test_a_copy_steps_its_own_tensors() -> None:
    optimizer = TableAdamW(groups(tensors()))
    train(optimizer, range(2))
    other = copy.deepcopy(optimizer)
    before = [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]
    moved = train(other, range(2, 4))
    assert all(
        torch.equal(p, b)
        for p, b in zip(
            (p for g in optimizer.param_groups for p in g["params"]), before, strict=True
        )
    )
    assert_close(train(optimizer, range(2, 4)), moved)


@pytest.mark.parametrize("emission", ["groups", "segmented"])
def test_it_trains_a_plan_which_is_proven(emission: str) -> None:
    results = []
    for make in (partial(TableAdamW, betas=(0.9, 0.99)), partial(AdamW, betas=(0.9, 0.99))):
        model = make_model(6)
        plan = dl.plan_model(model, CONFIG)
        optimizer = dl.attach(plan, model, make, emission=emission)
        schedule = dl.PlanSchedule(optimizer, dl.Schedule(kind="cosine", total_steps=5))
        for _ in range(3):
            fill_grads(model)
            with dl.effect_check(plan, model, optimizer) as observed:
                optimizer.step()
            assert set(observed) == set(plan.entries)
            schedule.step()
            dl.verify(plan, model, optimizer, factor=schedule.factor)
        results.append([p.detach() for p in model.parameters()])
    assert_close(*results)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(name="ddp"),
        Layout(name="fsdp1", shards=True),
        Layout(name="zero", stage=2, shards=True, flat=True),
        Layout(name="zero", stage=3, shards=True, flat=True),
    ],
)
def test_a_trial_finds_that_it_works_element_by_element(layout: Layout) -> None:
    params = [nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))]
    optimizer = TableAdamW([{"params": [p], "lr": 1e-3, "name": str(p.ndim)} for p in params])
    remember(optimizer, TableAdamW)
    found = try_out(optimizer, layout, params, [(6, 6), (6,)])
    assert found.tried and found.fault is None


def test_slices_of_a_flat_tensor_train_at_their_own_rates_in_one_launch(
    launches: list[Any],
) -> None:
    results = []
    for make in (TableAdamW, partial(AdamW, fused=True)):
        model = make_model()
        named = dict(model.named_parameters())
        owner = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in named.values()]))
        slices, offset = [], 0
        for name, p in named.items():
            where = {"start": 0, "offset": offset, "numel": p.numel()}
            slices.append(Slice(name=name, owner=owner, **where))
            offset += p.numel()
        optimizer = Segmented(dl.plan_model(model, CONFIG), [owner], make, slices)
        results.append(train(optimizer, range(5)))
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(saved)
        results[-1] = train(optimizer, range(5, 8))
        assert float(optimizer.state[owner]["step"]) == 8
    assert_close(*results)
    assert len(launches) == 8


def test_the_trainer_takes_it_by_its_path() -> None:
    options = read_optimizer(
        {
            "kind": "dist_layerlr.optim.TableAdamW",
            "args": {"betas": [0.8, 0.9], "state_dtype": "float32"},
            "weight_decay": 0.3,
        }
    )
    optimizer = make_optimizer([{"params": [nn.Parameter(torch.ones(3))], "lr": 0.1}], options)
    assert isinstance(optimizer, TableAdamW)
    assert optimizer.param_groups[0]["weight_decay"] == 0.3


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "foreach": ({"foreach": True}, "Invalid foreach=True: TableAdamW has one way.*Leave it out"),
    "fused": ({"fused": True}, "Invalid fused=True.*torch.optim.AdamW"),
    "amsgrad": ({"amsgrad": True}, "Invalid amsgrad=True"),
    "maximize": ({"maximize": True}, "Invalid maximize=True"),
    "lr": ({"lr": -1.0}, "Invalid lr=-1.0: must be a finite number >= 0"),
    "a tensor": ({"lr": torch.tensor(1.0)}, "Invalid lr=tensor.*must be a number.*write_rates"),
    "eps": ({"eps": float("nan")}, "Invalid eps=nan"),
    "betas": ({"betas": (0.9, 1.0)}, r"Invalid betas=\(0.9, 1.0\): must be two numbers in \[0, 1"),
    "decay": ({"weight_decay": float("inf")}, "Invalid weight_decay=inf"),
    "state": ({"state_dtype": "int8"}, "Invalid state_dtype='int8': must be one of float16"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_argument_is_named_with_what_is_allowed(what: str) -> None:
    arguments, message = WRONG[what]
    with pytest.raises(dl.ConfigError, match=message):
        TableAdamW([nn.Parameter(torch.ones(2))], **arguments)


def test_an_unknown_argument_a_setting_in_a_group_and_integers_are_refused() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'beta'"):
        TableAdamW([nn.Parameter(torch.ones(2))], beta=0.9)
    optimizer = TableAdamW([nn.Parameter(torch.ones(2))])
    with pytest.raises(dl.ConfigError, match="Invalid groups.fused=True"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "fused": True})
    assert len(optimizer.param_groups) == 1
    saved = AdamW([nn.Parameter(torch.ones(2))], amsgrad=True).state_dict()
    with pytest.raises(dl.ConfigError, match="Invalid param_groups.amsgrad=True"):
        optimizer.load_state_dict(saved)
    with pytest.raises(dl.ConfigError, match="complex64.*must be of float16"):
        TableAdamW([nn.Parameter(torch.ones(2, dtype=torch.complex64))])


def test_a_sparse_gradient_is_refused() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(dl.ConfigError, match="it is sparse.*sparse=False"):
        TableAdamW(table.parameters()).step()


@pytest.mark.parametrize("emission", ["groups", "segmented"])
def test_a_checkpoint_by_name_passes_between_it_and_torchs(emission: str, tmp_path: Path) -> None:
    results = []
    pairs = [(AdamW, AdamW), (AdamW, TableAdamW), (TableAdamW, AdamW)]
    for number, makes in enumerate(pairs):
        folder = tmp_path / str(number)
        for make in makes:
            model = make_model()
            plan = dl.plan_model(model, CONFIG)
            optimizer = dl.attach(plan, model, make, emission=emission)
            if folder.exists():
                dl.load_checkpoint(folder, plan, model, optimizer)
            for _ in range(3):
                fill_grads(model)
                optimizer.step()
            dl.save_checkpoint(folder, plan, model, optimizer, step=3)
        results.append([p.detach() for p in model.parameters()])
        assert {int(state["step"]) for state in optimizer.state.values()} == {6}
    assert_close(results[1], results[0])
    assert_close(results[2], results[0])
