"""Whole pipelines and models of a few thousand random weights.

They are for tests, and to try a config without a model.

``tiny/<family module>.py`` holds ``PARTS``: model type -> a function that returns the components of
its pipeline but for text encoders and tokenizers, which are in ``text.py``. A module may name the
pipelines of variants that are no model type of their own in ``PIPELINES``. Families outside
diffusers have ``FOLDERS`` instead: name -> a function that returns a ``ModelFolder``.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

from dist_layerlr import fields
from launch.trainer.families import get_family
from launch.trainer.families.diffusion import from_diffusers
from launch.trainer.tiny.text import text_parts

_SWITCHES = ("requires_safety_checker", "add_watermarker")
"""Of pipelines that would otherwise ask for weights that no network needs."""


def build(model_type: str) -> Any:
    """Build the tiny pipeline of a family; the same weights on every call.

    Args:
        model_type: One of ``known()``.

    Raises:
        ConfigError: No such tiny pipeline; names those that there are.
        ModelSourceError: The installed diffusers lacks one of its classes.
    """
    modules = known()
    if model_type not in modules:
        hint = fields.suggestion(model_type, modules)
        raise fields.invalid("FAMILY", model_type, f"one of {', '.join(modules)}", hint)
    module = modules[model_type]
    if model_type in getattr(module, "FOLDERS", ()):
        return module.FOLDERS[model_type]()
    parts = {**module.PARTS[model_type](), **text_parts(model_type)}
    cls = from_diffusers(_pipeline_class(module, model_type), model_type)
    asked = inspect.signature(cls.__init__).parameters
    required = [name for name, one in asked.items() if one.default is one.empty and name != "self"]
    off = {name: False for name in _SWITCHES if name in asked}
    pipeline = cls(**{**dict.fromkeys(required), **off, **parts})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def known() -> Mapping[str, ModuleType]:
    """Names that ``build`` takes, sorted, and the module of each."""
    found: dict[str, ModuleType] = {}
    for entry in pkgutil.iter_modules(__path__):
        module = import_module(f".{entry.name}", __name__)
        for table in ("PARTS", "FOLDERS"):
            found |= dict.fromkeys(getattr(module, table, ()), module)
    return dict(sorted(found.items()))


def _pipeline_class(module: ModuleType, model_type: str) -> str:
    named: Mapping[str, str] = getattr(module, "PIPELINES", {})
    family: Any = get_family(model_type) if model_type not in named else None
    return named[model_type] if family is None else str(family.pipeline_class)
