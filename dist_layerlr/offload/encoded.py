"""The state_dict of weights that are stored in 8 bits: it has their values, and is not loaded."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from dist_layerlr.errors import OffloadError
from dist_layerlr.offload.masters import Master


def state_dict_hooks(master: Master) -> Iterable[RemovableHandle]:
    """Register what makes the state_dict of an encoded parameter's module tell the truth."""
    owner: Any = master.weight.owner
    yield owner.register_state_dict_post_hook(partial(_save_value, master))
    yield owner.register_load_state_dict_pre_hook(partial(_refuse_load, master))


def _save_value(
    master: Master, module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any
) -> None:
    """Save what the device sees: an encoded parameter has no values on the host."""
    key = prefix + master.weight.leaf
    if key in state_dict:
        state_dict[key] = master.value()


def _refuse_load(
    master: Master, module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any
) -> None:
    if prefix + master.weight.leaf in state_dict:
        raise OffloadError(
            f"Parameter {master.name} is stored in 8 bits (host_dtype): it cannot be loaded while"
            " it is streamed. Call handle.remove() first."
        )
