"""The ring as a state machine, over random itineraries; and what a policy accepts."""

from __future__ import annotations

import random

import pytest

from dist_layerlr.errors import ConfigError
from dist_layerlr.offload.policy import StreamPolicy
from dist_layerlr.offload.ring import Ring, RingFull, State


def visit(ring: Ring, unit: int, backward: bool) -> int:
    """Need a unit, let everything arrive; returns the number of loads."""
    loads = ring.need(unit, backward=backward)
    for load in loads:
        assert ring.state(load.unit) is State.LOADING and ring.slot(load.unit) == load.slot
        ring.arrived(load.unit)
    return len(loads)


@pytest.mark.parametrize("seed", range(40))
def test_any_itinerary_keeps_the_ring_whole(seed: int):
    draw = random.Random(seed)
    units, window = draw.randint(1, 12), draw.randint(1, 4)
    slots = min(window + 2, units)
    ring = Ring(units=units, slots=slots, window=window)
    for _ in range(200):
        unit, backward = draw.randrange(units), draw.random() < 0.5
        busy = set(draw.sample(ring.holders(), min(len(ring.holders()), max(0, slots - 1))))
        held = {u: ring.slot(u) for u in ring.holders()}
        loads = ring.need(unit, backward=backward, busy=busy)
        assert unit in ring.holders()
        assert busy <= set(ring.holders()) and all(ring.slot(u) == held[u] for u in busy)
        assert len({ring.slot(u) for u in ring.holders()}) == len(ring.holders()) <= slots
        assert [load.unit for load in loads] == list(dict.fromkeys(load.unit for load in loads))
        assert all(ring.unit_in(load.slot) == load.unit for load in loads)
        for load in loads:
            if draw.random() < 0.8:
                ring.arrived(load.unit)
        if draw.random() < 0.1:
            ring.drop(draw.choice(ring.holders()))
        if draw.random() < 0.05:
            order = list(range(units))
            draw.shuffle(order)
            ring.reorder(order)
    assert 1 <= ring.peak <= slots


@pytest.mark.parametrize("units", [3, 6, 11])
@pytest.mark.parametrize("window", [1, 2, 3])
def test_forward_and_backward_load_two_times_what_does_not_fit(units: int, window: int):
    slots = min(window + 2, units)
    ring = Ring(units=units, slots=slots, window=window)

    def step() -> int:
        forward = sum(visit(ring, u, False) for u in range(units))
        return forward + sum(visit(ring, u, True) for u in reversed(range(units)))

    assert [step() for _ in range(3)] == [
        2 * units - slots,
        2 * (units - slots),
        2 * (units - slots),
    ]


def test_the_next_units_of_the_direction_are_loaded_ahead():
    ring = Ring(units=8, slots=4, window=2)
    assert [load.unit for load in ring.need(3, backward=False)] == [3, 4, 5]
    ring = Ring(units=8, slots=4, window=2)
    assert [load.unit for load in ring.need(3, backward=True)] == [3, 2, 1]


def test_units_go_in_the_order_that_was_learnt():
    ring = Ring(units=4, slots=3, window=1)
    ring.reorder([2, 0, 3, 1])
    assert [load.unit for load in ring.need(0, backward=False)] == [0, 3]
    assert ring.follows(2, 0) and not ring.follows(0, 2)


def test_a_ring_of_busy_slots_is_full():
    ring = Ring(units=4, slots=2, window=1)
    visit(ring, 0, False)
    with pytest.raises(RingFull):
        ring.need(3, backward=False, busy={0, 1})


@pytest.mark.parametrize("call", ["arrived", "drop"])
def test_a_transition_that_skips_a_state_is_refused(call: str):
    ring = Ring(units=2, slots=1, window=1)
    with pytest.raises(AssertionError):
        getattr(ring, call)(0)


@pytest.mark.parametrize(
    "field, value, allowed",
    [
        ("mode", "blocks", "block, layer"),
        ("prefetch_window", 0, "integer >= 1"),
        ("prefetch_window", True, "integer >= 1"),
        ("pinned_pool_mb", 0, "integer >= 1"),
        ("resident_blocks", "all", "integer >= 0"),
        ("resident_blocks", -1, "integer >= 0"),
        ("stream_trainable", 1, "true or false"),
        ("host", "disk", "memory, file"),
        ("host_dtype", "fp8", "float8_e4m3fn, int8"),
        ("min_numel", 0, "integer >= 1"),
    ],
)
def test_a_policy_names_the_field_the_value_and_what_is_allowed(
    field: str, value: object, allowed: str
):
    with pytest.raises(ConfigError) as error:
        StreamPolicy(**{field: value})
    assert (
        field in str(error.value)
        and repr(value) in str(error.value)
        and allowed in str(error.value)
    )


def test_files_and_eight_bits_exclude_each_other():
    with pytest.raises(ConfigError, match="host_dtype"):
        StreamPolicy(host="file", host_dtype="int8")


def test_a_policy_has_two_slots_more_than_its_window():
    assert StreamPolicy(prefetch_window=3).slots == 5
