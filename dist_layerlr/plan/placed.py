"""A parameter with everything that does not depend on the rates. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from dist_layerlr.plan.components import Label
from dist_layerlr.plan.config import Region
from dist_layerlr.plan.entries import ParamInfo
from dist_layerlr.plan.names import ParamPath
from dist_layerlr.plan.optimizers import Choice
from dist_layerlr.plan.stacks import Location
from dist_layerlr.plan.timing import Timing


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """What its name, its place in the model and the user's rules say of it."""

    info: ParamInfo
    path: ParamPath
    location: Location | None
    label: Label
    region: Region | None
    choice: Choice = Choice()
    timing: Timing | None = None
