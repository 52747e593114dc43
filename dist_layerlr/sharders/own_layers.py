"""How a live model numbers its own layers, where its code says more than its names.

Names alone do not tell whether a stage or a block is a layer (a Swin's are blocks, a MaxViT's
stages), nor how many layers an RF-DETR counts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from dist_layerlr.plan.layer_decay import ModelLayer
from dist_layerlr.plan.names import base_name, canonical_name

_UNNAMED = "?"
"""A name that no matcher knows: its group is that of heads, after the last layer."""


def own_layers(model: nn.Module) -> dict[str, ModelLayer]:
    """What the sub-models of a model say of their parameters' layers: {canonical name: layer}.

    timm's models have a ``group_matcher``, which their own layer decay asks. A backbone of
    transformers (RF-DETR's is one) lists the blocks whose features it gives.

    Args:
        model: without wrappers outside; adapters are looked through.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    found: dict[str, ModelLayer] = {}
    done: list[str] = []
    for path, module in model.named_modules():
        said = _matcher(module) or _features(module)
        # What a model says of itself includes the models in it: a hybrid ViT holds a ResNet.
        if not said or any(path.startswith(f"{outer}.") or not outer for outer in done):
            continue
        done.append(path)
        start = f"{path}." if path else ""
        found |= said([name for name in names if name.startswith(start)], len(start))
    return found


Numbering = Callable[[Sequence[str], int], dict[str, ModelLayer]]
"""(names of a sub-model's parameters, characters of its own path in them) -> their layers."""


def _matcher(module: Any) -> Numbering | None:
    matcher = getattr(module, "group_matcher", None)
    if not callable(matcher) or "timm" not in sys.modules:
        return None

    def number(names: Sequence[str], start: int) -> dict[str, ModelLayer]:
        from timm.models import group_parameters

        plain = {name: base_name(canonical_name(name[start:])) for name in names}
        named: Any = _Named([*plain.values(), _UNNAMED])
        ids = group_parameters(named, matcher(coarse=False), reverse=True)
        layers = ids[_UNNAMED] - 1
        found: dict[str, ModelLayer] = {}
        for name, own in plain.items():
            found[canonical_name(name)] = ModelLayer(layer=ids[own], layers=layers)
        return found

    return number


def _features(module: Any) -> Numbering | None:
    indices = getattr(getattr(module, "config", None), "out_indices", None)
    if not isinstance(indices, (list, tuple)) or not indices:
        return None
    layer = ModelLayer(layer=None, layers=int(indices[-1]) + 1)
    return lambda names, start: dict.fromkeys(map(canonical_name, names), layer)


class _Named:
    """Names in place of a module: timm's grouping asks for nothing else."""

    def __init__(self, names: Sequence[str]):
        self._names = names

    def named_parameters(self) -> Iterator[tuple[str, None]]:
        for name in self._names:
            yield name, None
