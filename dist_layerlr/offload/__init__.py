"""Stream a model larger than the device from host memory: ``stream(model, StreamPolicy(...)) -> Handle``."""

from dist_layerlr.offload.handle import Handle, Stats, Traffic, UnitInfo, stream
from dist_layerlr.offload.policy import StreamPolicy

__all__ = ["Handle", "Stats", "StreamPolicy", "Traffic", "UnitInfo", "stream"]
