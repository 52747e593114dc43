"""Where every element of a model lies in a job of any size, at which learning rate; with proof.

    python benchmarks/simulate.py --model ltx2_19b --world-size 1024 --sharding fsdp2
    python benchmarks/simulate.py --model FOLDER --world-size 64 --sharding zero3 --config FILE

The plan comes from names and shapes, element ranges of ranks from ``dist_layerlr.sharders.ranges``,
which is what the sharders check live shards against. No process group and no torch: 1,024 ranks are
a loop. Prints a table and writes ``benchmarks/results/simulate_<model>_<sharding>_<ranks>.json``.
Exit status 1 when the proof fails.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

from dist_layerlr import LayerLRError, Plan, build_plan, read_model
from dist_layerlr.errors import ModelSourceError, error_line
from dist_layerlr.plan import PlanEntry
from dist_layerlr.sharders.ranges import dim0_range, flat_ranges, zero3_range

CENSUS = ROOT / "tests" / "census"
RESULTS = ROOT / "benchmarks" / "results"
ZERO_ALIGN = 2
"""DeepSpeed pads a ZeRO-1 and -2 group to a multiple of 2 x ranks
(``nccl_start_alignment_factor``)."""

Piece = tuple[int, int, int]
"""(rank, first element, number of elements) of a flattened parameter."""
Held = Iterator[tuple[str, float, list[Piece]]]
"""For each parameter that some optimizer group steps: its name, the group's rate, who holds which
elements."""


class NotCovered(Exception):
    """An element that no rank steps, or two do, or at another rate than planned."""


def by_rows(plan: Plan, ranks: int) -> Held:
    """FSDP2: rows of every parameter."""
    for name, lr, entry in stepped(plan):
        if not entry.shape:
            raise ModelSourceError(
                f"Parameter {name!r} is a scalar, which fully_shard refuses. Make it 1-D."
            )
        yield name, lr, nonempty(dim0_range(entry.shape, ranks, rank) for rank in range(ranks))


def by_partition(plan: Plan, ranks: int) -> Held:
    """ZeRO-3: every parameter alone, cut evenly."""
    for name, lr, entry in stepped(plan):
        yield name, lr, nonempty(zero3_range(entry.numel, ranks, rank) for rank in range(ranks))


def by_unit(plan: Plan, ranks: int) -> Held:
    """FSDP1 with flat parameters: one per block, and one for everything else."""
    rates = {name: lr for name, lr, _ in stepped(plan)}
    units: dict[tuple[str | None, int | None], list[PlanEntry]] = defaultdict(list)
    for entry in plan.entries.values():
        units[entry.stack, entry.block].append(entry)
    for members in units.values():
        for entry, pieces in flattened(members, ranks, align=1):
            yield entry.name, rates[entry.name], pieces


def by_group(plan: Plan, ranks: int) -> Held:
    """ZeRO-1 and -2 under a segmented optimizer: all parameters laid end to end."""
    rates = {name: lr for name, lr, _ in stepped(plan)}
    for entry, pieces in flattened(list(plan.entries.values()), ranks, align=ZERO_ALIGN):
        yield entry.name, rates[entry.name], pieces


SHARDINGS: dict[str, Callable[[Plan, int], Held]] = {
    "fsdp2": by_rows,
    "fsdp1_flat": by_unit,
    "zero1": by_group,
    "zero2": by_group,
    "zero3": by_partition,
}


def stepped(plan: Plan) -> Iterator[tuple[str, float, PlanEntry]]:
    """What the optimizer's groups hold: (name, the group's rate, its entry).

    The rate is the group's, not the entry's, so that a plan which merges groups is under test.
    """
    for group in plan.groups:
        for name in group.names:
            yield name, group.lr, plan.entries[name]


def nonempty(ranges: Iterable[tuple[int, int]]) -> list[Piece]:
    """Ranges in rank order -> pieces, without empty shards."""
    return [(rank, start, count) for rank, (start, count) in enumerate(ranges) if count]


def flattened(
    members: Sequence[PlanEntry], ranks: int, *, align: int
) -> Iterator[tuple[PlanEntry, list[Piece]]]:
    """Pieces of parameters that share one flat tensor."""
    numels = [entry.numel for entry in members]
    pieces: list[list[Piece]] = [[] for _ in members]
    for rank in range(ranks):
        for held, (start, count) in zip(
            pieces, flat_ranges(numels, ranks, rank, align=align), strict=True
        ):
            if count:
                held.append((rank, start, count))
    return zip(members, pieces, strict=True)


@dataclass
class Ledger:
    """Sums over everything that was proved so far."""

    ranks: int
    ranges: int = 0
    empty: int = 0
    seen: set[str] = field(default_factory=set)
    per_rank: list[int] = field(default_factory=list)
    per_lr: dict[float, int] = field(default_factory=lambda: defaultdict(int))

    def __post_init__(self) -> None:
        self.per_rank = [0] * self.ranks

    def add(self, entry: PlanEntry, lr: float, pieces: list[Piece]) -> None:
        """Prove one parameter: its pieces tile it, and their rate is the planned one.

        Raises:
            NotCovered: they do not.
        """
        if entry.name in self.seen:
            raise NotCovered(f"{entry.name} is stepped by two groups")
        if lr != entry.lr:
            raise NotCovered(f"{entry.name} is stepped at {lr:g}, planned {entry.lr:g}")
        check_tiles(entry.name, entry.numel, pieces)
        self.seen.add(entry.name)
        self.ranges += len(pieces)
        self.empty += self.ranks - len(pieces)
        for rank, _, count in pieces:
            self.per_rank[rank] += count
            self.per_lr[lr] += count

    def finish(self, plan: Plan) -> None:
        """Prove that nothing was left out.

        Raises:
            NotCovered: a planned parameter was never stepped, or the sums are off.
        """
        missing = plan.entries.keys() - self.seen
        if missing:
            raise NotCovered(
                f"{len(missing)} parameters are stepped by no rank, such as {min(missing)}"
            )
        total = sum(entry.numel for entry in plan.entries.values())
        if not sum(self.per_rank) == sum(self.per_lr.values()) == total:
            raise NotCovered(f"{sum(self.per_rank):,} elements are stepped, {total:,} planned")


def check_tiles(name: str, numel: int, pieces: Iterable[Piece]) -> None:
    """Every element in exactly one piece.

    Raises:
        NotCovered: a gap or an overlap.
    """
    end = 0
    for rank, start, count in sorted(pieces, key=lambda piece: piece[1]):
        if start != end:
            raise NotCovered(
                f"{name}: rank {rank} starts at element {start}, {end} is the next to be held"
            )
        end = start + count
    if end != numel:
        raise NotCovered(f"{name}: {end} of {numel} elements are held")


def simulate(plan: Plan, sharding: str, ranks: int) -> Ledger:
    """Place every parameter of a plan on every rank, and prove it.

    Raises:
        NotCovered: the ranges do not cover the model exactly once, at the planned rates.
    """
    ledger = Ledger(ranks=ranks)
    for name, lr, pieces in SHARDINGS[sharding](plan, ranks):
        ledger.add(plan.entries[name], lr, pieces)
    ledger.finish(plan)
    return ledger


def report(plan: Plan, ledger: Ledger, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """What is printed and written."""
    return {
        "model": args.model,
        "sharding": args.sharding,
        "ranks": args.world_size,
        "plan_digest": plan.digest,
        "parameters": len(plan.entries),
        "elements": sum(ledger.per_rank),
        "learning_rates": len(ledger.per_lr),
        "ranges": ledger.ranges,
        "empty_shards": ledger.empty,
        "most_elements_on_a_rank": max(ledger.per_rank),
        "fewest_elements_on_a_rank": min(ledger.per_rank),
        "seconds": round(seconds, 2),
        "peak_memory_mib": round(peak_memory_mib()),
    }


def peak_memory_mib() -> float:
    """Largest resident size of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def show(rows: dict[str, Any], per_lr: dict[float, int]) -> None:
    """Print the table."""
    for key, value in rows.items():
        label = key.replace("_", " ")
        print(f"{label:<28}{value:,}" if isinstance(value, (int, float)) else f"{label:<28}{value}")
    print(f"\n{'learning rate':<28}elements over all ranks")
    for lr, elements in sorted(per_lr.items(), reverse=True):
        print(f"{lr:<28.8g}{elements:,}")
    print("\nproved: every element exactly once at exactly one learning rate")


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        required=True,
        help="a name under tests/census, or anything that read_model reads",
    )
    parser.add_argument(
        "--world-size", type=int, default=1024, metavar="N", help="ranks (default: 1024)"
    )
    parser.add_argument("--sharding", choices=SHARDINGS, required=True)
    parser.add_argument(
        "--config", default=str(ROOT / "launch" / "configs" / "ltx2.json"), metavar="FILE"
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=RESULTS,
        metavar="DIR",
        help="default: benchmarks/results",
    )
    args = parser.parse_args(argv)
    if args.world_size < 1:
        parser.error(f"invalid --world-size {args.world_size}: must be >= 1")
    census = CENSUS / f"{args.model}.tsv.gz"
    started = time.perf_counter()
    try:
        plan = build_plan(read_model(census if census.exists() else args.model), args.config)
        ledger = simulate(plan, args.sharding, args.world_size)
    except (LayerLRError, NotCovered) as error:
        print(error_line("simulate.py", error), file=sys.stderr)
        return 1
    rows = report(plan, ledger, args, time.perf_counter() - started)
    show(rows, ledger.per_lr)
    write(rows, ledger.per_lr, args)
    return 0


def write(rows: dict[str, Any], per_lr: dict[float, int], args: argparse.Namespace) -> None:
    """Write the result as JSON."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    stem = Path(args.model).name.removesuffix(".tsv.gz")
    path = args.output_dir / f"simulate_{stem}_{args.sharding}_{args.world_size}.json"
    rates = [
        {"lr": lr, "elements": elements} for lr, elements in sorted(per_lr.items(), reverse=True)
    ]
    path.write_text(json.dumps({**rows, "per_lr": rates}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
