"""What torch has no public call for.

Read in torch 2.6 to 2.13; tests/offload/test_internals.py fails when one moves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def graph_task() -> int:
    """Number of the backward pass that this thread is in (recomputation included); -1 outside.

    Nested ones differ.
    """
    number: int = torch._C._current_graph_task_id()
    return number


def at_end_of_backward(call: Callable[[], None]) -> None:
    """Run ``call`` when the current backward pass ends.

    If it fails, ``call`` is released without a run.
    """
    torch.autograd.Variable._execution_engine.queue_callback(call)


def outer_saved_hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    """The innermost saved-tensor hooks in force: (pack, unpack)."""
    found: tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None
    found = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return found


def in_grad_transform() -> bool:
    """Whether torch.func differentiates (grad, vjp, jvp, ...); vmap alone does not."""
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() != torch._C._functorch.TransformType.Vmap for level in levels)


def storage_key(tensor: Tensor) -> int:
    """Identity of the memory behind a tensor, on any device."""
    key: int = tensor.untyped_storage()._cdata
    return key


def storage_uses(tensor: Tensor) -> int:
    """Tensors and storages that share the memory of this one, itself included."""
    count: int = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return count


def accumulate_hooks(param: Tensor) -> int:
    """Number of hooks that run when a gradient has been accumulated into this leaf."""
    return len(param._post_accumulate_grad_hooks or ())


def in_live_graph(param: Tensor) -> bool:
    """Whether autograd, or a gradient reducer, holds this leaf."""
    count: int = param._use_count()  # type: ignore[attr-defined]
    return count > 1
