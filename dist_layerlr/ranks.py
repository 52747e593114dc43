"""Ranks fail together: every rank hears every rank's problems and raises the same error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dist_layerlr.errors import CheckpointError, LayerLRError, PlanMismatch

_SHARED = "raised_on_all_ranks"
Result = TypeVar("Result")
Failure = TypeVar("Failure", bound=Exception)
Problem = tuple[str, str]
"""(kind: a key of CAUSES, text)."""
SHOWN = 10
CAUSES = {
    "not stepped": (
        "the optimizer was built before the model was sharded, or from other parameters; build it"
        " with attach(plan, model, make) after sharding (before deepspeed.initialize)"
    ),
    "lr": (
        "a scheduler, a checkpoint or an optimizer block overwrote the groups' rates, or groups"
        " were merged; drive them with PlanSchedule, call reapply after every load, and remove"
        " scheduler and optimizer blocks from the sharder's config"
    ),
    "factor": (
        "a scheduler raises rates above the plan, or was not stepped on all ranks alike; a"
        " schedule's multiplier lies in [0, 1]. If yours does not, pass verify(..., factor=...)"
    ),
    "timing": (
        "nobody stepped PlanSchedule once after each optimizer step, on all ranks alike; or the"
        " optimizer was not built by attach, or a load put other groups there (call reapply)"
    ),
    "weight decay": (
        "a checkpoint or an optimizer block overwrote the groups' settings; call reapply after"
        " every load"
    ),
    "eps": (
        "a checkpoint or the user's function overwrote the groups' epsilon; call reapply after"
        " every load"
    ),
    "optimizer": (
        "matrices were told from the rest by their shape after sharding (ndim == 2 is false of"
        " every shard of FSDP1 and ZeRO), or one optimizer was given for all; build it with"
        " attach(plan, model, {name: make, ...})"
    ),
    "elements": "a shard is stepped twice or not at all; one sharder wraps part of the model only",
    "unplanned": "adapters or requires_grad changed after the plan was made; make the plan last",
    "frozen": (
        "requires_grad was changed after attach (staged unfreezing, PEFT's set_adapter); make the"
        " plan and the optimizer anew after such a change, or freeze before the plan is made"
    ),
    "new": (
        "modules or adapters were added, or unfrozen, after the plan was made: nothing steps them;"
        " make the plan and the optimizer anew"
    ),
    "gone": (
        "modules or adapters were removed, replaced or renamed (parametrized, merged, resized)"
        " after the plan was made; make the plan and the optimizer anew"
    ),
    "replica": (
        "nobody synchronises a parameter that several ranks hold: experts of one rank, parameters"
        " that DDP or FSDP2 ignores, pipeline stages with equal names, a model without DDP; or they"
        " are meant to differ: then say so (dist_layerlr.sharders.mark_distinct)"
    ),
    "steps": (
        "a step was counted twice or was taken on some ranks only; or the steps given to"
        " verify(..., steps=) are not those that were done, earlier runs included"
    ),
    "repeated": "two groups hold the same parameter",
    "error": "an exception of that rank, not of all; its own log has the traceback",
    "plan": "ranks read different configs or models; give every rank the same files",
    "unseen": (
        "nothing was stepped inside the block, no parameter had a gradient, or the optimizer is one"
        " whose direction is not known (effect_check knows Adam, AdamW, SGD and Muon)"
    ),
    "effect": (
        "the optimizer does not use its groups' rates (one that adapts or rescales them, or a stale"
        " copy of a group)"
    ),
    "trial": (
        "the optimizer mixes elements of a tensor, or of all tensors, so that a rank that holds a"
        " part of them trains otherwise; use AdamW, or DDP, which keeps parameters whole"
    ),
    "layout": (
        "groups or their order changed since the checkpoint was written; make the plan from the"
        " same config, or load by name"
    ),
}


class RankFailure(CheckpointError):
    """An exception that no rank was prepared for, told to all of them.

    On the rank where it happened, the chain of causes holds it with its traceback.
    """


def in_group() -> bool:
    """Whether this process belongs to a default process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's rank in the default process group; 0 without one."""
    return dist.get_rank() if in_group() else 0


def world_size() -> int:
    """Ranks in the default process group; 1 without one."""
    return dist.get_world_size() if in_group() else 1


def transport_device() -> torch.device:
    """Where a tensor must be to travel by the default group: NCCL takes its own device only."""
    if not in_group() or "cpu" in dist.get_backend_config():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def everyone(mine: Any) -> list[Any]:
    """What each rank contributes, by rank. Collective when a process group exists."""
    if not in_group():
        return [mine]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return gathered


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` holds on any rank. Collective when a process group exists."""
    if not in_group():
        return flag
    count = torch.tensor([int(flag)], device=transport_device())
    dist.all_reduce(count)
    return bool(count.item() > 0)


def alike(work: Callable[[], Result]) -> Result:
    """Run ``work`` on every rank.

    If it fails on any, every rank raises the first failing rank's error. Collective. It costs one
    all-reduce of one number unless a rank fails.

    Raises:
        LayerLRError: as that rank raised it; other exceptions become a RankFailure that names
            the rank.
    """
    result, failure = _attempt(work)
    # Errors are objects of any size: ranks exchange them only after all know that there is one.
    if any_rank(failure is not None):
        _raise_first(everyone(failure), failure)
    return result  # type: ignore[return-value]


def is_shared(error: LayerLRError) -> bool:
    """Whether every rank raises this error.

    True if ranks agreed on it (``alike``, ``rank_zero``, ``together``, a checkpoint's writing), and
    before they form a process group: until then all of them see the same input.
    """
    return bool(getattr(error, _SHARED, False)) or not in_group()


def shared(error: Failure) -> Failure:
    """Mark an error that every rank raises, and return it."""
    setattr(error, _SHARED, True)
    return error


def rank_zero(work: Callable[[], Result]) -> Result:
    """As ``alike``, but every rank returns rank 0's result. Collective.

    Raises:
        LayerLRError: as ``alike`` does.
    """
    result, failure = _attempt(work)
    heard = everyone((result, failure))
    _raise_first([other for _, other in heard], failure)
    return heard[0][0]  # type: ignore[no-any-return]


def _attempt(work: Callable[[], Result]) -> tuple[Result | None, LayerLRError | None]:
    try:
        return work(), None
    except LayerLRError as error:
        return None, error
    except Exception as error:
        failure = RankFailure(f"Rank {rank()}: {type(error).__name__}: {error}")
        # Only the message travels to other ranks; this rank's own log shows the traceback.
        failure.__cause__ = error
        return None, failure


def _raise_first(heard: list[LayerLRError | None], mine: LayerLRError | None) -> None:
    first = next((failure for failure in heard if failure is not None), None)
    if first is None:
        return
    shared(first)
    if first is mine:
        # One process: the error was not sent anywhere and still carries its own cause.
        raise first
    # What a rank hears is a copy without traceback: on the rank that failed, the chain keeps it.
    raise first from mine


@contextmanager
def together(digest: str) -> Iterator[list[Problem]]:
    """Collect this rank's problems; at exit every rank raises what any rank found. Collective.

    An exception inside the block is a problem too, whatever its type: the other ranks do not wait
    for a rank that left. One that all ranks raise alike passes unchanged.

    Raises:
        PlanMismatch: a rank has a problem or an exception of its own, or digests differ.
    """
    problems: list[Problem] = []
    failure: Exception | None = None
    try:
        yield problems
    except Exception as error:
        failure = error
        problems[:] = [("error", f"{type(error).__name__}: {error}")]
    # Every rank comes here, whatever happened to it: no other rank may wait in vain.
    heard = everyone((digest, len(problems), problems[:SHOWN]))
    if failure is not None and all(h == heard[0] for h in heard):
        raise shared(failure)
    found = _first_mismatch(heard)
    if found is not None:
        raise shared(found) from failure


def _first_mismatch(heard: list[tuple[str, int, list[Problem]]]) -> PlanMismatch | None:
    digests = [digest for digest, _, _ in heard]
    if len(set(digests)) > 1:
        return mismatch(0, [("plan", f"plans differ between ranks: {digests}")], 1)
    for failing, (_, count, shown) in enumerate(heard):
        if count:
            return mismatch(failing, shown, count)
    return None


def mismatch(failing: int, shown: list[Problem], count: int) -> PlanMismatch:
    """The one wording: the failing rank, its problems, likely causes with their fixes."""
    more = f" (first {len(shown)} of {count})" if count > len(shown) else ""
    lines = "\n".join(f"  {text}" for _, text in shown)
    causes = "\n".join(
        f"  likely cause: {CAUSES[kind]}." for kind in dict.fromkeys(k for k, _ in shown)
    )
    return PlanMismatch(
        f"The live optimizer differs from the plan on rank {failing}{more}:\n{lines}\n{causes}"
    )
