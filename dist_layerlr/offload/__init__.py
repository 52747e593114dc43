"""Stream a model larger than the device: ``stream(model, StreamPolicy(...)) -> Handle``.

Importing this package does not import torch: a prediction needs names and shapes only.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_layerlr.offload.codec import round_trip as round_trip
    from dist_layerlr.offload.policy import StreamPolicy as StreamPolicy
    from dist_layerlr.offload.predict import layout_from_names as layout_from_names
    from dist_layerlr.offload.prediction import Machine as Machine
    from dist_layerlr.offload.prediction import Prediction as Prediction
    from dist_layerlr.offload.prediction import Workload as Workload
    from dist_layerlr.offload.stats import Stats as Stats
    from dist_layerlr.offload.stats import Traffic as Traffic
    from dist_layerlr.offload.stats import UnitInfo as UnitInfo
    from dist_layerlr.offload.streaming import Handle as Handle
    from dist_layerlr.offload.streaming import stream as stream

_MODULE_OF = {
    "round_trip": "codec",
    "StreamPolicy": "policy",
    "layout_from_names": "predict",
    "Machine": "prediction",
    "Prediction": "prediction",
    "Workload": "prediction",
    "Stats": "stats",
    "Traffic": "stats",
    "UnitInfo": "stats",
    "Handle": "streaming",
    "stream": "streaming",
}

__all__ = sorted(_MODULE_OF)

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Resolve public names on first use, so that torch loads only when it is asked for."""
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
