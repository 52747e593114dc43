"""Element ranges against brute force: torch.chunk for rows, a map of every element's owner for flat
tensors."""

from __future__ import annotations

import importlib.util
import json
import sys
from math import prod
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dist_layerlr import build_plan
from dist_layerlr.sharders.ranges import (
    Range,
    dim0_range,
    flat_ranges,
    zero3_partition,
    zero3_range,
)

ROOT = Path(__file__).resolve().parents[3]
SHAPES = [(1,), (2,), (5,), (8,), (1, 7), (3, 4), (7, 2, 3), (16, 1), (9, 5)]
WORLDS = [1, 2, 3, 4, 5, 8, 13]
FLATS = [[1], [5], [3, 4], [1, 1, 1], [7, 2, 11], [16, 16], [13, 1, 1, 29, 2], [2, 60, 3]]


@pytest.fixture(scope="module")
def simulate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("simulate", ROOT / "benchmarks" / "simulate.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["simulate"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_tiles(numel: int, ranges: list[Range]) -> None:
    """Ranges, in rank order, hold every element once."""
    held = [e for start, count in ranges for e in range(start, start + count)]
    assert held == list(range(numel))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_dim0_ranges_are_the_rows_that_torch_chunk_gives(
    shape: tuple[int, ...], world: int
) -> None:
    numbered = torch.arange(prod(shape)).reshape(shape)
    chunks = [c.flatten().tolist() for c in torch.chunk(numbered, world, dim=0)]
    chunks += [[] for _ in range(world - len(chunks))]
    for rank, wanted in enumerate(chunks):
        start, count = dim0_range(shape, world, rank)
        assert list(range(start, start + count)) == wanted


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("numel", [1, 2, 3, 7, 12, 13, 64])
def test_zero3_ranges_are_the_padded_partitions_without_padding(numel: int, world: int) -> None:
    padded = list(range(numel))
    while len(padded) % world:
        padded.append(-1)
    size = len(padded) // world
    assert zero3_partition(numel, world) == size
    for rank in range(world):
        start, count = zero3_range(numel, world, rank)
        wanted = [e for e in padded[rank * size : (rank + 1) * size] if e >= 0]
        assert list(range(start, start + count)) == wanted


@pytest.mark.parametrize("align", [1, 2, 4])
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("numels", FLATS)
def test_flat_ranges_give_every_element_to_the_rank_that_owns_it(
    numels: list[int], world: int, align: int
) -> None:
    flat = [(i, e) for i, numel in enumerate(numels) for e in range(numel)]
    while len(flat) % (align * world):
        flat.append((-1, 0))
    size = len(flat) // world
    for rank in range(world):
        mine = flat[rank * size : (rank + 1) * size]
        for i, (start, count) in enumerate(flat_ranges(numels, world, rank, align=align)):
            assert list(range(start, start + count)) == [e for j, e in mine if j == i]


def test_every_element_of_every_size_is_held_once() -> None:
    for numel in range(1, 41):
        for world in range(1, 18):
            assert_tiles(numel, [zero3_range(numel, world, r) for r in range(world)])
            assert_tiles(numel * 3, [dim0_range((numel, 3), world, r) for r in range(world)])
            numels = [numel, 1, 2 * numel + 1]
            by_rank = [flat_ranges(numels, world, r, align=2) for r in range(world)]
            for i, size in enumerate(numels):
                assert_tiles(size, [ranges[i] for ranges in by_rank])


def test_empty_shards_lie_at_the_end_and_count_nothing() -> None:
    assert [dim0_range((2, 5), 4, r) for r in range(4)] == [(0, 5), (5, 5), (10, 0), (10, 0)]
    assert [zero3_range(3, 4, r)[1] for r in range(4)] == [1, 1, 1, 0]
    assert flat_ranges([2, 6], 2, 1) == [(0, 0), (2, 4)]


NAMES = {
    f"blocks.{i}.{part}": shape
    for i in range(3)
    for part, shape in {
        "attn1.to_q.weight": (6, 5),
        "ffn.net.0.proj.weight": (7, 3),
        "norm1.weight": (5,),
    }.items()
}
CONFIG = {
    "per_layer_lr": {
        "enabled": True,
        "component_lr": {"self_attn": 4e-4, "ffn": 1e-4},
        "default_lr": 1e-5,
    }
}


@pytest.mark.parametrize("sharding", ["fsdp2", "fsdp1_flat", "zero1", "zero2", "zero3"])
def test_simulation_proves_a_small_model_on_more_ranks_than_rows(
    simulate: ModuleType, sharding: str
) -> None:
    plan = build_plan({**NAMES, "proj_out.weight": (11,)}, CONFIG)
    ledger = simulate.simulate(plan, sharding, 16)
    assert sum(ledger.per_rank) == 3 * (30 + 21 + 5) + 11
    assert ledger.per_lr == {
        lr: sum(e.numel for e in plan.entries.values() if e.lr == lr) for lr in ledger.per_lr
    }
    assert ledger.ranges + ledger.empty == 16 * len(plan.entries)


def test_simulation_finds_gaps_overlaps_and_wrong_rates(simulate: ModuleType) -> None:
    entry = next(iter(build_plan(NAMES, CONFIG).entries.values()))
    bad = {
        "a gap": [(0, 0, 10), (1, 20, 10)],
        "an overlap": [(0, 0, 20), (1, 10, 20)],
        "a missing end": [(0, 0, 10)],
        "an end too far": [(0, 0, 31)],
    }
    for pieces in bad.values():
        with pytest.raises(simulate.NotCovered):
            simulate.Ledger(ranks=2).add(entry, entry.lr, pieces)
    whole = [(1, 15, 15), (0, 0, 15)]
    with pytest.raises(simulate.NotCovered, match="planned"):
        simulate.Ledger(ranks=2).add(entry, 2 * entry.lr, whole)
    ledger = simulate.Ledger(ranks=2)
    ledger.add(entry, entry.lr, whole)
    with pytest.raises(simulate.NotCovered, match="two groups"):
        ledger.add(entry, entry.lr, whole)
    with pytest.raises(simulate.NotCovered, match="stepped by no rank"):
        ledger.finish(build_plan(NAMES, CONFIG))


def test_simulation_runs_from_the_command_line(
    simulate: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = tmp_path / "tiny.tsv"
    names.write_text("".join(f"{n}\t{'x'.join(map(str, s))}\n" for n, s in NAMES.items()))
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))
    shared = ["--config", str(config), "--output-dir", str(tmp_path)]
    assert (
        simulate.main(["--model", str(names), "--sharding", "zero1", "--world-size", "4", *shared])
        == 0
    )
    assert (
        "proved: every element exactly once at exactly one learning rate" in capsys.readouterr().out
    )
    written = json.loads((tmp_path / "simulate_tiny.tsv_zero1_4.json").read_text())
    assert (
        written["ranks"] == 4
        and sum(r["elements"] for r in written["per_lr"]) == written["elements"]
    )
    assert simulate.main(["--model", "no_such_model", "--sharding", "fsdp2", *shared]) == 1
