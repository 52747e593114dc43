"""Changing a run while it runs: what ``steer.json`` asks for, on all ranks, between two steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_layerlr import fields
from dist_layerlr.errors import ConfigError, LayerLRError, PlanMismatch
from dist_layerlr.fields import setting
from dist_layerlr.files import write_text
from dist_layerlr.optim import Schedule
from dist_layerlr.plan import PLAN_FILE, Changes, Plan, plan_diff, read_changes, steered
from dist_layerlr.ranks import alike, any_rank, rank_zero
from launch.trainer.inbox import READ, STEER, Found, Inbox
from launch.trainer.runtime import Runtime

if TYPE_CHECKING:
    from launch.trainer.team import Team

_BLOCK = "steer"
"""How errors call the content of the file."""


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What a file asks of the trainer, beside the rates of the plan."""

    min_ratio: float | None = setting(
        fields.number(0.0, 1.0), default=None, doc="The schedule's floor from now on."
    )
    save: bool = setting(fields.boolean, default=False, doc="Write a checkpoint now.")
    sample: bool = setting(fields.boolean, default=False, doc="Draw a picture now.")
    end: bool = setting(
        fields.boolean, default=False, doc="End here; a checkpoint and the result are saved."
    )

    def __or__(self, other: Orders) -> Orders:
        """What both ask for."""
        both = {"save": self.save or other.save, "sample": self.sample or other.sample}
        return Orders(**both, end=self.end or other.end)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A file that is in force."""

    file: str
    """Its name in ``steering/``."""
    step: int
    """Steps that were done when it was read."""
    changes: Changes
    orders: Orders
    raw: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As a checkpoint holds it."""
        return {"file": self.file, "step": self.step, "steer": dict(self.raw)}


def read_orders(raw: Mapping[str, Any]) -> tuple[Changes, Orders]:
    """Check the content of a file.

    Raises:
        ConfigError: an unknown key or a bad value, or nothing that is asked for.
    """
    fields.known_keys(_BLOCK, raw, fields.settings(Changes, Orders))
    own = fields.settings(Orders)
    orders = Orders(**fields.read(_BLOCK, {k: raw[k] for k in raw if k in own}, Orders))
    changes = read_changes({k: raw[k] for k in raw if k not in own})
    if changes.empty and orders == Orders():
        known = ", ".join(fields.settings(Changes, Orders))
        raise ConfigError(f"Invalid {_BLOCK}: it asks for nothing. Give one of {known}.")
    return changes, orders


def kept_of(extra: Mapping[str, Any]) -> list[Kept]:
    """The files that were in force when a checkpoint was written."""
    found = []
    for row in extra.get(READ, ()):
        changes, orders = read_orders(row["steer"])
        file, step, raw = row["file"], row["step"], row["steer"]
        found.append(Kept(file=file, step=step, changes=changes, orders=orders, raw=raw))
    return found


def resteered(plan: Plan, kept: Sequence[Kept]) -> Plan:
    """The plan of the config with what a checkpoint has in force.

    Raises:
        ConfigError: a part that the model or the config has no longer.
    """
    try:
        return steered(plan, *(one.changes for one in kept))
    except ConfigError as error:
        raise ConfigError(
            f"Cannot go on with the changes that {READ}/ of the run lists: {error} Set the config"
            " back, or start another run from this one's weights."
        ) from None


class Steering:
    """What was changed since the run began. All calls but ``factor`` are collective."""

    def __init__(
        self,
        folder: Path,
        schedule: Schedule,
        kept: Sequence[Kept] = (),
        *,
        continued: bool = True,
    ):
        """Take over what a checkpoint has in force.

        Args:
            folder: Output folder of the run.
            schedule: As the config has it.
            kept: What the checkpoint has; the plans of the run hold its rates already.
            continued: Whether files that were read in this folder belong to this run.
        """
        self.kept = list(kept)
        self.told = False
        """Whether the first rank has found something to read; the same on all ranks."""
        self.changed = False
        """Whether this process has changed rates."""
        self.stopper = "a signal"
        """What ends a run that is ended early."""
        self._folder, self._schedule, self._continued = folder, schedule, continued
        self._inbox: Inbox | None = None
        self._begin, self._carried = 0, Orders()

    def factor(self, step: int) -> float:
        """The schedule's multiplier of a step, with the floor that was in force then."""
        floor = self._schedule.min_ratio
        for one in self.kept:
            if one.step <= step and one.changes.reset:
                floor = self._schedule.min_ratio
            if one.step <= step and one.orders.min_ratio is not None:
                floor = one.orders.min_ratio
        return replace(self._schedule, min_ratio=floor).factor(step)

    def saved(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {READ: [one.to_dict() for one in self.kept]} if self.kept else {}

    def begin(self, team: Team, step: int) -> bool:
        """Look for files of earlier processes. Returns whether the run is to end at once."""
        self._begin = step
        if team.face.runtime.is_main:
            self._inbox = Inbox(self._folder, team.face.runtime.say)
            known = {one.file for one in self.kept}
            self._inbox.begin(known, continued=self._continued)
        self.told = any_rank(self.waiting(step))
        self._carried = self.take(team, step)
        return self._carried.end

    def waiting(self, done: int) -> bool:
        """Whether this rank sees something to read after ``done`` steps. No collective."""
        return self._inbox is not None and self._inbox.waiting(done)

    def take(self, team: Team, done: int) -> Orders:
        """Read what is there, and put it in force. Returns what the loop has to do.

        A file that is refused leaves everything as it was.
        """
        orders, self._carried = self._carried, Orders()
        # After the last step there is nothing left to change.
        if not self.told or done >= self._schedule.total_steps:
            return orders
        self.told = False
        while (found := rank_zero(lambda: self._next(done))) is not None:
            before = {name: job.plan for name, job in team.jobs.items()}
            try:
                orders |= self._obey(team, found, done)
            except (ConfigError, PlanMismatch) as error:
                # All ranks came here with the same error, and none has changed anything.
                self._refuse(team.face.runtime, found, done, error)
                continue
            self.stopper = STEER if orders.end else self.stopper
            self._tell(team, found, before)
            # What is not in force now is a fault of the program, and ends the run.
            self._prove(team, done)
        return orders

    def _next(self, done: int) -> Found | None:
        return None if self._inbox is None else self._inbox.take(done)

    def _obey(self, team: Team, found: Found, done: int) -> Orders:
        if found.error is not None:
            raise ConfigError(found.error)
        # Every rank has the first one's bytes, and comes to the same answer.
        changes, orders = read_orders(found.raw)
        self._check_floor(orders)
        before = {name: job.plan for name, job in team.jobs.items()}
        plans = {name: steered(plan, changes) for name, plan in before.items()}
        self._put(team, plans, done)
        try:
            name = rank_zero(lambda: self._mark(team, found, done))
        except ConfigError:
            self._put(team, before, done)
            raise
        self.kept.append(Kept(file=name, step=done, changes=changes, orders=orders, raw=found.raw))
        return orders

    def _prove(self, team: Team, done: int) -> None:
        """The live rates are those of the plan, on every rank. Collective."""
        for name, job in team.each():
            factor, steps = team.factor(name, self._begin, done), team.turns.count(name, done)
            proof = alike(partial(job.engine.prove, factor, steps))
            job.runtime.say(f"{name}: {proof.line()}" if name else proof.line())

    def _put(self, team: Team, plans: Mapping[str, Plan], done: int) -> None:
        """Have every network step at the rates of its plan, or none of them."""
        past: list[tuple[str, Plan]] = []
        for name, job in team.each():
            if plans[name].digest == job.plan.digest:
                continue
            try:
                past.append((name, job.plan))
                job.engine.steer(plans[name], team.factor(name, self._begin, done))
            except PlanMismatch:
                for other, plan in past[:-1]:
                    team.awake(other).engine.steer(plan, team.factor(other, self._begin, done))
                raise
            self.changed = True

    def _mark(self, team: Team, found: Found, done: int) -> str:
        """On the first rank: the file is in force from here on."""
        if self._inbox is None:
            return ""
        try:
            for job in team.jobs.values():
                write_text(job.folder / PLAN_FILE, job.plan.to_json() + "\n")
        except OSError as error:
            raise ConfigError(f"Cannot write {error.filename!r}: {error.strerror}.") from None
        return self._inbox.keep(found, done)

    def _check_floor(self, orders: Orders) -> None:
        if orders.min_ratio is not None and self._schedule.kind == "constant":
            raise ConfigError(
                f"Invalid {_BLOCK}.min_ratio={orders.min_ratio:g}: schedule.type='constant' has no"
                " floor. Scale a part of the model instead."
            )

    def _tell(self, team: Team, found: Found, before: Mapping[str, Plan]) -> None:
        """Log what changed, as a difference of plans and settings."""
        say, one = team.face.runtime.say, self.kept[-1]
        again = "; it was read before, after the checkpoint that this start began from"
        end = again if found.again else ""
        say(f"{STEER} after step {one.step} ({READ}/{one.file}{end}):")
        for name, job in team.jobs.items():
            for line in plan_diff(before[name], job.plan):
                say(f"  {name}: {line}" if name else f"  {line}")
        if one.changes.reset:
            say("  reset: the rates and the floor of the config")
        if one.orders.min_ratio is not None:
            say(f"  schedule.min_ratio: {one.orders.min_ratio:g}")
        for what in ("save", "sample", "end"):
            if getattr(one.orders, what):
                say(f"  {what} now")

    def _refuse(self, runtime: Runtime, found: Found, done: int, error: LayerLRError) -> None:
        # One line, whatever a check says in several.
        text = " ".join(str(error).split())
        runtime.say(f"{STEER} refused after step {done}, training goes on unchanged: {text}")
        if self._inbox is not None:
            self._inbox.refuse(found, done)
