"""Flow matching for models of two networks, each for a range of noise shares of its own."""

from __future__ import annotations

from dataclasses import dataclass

from dist_layerlr import fields
from dist_layerlr.fields import setting
from launch.trainer.objectives.first_frame import FirstFrameFlow

HIGH, LOW, BOTH = "high", "low", "both"


@dataclass(frozen=True, kw_only=True)
class ExpertFlow(FirstFrameFlow):
    """Trains one expert on its part of the path: [boundary, 1] or [0, boundary].

    The family puts the range into ``low`` and ``high``; an objective is never of ``both``.
    """

    expert: str | None = setting(
        fields.one_of(lambda: (HIGH, LOW, BOTH)),
        default=None,
        shown="what model_path holds",
        doc="Which network of a model with two is trained: the one for much noise, for little,"
        " or both in turn.",
    )
    boundary: float | None = setting(
        fields.number(0.0, 1.0, open_low=True),
        default=None,
        shown="boundary_ratio of model_index.json",
        doc="Noise share at which the experts meet.",
    )
    switch_every: int = setting(
        fields.integer(1),
        default=1,
        unit="steps",
        doc="With both experts: between draws of the one that trains next. Changing them costs the"
        " way of both networks between host and device.",
    )
