"""A few values of each frozen tensor that is not saved, by which a load knows it again."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from dist_layerlr.checkpoint.dcp import StoredSpan
from dist_layerlr.checkpoint.index import SAMPLE, SAMPLES
from dist_layerlr.sharders import Weight
from dist_layerlr.sharders.base import sample_places


def sample_of(weight: Weight, saved_name: str) -> StoredSpan | None:
    """This rank's part of a few elements, evenly spaced over the whole tensor."""
    places = sample_places(prod(weight.shape), SAMPLES)
    mine: list[int] = []
    for number, place in enumerate(places):
        if weight.start <= place < weight.start + weight.numel:
            mine.append(number)
    if not mine:
        return None
    # The sample is itself a tensor of up to SAMPLES elements, of which each rank holds a span.
    chosen = weight.tensor[[places[number] - weight.start for number in mine]]
    return StoredSpan(
        name=f"{SAMPLE}.{saved_name}",
        start=mine[0],
        numel=len(mine),
        size=len(places),
        tensor=chosen,
    )


def same_values(mine: Tensor, saved: Tensor, saved_dtype: torch.dtype) -> bool:
    """Whether samples are of the same tensor, be it kept in another precision.

    They are compared in the coarser one.

    Args:
        mine: live values.
        saved: of ``mine``'s dtype.
        saved_dtype: what they were read from.
    """
    floats = saved_dtype.is_floating_point and mine.dtype.is_floating_point
    if floats and torch.finfo(saved_dtype).eps > torch.finfo(mine.dtype).eps:
        mine = mine.to(saved_dtype).to(mine.dtype)
    return torch.equal(mine, saved)
