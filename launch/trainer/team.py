"""The networks of a run: one, or two experts of which every optimizer step trains one.

Each expert has a job of its own: model, plan, optimizer, checkpoints and result, in a sub-folder
with the name of its place in the pipeline. What they share is the data, the order of samples, the
schedule and the files of the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from dist_layerlr.errors import ConfigError
from dist_layerlr.sharders import unwrap
from launch.trainer.engines.sharding import SHARDINGS, Sharding
from launch.trainer.families import get_family
from launch.trainer.families.base import SeveralNetworks, network_folders
from launch.trainer.job import Job
from launch.trainer.objectives import Objective
from launch.trainer.objectives.sigma import SigmaDistribution
from launch.trainer.options import RunOptions
from launch.trainer.seeds import EXPERT_STREAM, mix_seed
from launch.trainer.steering import Steering

_SEEDS = 1 << 63
"""``mix_seed`` returns whole numbers below it."""
_SEPARATOR = "/"
"""Between an expert's name and a parameter's, which holds dots."""


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Which network each optimizer step trains: drawn from (seed, step), on all ranks alike."""

    shares: Mapping[str, float]
    """Network -> how often it is drawn."""
    seed: int = 0
    every: int = 1
    """Steps between draws."""

    def at(self, step: int) -> str:
        """Return the network that this step trains."""
        drawn = mix_seed(self.seed, EXPERT_STREAM, step // self.every) / _SEEDS
        place = drawn * sum(self.shares.values())
        for name, share in self.shares.items():
            place -= share
            if place < 0:
                return name
        return list(self.shares)[-1]

    def count(self, name: str, steps: int) -> int:
        """How many of the first ``steps`` steps train this network."""
        if len(self.shares) == 1:
            return steps
        return sum(self.at(step) == name for step in range(steps))

    def is_first(self, step: int) -> bool:
        """Whether no earlier step trains the network that this one does."""
        name = self.at(step)
        return not any(self.at(earlier) == name for earlier in range(step))

    def last(self, name: str, begin: int, end: int) -> int | None:
        """The last of the steps from ``begin`` to before ``end`` that trains this network."""
        steps = reversed(range(begin, end))
        return next((step for step in steps if self.at(step) == name), None)


@dataclass(frozen=True, kw_only=True)
class Team:
    """The networks of a run."""

    face: Job
    """What the networks share: data, schedule, runtime, and the folder of the run. Its engine and
    its plan are the first network's."""
    jobs: Mapping[str, Job]
    """By component of the pipeline; of no name where there is only one."""
    turns: Turns
    steering: Steering
    """What was changed since the run began, the schedule with it."""

    @property
    def several(self) -> bool:
        """Whether there are experts."""
        return len(self.jobs) > 1

    def at(self, step: int) -> Job:
        """Return the job that this step trains, its network on the device."""
        return self.awake(self.turns.at(step))

    def awake(self, name: str) -> Job:
        """Return the job of a network, which is brought to the device when the others have left."""
        for other, job in self.jobs.items():
            if other != name:
                job.engine.rest()
        if self.several:
            self.jobs[name].engine.wake()
        return self.jobs[name]

    def each(self) -> Iterator[tuple[str, Job]]:
        """Go through the networks, each on the device while it is looked at."""
        for name in self.jobs:
            yield name, self.awake(name)

    @contextmanager
    def called(self) -> Iterator[None]:
        """Have each network brought to the device when it is called, while inside."""
        hooks = []
        for name in self.jobs if self.several else ():
            # Pipelines call what DDP wraps. Before the sharder's own hooks, which gather weights
            # where they find them.
            network = unwrap(self.jobs[name].engine.model)
            wake = partial(self._wake, name)
            hooks.append(network.register_forward_pre_hook(wake, prepend=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _wake(self, name: str, *_: object) -> None:
        self.awake(name)

    def factor(self, name: str, begin: int, end: int) -> float:
        """The schedule's multiplier that a network's groups hold after the steps of this process.

        1 where none of them trained it: the rates are then as they were made or loaded.
        """
        last = self.turns.last(name, begin, end)
        return 1.0 if last is None else self.steering.factor(last)


def alone(job: Job) -> Team:
    """Make a team of one."""
    steering = Steering(job.folder, job.options.schedule)
    return Team(face=job, jobs={"": job}, turns=Turns(shares={"": 1.0}), steering=steering)


def team_of(jobs: Mapping[str, Job], options: RunOptions, folder: Path, steering: Steering) -> Team:
    """Make the team of a run.

    Args:
        jobs: By network.
        options: Of the run, before they were parted among the networks.
        folder: Output folder of the run.
        steering: Of the run.
    """
    lead = next(iter(jobs.values()))
    if len(jobs) == 1:
        return replace(alone(lead), steering=steering)
    shares = {name: _share(job.objective) for name, job in jobs.items()}
    every = int(options.objective.get("switch_every", 1))
    turns = Turns(shares=shares, seed=options.train.seed, every=every)
    face = replace(lead, options=options, folder=folder)
    return Team(face=face, jobs=jobs, turns=turns, steering=steering)


def options_of_each(options: RunOptions) -> dict[str, RunOptions]:
    """Return the options of each network of a run; those of the run where there is only one.

    Raises:
        ModelSourceError: a network that is asked for is not there.
    """
    family = get_family(options.model_type, options.objective)
    folders = network_folders(family, Path(options.model_path), options.objective)
    if len(folders) == 1 or not isinstance(family, SeveralNetworks):
        return {"": options}
    found = {}
    for name, folder in folders.items():
        objective = family.settings_of(name, options.objective)
        found[name] = replace(options, model_path=str(folder), objective=objective)
    return found


def check_team(names: Mapping[str, Any], sharding: Sharding, options: RunOptions) -> None:
    """Refuse experts under a sharder that cannot have two models in one process.

    Raises:
        ConfigError: names the flag, and what to pass instead.
    """
    if len(names) == 1 or sharding.several:
        return
    able = ", ".join(f"--sharding {row.name}" for row in SHARDINGS.values() if row.several)
    raise ConfigError(
        f"Invalid {sharding.flag} with objective.expert='both': it cannot hold two networks that"
        f" train in turn. Pass {able}, or train one expert at a time: objective.expert='high', then"
        " 'low'."
    )


def _share(objective: Objective) -> float:
    assert isinstance(objective, SigmaDistribution), "experts differ in their shares of noise"
    return objective.share()


def under(name: str, observed: Mapping[str, float]) -> dict[str, float]:
    """Put a network's name before those of its parameters."""
    return {f"{name}{_SEPARATOR}{key}" if name else key: value for key, value in observed.items()}


def own(name: str, observed: Mapping[str, float]) -> dict[str, float]:
    """Return what ``under`` was given for this network."""
    if not name:
        return dict(observed)
    found = {}
    for key, value in observed.items():
        network, _, parameter = key.partition(_SEPARATOR)
        if network == name:
            found[parameter] = value
    return found
