"""Stream a model larger than the device from host memory: ``stream(model, StreamPolicy(...)) -> Handle``.

Importing this package does not import torch: a prediction needs names and shapes only.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Handle": "handle",
    "stream": "handle",
    "round_trip": "codec",
    "Stats": "figures",
    "Traffic": "figures",
    "UnitInfo": "figures",
    "StreamPolicy": "policy",
    "Machine": "predict",
    "Prediction": "predict",
    "Workload": "predict",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Resolve public names on first use, so that the torch parts load only when they are asked for."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
