"""What torch has no public call for: every private name that streaming reads, and nowhere else.

Each function says in which versions of torch the name was read. tests/offload/test_internals.py
calls each of them, and fails by that function's name when a new version of torch moves one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# Autograd


def graph_task() -> int:
    """Number of the backward pass that this thread is in (recomputation included); -1 outside.

    A nested pass, as reentrant checkpointing starts one, has a number of its own. Read in torch
    2.6 to 2.13.
    """
    number: int = torch._C._current_graph_task_id()
    return number


def at_end_of_backward(call: Callable[[], None]) -> None:
    """Run ``call`` when the current backward pass ends; if it fails, release ``call`` unused.

    Under reentrant checkpointing that is the end of the outermost pass. Read in torch 2.6 to 2.13.
    """
    torch.autograd.Variable._execution_engine.queue_callback(call)


def gradient_node(param: Tensor) -> Any:
    """The node that accumulates this leaf's gradient in graphs that are built now.

    Read in torch 2.13.
    """
    # A view of the leaf leads to its node, so it must be taken with gradients on.
    with torch.enable_grad():
        return torch.autograd.graph.get_gradient_edge(param).node


def runs_in_this_pass(node: Any) -> bool:
    """Whether the backward pass that this thread is in runs a node of its graph.

    With ``backward(inputs=...)`` and ``autograd.grad`` it runs only what leads to the inputs. Read
    in torch 2.13.
    """
    try:
        found: bool = torch._C._will_engine_execute_node(node)
    except RuntimeError:
        return True  # torch refuses leaves that are inputs of autograd.grad themselves
    return found


def outer_saved_hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    """The innermost saved-tensor hooks in force: (pack, unpack). Read in torch 2.6 to 2.13."""
    found: tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None
    found = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return found


def in_grad_transform() -> bool:
    """Whether torch.func differentiates (grad, vjp, jvp, ...); vmap alone does not.

    Read in torch 2.6 to 2.13.
    """
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() != torch._C._functorch.TransformType.Vmap for level in levels)


def accumulate_hooks(param: Tensor) -> int:
    """Number of hooks that run when a gradient has been accumulated into this leaf.

    Read in torch 2.6 to 2.13.
    """
    return len(param._post_accumulate_grad_hooks or ())


def in_live_graph(param: Tensor) -> bool:
    """Whether autograd, or a gradient reducer, holds this leaf. Read in torch 2.6 to 2.13."""
    # The Python object counts for one; a graph's AccumulateGrad node holds the leaf once more.
    count: int = param._use_count()  # type: ignore[attr-defined]
    return count > 1


# Tensors


def storage_key(tensor: Tensor) -> int:
    """Identity of the memory behind a tensor, on any device. Read in torch 2.6 to 2.13."""
    key: int = tensor.untyped_storage()._cdata
    return key


def storage_uses(tensor: Tensor) -> int:
    """Number of tensors and storages that share the memory of this one, itself included.

    Read in torch 2.6 to 2.13.
    """
    return uses_of(storage_key(tensor))


def uses_of(key: int) -> int:
    """``storage_uses`` of the memory that has this key; some tensor must keep it alive.

    Read in torch 2.6 to 2.13.
    """
    count: int = torch._C._storage_Use_Count(key)
    return count


write_count: Callable[[Tensor], int] = attrgetter("_version")
"""Number of in-place writes to a tensor so far, through it or a view of it.

Autograd's version counter: writes through ``.data`` are not counted. Read in torch 2.13.
"""


# Modules


def hook_entry(handle: RemovableHandle) -> tuple[OrderedDict[int, Any], int, Any]:
    """Where a module keeps a hook that was just registered: (its hooks, the key, the hook).

    Read in torch 2.13.
    """
    hooks = handle.hooks_dict_ref()
    assert hooks is not None
    return hooks, handle.id, hooks[handle.id]


def registered_parameter(module: nn.Module, leaf: str) -> nn.Parameter | None:
    """The parameter that a module registered under this name, if it did. Read in torch 2.13.

    ``getattr`` would run a parametrization where the module has one.
    """
    return module._parameters.get(leaf)


def wraps_checkpoint(module: nn.Module) -> bool:
    """Whether a module is the wrapper of torch's ``checkpoint_wrapper``. Read in torch 2.13."""
    return hasattr(module, "_checkpoint_wrapped_module")


def wraps_compiled(module: nn.Module) -> bool:
    """Whether a module is what ``torch.compile(module)`` returned. Read in torch 2.13."""
    return hasattr(module, "_orig_mod")


def call_is_compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` compiled a module's call, hooks included. Read in torch 2.13."""
    return getattr(module, "_compiled_call_impl", None) is not None


_DDP_IGNORED = "_ddp_params_and_buffers_to_ignore"


def ddp_ignored(model: nn.Module) -> list[str] | None:
    """Names that a later DistributedDataParallel of this model leaves alone; None: never set.

    Read in torch 2.13.
    """
    names: list[str] | None = model.__dict__.get(_DDP_IGNORED)
    return names


def set_ddp_ignored(model: nn.Module, names: Iterable[str] | None) -> None:
    """Make a later DistributedDataParallel leave these parameters alone; None: as if never set.

    Read in torch 2.13.
    """
    if names is not None:
        setattr(model, _DDP_IGNORED, list(names))
    elif hasattr(model, _DDP_IGNORED):
        delattr(model, _DDP_IGNORED)
