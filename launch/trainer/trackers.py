"""Experiment trackers, through Accelerate: one interface to TensorBoard, wandb, MLflow and others.

Only the first rank makes any. They are told numbers of a fixed count, however deep the model is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_layerlr.errors import ConfigError

TRACKERS = (
    "aim",
    "clearml",
    "comet_ml",
    "dvclive",
    "mlflow",
    "swanlab",
    "tensorboard",
    "trackio",
    "wandb",
)
"""The names that Accelerate knows them by."""
PROJECT = "dist_layerlr"
"""Project or experiment of all runs; the run is named after its folder where a tracker asks."""


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker whose package is not installed.

    Raises:
        ConfigError: names it.
    """
    if not names:
        return
    from accelerate.tracking import get_available_trackers

    known = {str(name) for name in get_available_trackers()}
    missing = [name for name in names if name not in known]
    if missing:
        here = ", ".join(sorted(known & set(TRACKERS))) or "none"
        raise ConfigError(
            f"Invalid train.report_to={list(names)}: the package of {', '.join(missing)} is not"
            f" installed. Install it, or choose among those that are: {here}."
        )


class Trackers:
    """The trackers of a run, on its first rank."""

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        config: Mapping[str, Any],
        say: Callable[[str], None],
    ):
        """Begin a run in each.

        Args:
            names: Of ``TRACKERS``.
            folder: Of the run; those that write files write into its ``trackers/``.
            config: Of the run, stored as its hyper-parameters.
            say: Prints a line.
        """
        self._say = say
        self._live: dict[str, Any] = {}
        if not names:
            return
        from accelerate.state import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        # Trackers ask it whether this is the first process. It finds the group of the run.
        PartialState()
        for name in names:
            kind: Any = LOGGER_TYPE_TO_CLASS[name]
            place = (str(folder / "trackers"),) if kind.requires_logging_directory else ()
            self._live[name] = kind(PROJECT, *place)
            self._each(lambda tracker: tracker.start(), name)
            self._each(lambda tracker: tracker.store_init_configuration(_flat(config)), name)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add one point to each curve. What is not finite is left out."""
        known = {key: value for key, value in values.items() if math.isfinite(value)}
        self._each(lambda tracker: tracker.log(known, step=step))

    def close(self) -> None:
        """End the runs."""
        self._each(lambda tracker: tracker.finish())
        self._live = {}

    def _each(self, tell: Callable[[Any], object], only: str | None = None) -> None:
        """Tell the trackers something. One that fails is left out from then on, and it is said.

        A service that is down must not end a training of days.
        """
        for name in [only] if only is not None else list(self._live):
            try:
                if name in self._live:
                    tell(self._live[name])
            except Exception as error:
                del self._live[name]
                reason = (str(error).splitlines() or [""])[0]
                self._say(
                    f"train.report_to: {name} failed ({type(error).__name__}: {reason}); the run"
                    " goes on without it, and metrics.jsonl holds every number"
                )


def _flat(config: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """``{"train.steps": 10}``: trackers take plain values only."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{before}{key}.")
        elif isinstance(value, (str, bool, int, float)):
            found[before + key] = value
        else:
            found[before + key] = json.dumps(value)
    return found
