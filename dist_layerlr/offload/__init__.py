"""Stream a model larger than the device from host memory: ``stream(model, StreamPolicy(...)) -> Handle``."""

from dist_layerlr.offload.codec import round_trip
from dist_layerlr.offload.figures import Stats, Traffic, UnitInfo
from dist_layerlr.offload.handle import Handle, stream
from dist_layerlr.offload.policy import StreamPolicy

__all__ = ["Handle", "Stats", "StreamPolicy", "Traffic", "UnitInfo", "round_trip", "stream"]
