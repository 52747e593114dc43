"""Each private call of torch that streaming needs still does what it did. A failure here names the
one that moved."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dist_layerlr.offload import internals

pytestmark = pytest.mark.parametrize("device", ["cpu", "cuda"])


@pytest.mark.parametrize("reentrant", [True, False])
def test_graph_task_tells_recomputation_from_forward(reentrant: bool, device: str):
    seen: list[int] = []

    def run(x: torch.Tensor) -> torch.Tensor:
        seen.append(internals.graph_task())
        return x.sin()

    x = torch.ones(2, device=device, requires_grad=True)
    checkpoint(run, x, use_reentrant=reentrant).sum().backward()
    assert seen[0] == -1 and seen[1] >= 0 and internals.graph_task() == -1


def test_a_callback_runs_at_the_end_of_backward_and_is_released_when_it_fails(device: str):
    import weakref

    events: list[str] = []

    class Call:
        def __call__(self) -> None:
            events.append("called")

    def queue(_: Any) -> None:
        call = Call()
        weakref.finalize(call, events.append, "released")
        internals.at_end_of_backward(call)

    def fail(_: Any) -> None:
        raise ValueError

    x = torch.ones(2, device=device, requires_grad=True)
    for bad in (False, True):
        y = x * 2
        z = y * 3
        z.register_hook(queue)
        if bad:
            y.register_hook(fail)
            with pytest.raises(ValueError):
                z.sum().backward()
        else:
            z.sum().backward()
        events.append("back")
    assert events[:3] == ["called", "released", "back"]
    assert events[3:] == ["released", "back"] or device == "cuda"


def test_the_innermost_saved_tensor_hooks_can_be_read(device: str):
    assert internals.outer_saved_hooks() is None
    seen: list[Any] = []

    def run(x: torch.Tensor) -> torch.Tensor:
        seen.append(internals.outer_saved_hooks())
        return x.sin()

    def pack(t: torch.Tensor) -> torch.Tensor:
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, pack):
        assert internals.outer_saved_hooks() == (pack, pack)
    x = torch.ones(2, device=device, requires_grad=True)
    checkpoint(run, x, use_reentrant=False).sum().backward()
    assert all(found is not None and len(found) == 2 for found in seen) and len(seen) == 2


def test_storage_uses_count_views_and_saved_tensors(device: str):
    memory = torch.zeros(16, device=device)
    alone = internals.storage_uses(memory)
    view = memory[2:4]
    assert internals.storage_uses(memory) == alone + 1
    assert (
        internals.storage_key(view)
        == internals.storage_key(memory)
        != internals.storage_key(memory.clone())
    )
    weight = nn.Parameter(torch.zeros(4, 4, device=device), requires_grad=False)
    weight.data = memory.view(4, 4)
    x = torch.ones(2, 4, device=device, requires_grad=True)
    before = internals.storage_uses(memory)
    y = nn.functional.linear(x, weight)
    assert internals.storage_uses(memory) > before
    del y, view
    gc.collect()
    assert internals.storage_uses(memory) == alone + 1


@pytest.mark.parametrize("trains", [True, False])
def test_a_leaf_knows_whether_a_graph_holds_it(trains: bool, device: str):
    weight = nn.Parameter(torch.zeros(4, 4, device=device), requires_grad=trains)
    other = weight.detach(), weight.data, weight.detach().T
    assert not internals.in_live_graph(weight)
    x = torch.ones(2, 4, device=device, requires_grad=True)
    y = nn.functional.linear(x, weight)
    assert internals.in_live_graph(weight)
    y.sum().backward()
    del y, other
    assert not internals.in_live_graph(weight)


def test_hooks_on_a_leaf_survive_a_change_of_device(device: str):
    order: list[str] = []
    weight = nn.Parameter(torch.ones(3))
    weight.register_hook(lambda g: order.append(f"before {weight.grad is None}"))
    weight.register_post_accumulate_grad_hook(lambda p: order.append(f"after {p.grad is None}"))
    weight.data = weight.data.to(device)
    loss = (weight * 2).sum()
    weight.data = weight.data.cpu()
    loss.backward()
    assert order == ["before True", "after False"]


def test_hooks_behind_accumulation_are_counted(device: str):
    weight = nn.Parameter(torch.ones(3, device=device))
    assert internals.accumulate_hooks(weight) == 0
    hook = weight.register_post_accumulate_grad_hook(lambda p: None)
    assert internals.accumulate_hooks(weight) == 1
    hook.remove()
    assert internals.accumulate_hooks(weight) == 0


def test_function_transforms_that_differentiate_are_told_from_vmap(device: str):
    seen: list[bool] = []

    def f(x: torch.Tensor) -> torch.Tensor:
        seen.append(internals.in_grad_transform())
        return x.sum()

    x = torch.ones(2, 3, device=device)
    for call in (f, torch.func.grad(f), torch.func.vmap(f), torch.func.vmap(torch.func.grad(f))):
        call(x)
    assert seen == [False, True, False, True]


def test_writes_are_counted_but_not_those_through_data(device: str):
    weight = nn.Parameter(torch.zeros(4, 4, device=device))
    before = internals.write_count(weight)
    with torch.no_grad():
        weight.add_(1)
        weight[0].zero_()
    assert internals.write_count(weight) == before + 2
    weight.data.fill_(3)
    weight.data = torch.ones(4, 4, device=device)
    assert internals.write_count(weight) == before + 2


def test_a_registered_parameter_is_the_object_not_what_a_parametrization_makes_of_it(device: str):
    layer = nn.Linear(3, 3, device=device)
    weight = layer.weight
    assert internals.registered_parameter(layer, "weight") is weight
    torch.nn.utils.parametrizations.orthogonal(layer)
    assert internals.registered_parameter(layer, "weight") is None
    held = layer.parametrizations.weight
    assert internals.registered_parameter(held, "original") is weight


def test_a_checkpoint_wrapper_is_told_from_the_module_it_wraps(device: str):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    layer = nn.Linear(3, 3, device=device)
    assert not internals.wraps_checkpoint(layer)
    assert internals.wraps_checkpoint(checkpoint_wrapper(layer))


def test_a_compiled_module_a_compiled_call_and_a_compiled_forward_are_told_apart(device: str):
    def kinds(module: nn.Module) -> tuple[bool, bool]:
        return internals.wraps_compiled(module), internals.call_is_compiled(module)

    call, forward = (nn.Linear(3, 3, device=device) for _ in range(2))
    assert kinds(call) == (False, False)
    assert internals.wraps_compiled(torch.compile(call, backend="eager"))
    call.compile(backend="eager")
    forward.forward = torch.compile(forward.forward, backend="eager")
    assert kinds(call) == (False, True)
    assert kinds(forward) == (False, False)


def test_ddp_leaves_the_ignored_parameters_alone(device: str):
    import torch.distributed as dist

    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).to(device)
    assert internals.ddp_ignored(model) is None
    names = ["0.weight", "0.bias"]
    internals.set_ddp_ignored(model, names)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped(torch.ones(2, 3, device=device)).sum().backward()
        # DDP's reducer holds the leaves that it reduces, and no others.
        held = {name for name, p in model.named_parameters() if internals.in_live_graph(p)}
    finally:
        dist.destroy_process_group()
    assert held == {"1.weight", "1.bias"}
    assert internals.ddp_ignored(model) == names
    internals.set_ddp_ignored(model, None)
    internals.set_ddp_ignored(model, None)
    assert internals.ddp_ignored(model) is None


def test_a_pass_knows_whether_it_runs_the_node_of_a_leaf(device: str):
    weight, other = (nn.Parameter(torch.ones(3, device=device)) for _ in range(2))
    seen: list[bool] = []
    loss = (weight * other).sum()
    nodes = internals.gradient_node(weight), internals.gradient_node(other)
    loss.grad_fn.register_prehook(
        lambda _: seen.extend(internals.runs_in_this_pass(node) for node in nodes)
    )
    loss.backward(retain_graph=True)
    loss.backward(inputs=[other])
    assert seen == [True, True, False, True]
    assert internals.gradient_node(weight) is nodes[0]


def test_a_hook_can_be_taken_off_for_a_while(device: str):
    layer = nn.Linear(3, 3, device=device)
    calls: list[str] = []
    handle = layer.register_forward_pre_hook(lambda m, args: calls.append("hook"))
    hooks, key, hook = internals.hook_entry(handle)
    x = torch.ones(1, 3, device=device)
    del hooks[key]
    layer(x)
    assert calls == []
    hooks[key] = hook
    layer(x)
    assert calls == ["hook"]
    handle.remove()
    layer(x)
    assert calls == ["hook"]


def test_uses_are_counted_by_key(device: str):
    memory = torch.zeros(16, device=device)
    key = internals.storage_key(memory)
    assert internals.uses_of(key) == internals.storage_uses(memory)
    view = memory.data
    assert internals.uses_of(key) == internals.storage_uses(view)
