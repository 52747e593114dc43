"""The number of elements and their places, added up over ranks."""

from __future__ import annotations

import pytest
import torch

from dist_layerlr.optim.readback import LiveParam
from dist_layerlr.plan import build_plan
from dist_layerlr.proof.elements import element_problems
from dist_layerlr.sharders import Piece, Pieces
from tests.support.plans import config

NAME = "x_embedder.weight"
PLAN = build_plan({NAME: (5, 4)}, config())
OWNER = torch.zeros(20)


def told(*spans: tuple[int, int], copies: int = 1, anyhow: bool = False) -> list[str]:
    pieces = []
    for start, numel in spans:
        pieces.append(
            Piece(name=NAME, start=start, numel=numel, owner=OWNER, offset=0, group={"lr": 1.0})
        )
    numel = sum(count for _, count in spans)
    live = {NAME: LiveParam(lr=1.0, weight_decay=0.0, numel=numel, replicas=copies)}
    known = {NAME} if anyhow else set()
    return [text for _, text in element_problems(PLAN, Pieces(pieces=pieces), live, known)]


@pytest.mark.parametrize(
    "spans", [[(0, 20)], [(0, 7), (7, 13)], [(12, 8), (0, 3), (3, 9)], [(0, 0), (0, 20)]]
)
def test_spans_that_cover_the_whole_once_are_in_order(spans: list[tuple[int, int]]) -> None:
    assert told(*spans) == []
    assert told(*spans, (0, 10), (10, 10), copies=2) == []
    assert told(*spans, (0, 10), (10, 10), anyhow=True) == []


def test_too_few_and_too_many_elements_are_counted() -> None:
    assert told((0, 7), (7, 12)) == [f"{NAME}: 19 elements stepped over all ranks, 20 expected"]
    assert told((0, 20), (0, 20)) == [f"{NAME}: 40 elements stepped over all ranks, 20 expected"]
    assert told((0, 20), (0, 9), anyhow=True) == [
        f"{NAME}: 29 elements stepped over all ranks, 20 expected"
    ]
    assert told(anyhow=True) == [f"{NAME}: 0 elements stepped over all ranks, 20 expected"]


@pytest.mark.parametrize("copies", [1, 2])
def test_a_part_that_is_stepped_in_place_of_another_is_found(copies: int) -> None:
    """As many elements as there are, and even the sum of their positions is right."""
    more = [(0, 20)] * (copies - 1)
    wrong = [f"{NAME}: some elements are stepped by more ranks than others"]
    assert told((0, 10), (0, 10), *more, copies=copies) == wrong
    assert told((5, 5), (5, 5), (10, 5), (10, 5), *more, copies=copies) == wrong
    assert told((5, 5), (5, 5), (10, 5), (10, 5), *more, anyhow=True) == wrong
