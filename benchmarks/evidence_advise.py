"""Studies of ``dist-layerlr advise``: do rates proposed from a run's own updates beat tuned flat?

An advised arm first trains flat, at the same base rate, and measures every other step; what is
proposed from that run trains anew from the same start. It is asked at every rate of the sweep.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import evidence_vit
import evidence_wan
from dist_layerlr.plan import PLAN_FILE
from dist_layerlr.report.advise import FAR, METRICS, gather
from dist_layerlr.report.proposal import RESOLVED, propose
from evidence_studies import Arm, Study, write_whole
from evidence_training import Config, block, watched

EVERY = 2
"""Steps between measured ones: half as many rows as steps."""
Settings = Mapping[str, int]
Run = Callable[[Arm, float, int, Settings, Path], dict[str, float]]


def run_advised(
    run: Run, arm: Arm, rate: float, seed: int, settings: Settings, folder: Path
) -> dict[str, float]:
    """Do a run of another study; an advised arm after a flat run, which all such arms share."""
    far = FARS.get(arm.name)
    if far is None:
        return run(arm, rate, seed, settings, folder)
    # Named after what it is: processes of other seeds write beside it, and other arms read it.
    place = folder / "probes" / f"{run.__name__}_{seed}_{rate:g}_{settings['steps']}"
    if not (place / RESOLVED).exists():
        with watched(EVERY) as seen:
            run(arm, rate, seed, settings, folder)
        place.mkdir(parents=True, exist_ok=True)
        (place / METRICS).write_text("".join(json.dumps(row) + "\n" for row in seen.rows))
        (place / PLAN_FILE).write_text(json.dumps(seen.plan.to_dict()))
        # The last one: a run that is killed leaves no half of a probe to the next.
        write_whole(place / RESOLVED, json.dumps(block(rate)))
    proposed = propose(gather(place, far=far), place)
    found = run(
        replace(arm, config=partial(_as_proposed, proposed.config)), rate, seed, settings, folder
    )
    # How many parts had their rates changed: an arm that nothing was proposed for is flat.
    return {**found, "changes": len((proposed.steer or {}).get("scale", ()))}


def _as_proposed(config: Mapping[str, Any] | None, rate: float) -> Config:
    """What was proposed at this rate; flat where nothing was."""
    return block(rate) if config is None else dict(config)


FARS = {"advised": FAR, "advised from 1.5": 1.5}
"""Arm -> how many times the rest is far enough for another rate. The first is the program's own."""
ADVISED = [
    Arm(
        name=name,
        what="what `dist-layerlr advise` proposes after a flat run at the same rate"
        + ("" if far == FAR else f", if {far:g} times the rest were far"),
        config=block,
        measures=("advise",),
    )
    for name, far in FARS.items()
]


def _study(of: Study, name: str, seeds: int) -> Study:
    """Tuned flat against what is proposed, on the model and task of another study."""
    flat, scratch = of.arm(of.baseline), of.arm(of.control)
    return replace(
        of,
        name=name,
        title=f"Rates proposed by advise: {of.title[0].lower()}{of.title[1:]}",
        question="Do rates proposed from a run's own update ratios beat one tuned rate?",
        arms=(flat, *ADVISED, scratch),
        pairs=(),
        full=replace(of.full, seeds=seeds),
        quick=replace(of.quick, arms=()),
        run=partial(run_advised, of.run),
        picture=None,
    )


ADVISE_DECAY = _study(evidence_vit.LAYER_DECAY, "advise_layer_decay", 10)
ADVISE_DEPTH = _study(evidence_wan.DEPTH, "advise_depth", 10)
