"""Many tests in one set of ranks: a process group is started once for a file, not once for a test.

Each rank runs the same list of cases in the same order. After a case the ranks compare how it
ended; where they differ, the next collectives would not fit together, so that the rest is "not
run", and fails.
"""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch.distributed as dist

from tests.support.ranks import run_ranks

PARTED_S = 240.0
"""How long a rank waits for the others to end a case before it calls them parted."""


class Outcome(NamedTuple):
    """How a body ended."""

    kind: str
    """``passed``, ``failed``, ``skipped`` or ``not run``."""
    text: str = ""
    """The traceback or the reason."""
    value: Any = None
    """What the body returned."""


def attempt(body: Callable[..., Any], *args: Any) -> Outcome:
    """Call a body, and tell how it ended."""
    try:
        return Outcome("passed", value=body(*args))
    except pytest.skip.Exception as reason:
        return Outcome("skipped", str(reason))
    except BaseException:
        return Outcome("failed", traceback.format_exc())


class At(NamedTuple):
    """Where a case runs."""

    rank: int
    world_size: int
    folder: Path
    """Empty, the same on all ranks."""


Body = Callable[[At], Any]


class Outcomes:
    """What became of each case on each rank."""

    def __init__(self, by_rank: list[dict[str, Outcome]]):
        self._by_rank = by_rank

    def settle(self, name: str) -> list[Any]:
        """Fail or skip as the ranks did, or return the values by rank."""
        found = [outcomes[name] for outcomes in self._by_rank]
        for rank, outcome in enumerate(found):
            if outcome.kind in ("failed", "not run"):
                pytest.fail(f"{outcome.kind} on rank {rank}\n{outcome.text}", pytrace=False)
        for outcome in found:
            if outcome.kind == "skipped":
                pytest.skip(outcome.text)
        return [outcome.value for outcome in found]


def run_bodies(
    bodies: dict[str, Body], world_size: int, before: Callable[[], None] | None = None
) -> Outcomes:
    """Run named bodies, one after the other, on fresh ranks; ``before`` prepares each rank."""
    with tempfile.TemporaryDirectory() as folder:
        return Outcomes(run_ranks(_on_rank, world_size, bodies, folder, before))


def _on_rank(
    rank: int,
    world_size: int,
    bodies: dict[str, Body],
    folder: str,
    before: Callable[[], None] | None,
) -> dict[str, Outcome]:
    if before is not None:
        before()
    outcomes: dict[str, Outcome] = {}
    for number, (name, body) in enumerate(bodies.items()):
        at = At(rank, world_size, Path(folder) / str(number))
        at.folder.mkdir(exist_ok=True)
        outcomes[name] = attempt(body, at)
        if not _together(name, at, outcomes[name].kind):
            gone = Outcome("not run", f"the ranks parted in {name}")
            return {**dict.fromkeys(bodies, gone), **outcomes}
    return outcomes


def _together(name: str, at: At, kind: str) -> bool:
    """Whether all ranks ended this case alike."""
    store = dist.distributed_c10d._get_default_store()
    store.set(f"case/{name}/{at.rank}", kind)
    keys = [f"case/{name}/{rank}" for rank in range(at.world_size)]
    try:
        store.wait(keys, timedelta(seconds=PARTED_S))
    except RuntimeError:  # the other rank waits in a collective of this case, or is gone
        return False
    return len({store.get(key) for key in keys}) == 1


class Cases:
    """Functions that become one test each, but run in one set of ranks.

    >>> cases = Cases()
    >>> @cases
    ... def test_that_something_holds(at: At) -> None: ...
    >>> @pytest.fixture(scope="module")
    ... def outcomes(request): return cases.run(request)
    """

    def __init__(self, world_size: int = 2, before: Callable[[], None] | None = None):
        self._world_size = world_size
        self._before = before
        self._bodies: dict[str, Body] = {}

    def __call__(self, body: Body) -> Callable[[Outcomes], None]:
        """Register a body, and return the test that reports it."""
        name = body.__name__
        self._bodies[name] = body

        def test(outcomes: Outcomes) -> None:
            outcomes.settle(name)

        test.__name__ = test.__qualname__ = name
        test.__module__ = body.__module__
        return test

    def run(self, request: pytest.FixtureRequest) -> Outcomes:
        """Run the selected cases on fresh ranks."""
        chosen = {item.name for item in items_of(request)}
        bodies = {name: body for name, body in self._bodies.items() if name in chosen}
        return run_bodies(bodies, self._world_size, self._before)


def items_of(request: pytest.FixtureRequest) -> list[Any]:
    """The selected tests of the module that asks."""
    items = request.session.items
    return [item for item in items if getattr(item, "module", None) is request.module]
