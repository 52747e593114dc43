"""Streaming cost from formulas: golden values worked out by hand, and the same numbers from real
models' names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_layerlr import cli, read_model
from dist_layerlr.errors import ConfigError
from dist_layerlr.offload import UnitInfo
from dist_layerlr.offload.predict import (
    Layout,
    Machine,
    Workload,
    layout_from_names,
    predict,
    spread,
)

CENSUS = Path(__file__).resolve().parents[2] / "census"
H200 = Machine(gb_s=50, tflops=450)
RTX4090 = Machine(gb_s=24, tflops=100)
RTX3090 = Machine(gb_s=24, tflops=55)


def layout(
    numels: list[int],
    *,
    width: int = 0,
    outside: int = 0,
    full: bool = False,
    host_bytes: float = 2.0,
    resident: int = 0,
) -> Layout:
    """bf16 on the device."""
    chosen = spread(resident, len(numels))
    units = tuple(
        UnitInfo(
            name=f"blocks.{i}",
            numel=n,
            streamed=n,
            host_bytes=round(n * host_bytes),
            device_bytes=n * 2,
            grad_bytes=n * 2 * full,
            resident=i in chosen,
        )
        for i, n in enumerate(numels)
    )
    return Layout(
        units=units, fixed_bytes=outside * 2, width=width, stepped=(sum(numels) + outside) * full
    )


def uniform(units: int, numel: float, width: int = 0, **kwargs: Any) -> Layout:
    return layout([int(numel)] * units, width=width, **kwargs)


WAN = uniform(40, 0.35e9, 5120)
FLUX = uniform(57, 0.21e9, 3072)
LTX2 = uniform(48, 0.395e9, 4096)

# Wan on an H200: t_c = (2 * .35e9 * 32760 + 4 * 32760**2 * 5120) / 450e12 = (2.293e13 + 2.198e13) /
# 4.5e14 = 99.8 ms; t_x = .7e9 / 50e9 = 14 ms; step = 3 * 40 * 99.8 ms = 11.98 s; link = 2 * (40 -
# 3) * 14 ms = 1.036 s.
GOLDEN = [
    # label, model, tokens, machine, t_c ms, t_x ms, compute s, link s, serial s, weights GB
    ("wan h200", WAN, 32_760, H200, 99.8, 14.0, 11.98, 1.036, 13.01, 2.10),
    ("wan 4090", WAN, 32_760, RTX4090, 449.1, 29.17, 53.89, 2.158, 56.05, 2.10),
    ("flux 4090", FLUX, 4_608, RTX4090, 21.96, 17.5, 3.755, 1.890, 5.645, 1.26),
    ("flux h200", FLUX, 4_608, H200, 4.881, 8.4, 0.8346, 0.9072, 1.742, 1.26),
    ("ltx 3090", LTX2, 768, RTX3090, 11.21, 32.92, 1.614, 2.9625, 4.576, 2.37),
    ("ltx h200", LTX2, 768, H200, 1.370, 15.8, 0.1972, 1.422, 1.619, 2.37),
]


@pytest.mark.parametrize(
    "label, model, tokens, machine, t_c, t_x, compute, link, serial, weights", GOLDEN
)
def test_the_step_of_a_real_model_is_the_formula(
    label: str,
    model: Layout,
    tokens: int,
    machine: Machine,
    t_c: float,
    t_x: float,
    compute: float,
    link: float,
    serial: float,
    weights: float,
) -> None:
    p = predict(model, Workload(tokens=tokens), machine, window=1)
    count = len(model.units)
    assert p.forward.compute_s / count == pytest.approx(t_c / 1e3, rel=1e-3)
    assert p.forward.transfer_s / (count - 3) == pytest.approx(t_x / 1e3, rel=1e-3)
    assert p.compute_s == pytest.approx(compute, rel=1e-3)
    assert p.transfer_s == pytest.approx(link, rel=1e-3)
    assert p.serial_s == pytest.approx(serial, rel=1e-3)
    assert p.device_weight_bytes == pytest.approx(weights * 1e9, rel=1e-3)
    assert max(p.compute_s, p.transfer_s) <= p.step_s < p.serial_s
    assert p.forward.hidden == (t_c > t_x)
    assert p.hidden == (label in ("wan h200", "wan 4090", "flux 4090"))


@pytest.mark.parametrize(
    "gb_s, tflops, host_bytes, tokens",
    [(50, 450, 2, 9_000), (24, 100, 2, 4_167), (24, 55, 2, 2_292), (50, 450, 1, 4_500)],
)
def test_streaming_is_hidden_from_the_same_token_count_whatever_the_size(
    gb_s: float, tflops: float, host_bytes: float, tokens: int
) -> None:
    for numel in (1e7, 4e8):
        machine, model = (
            Machine(gb_s=gb_s, tflops=tflops),
            uniform(400, numel, host_bytes=host_bytes),
        )
        below, above = (
            predict(model, Workload(tokens=int(tokens * x)), machine, window=1)
            for x in (0.97, 1.03)
        )
        assert above.hidden_from_tokens == pytest.approx(tokens, abs=0.5)
        assert (below.forward.hidden, above.forward.hidden) == (False, True)


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("full, micro_steps", [(False, 1), (False, 2), (True, 1), (True, 2)])
def test_copies_are_counted_with_the_ring_reused_at_each_turn(
    window: int, full: bool, micro_steps: int
) -> None:
    work = Workload(tokens=1000, micro_steps=micro_steps)
    p = predict(uniform(12, 1e6, full=full), work, H200, window=window)
    slots = window + 2
    assert p.fetches == micro_steps * (2 * 12 - slots if full else 2 * (12 - slots))
    assert p.h2d_bytes == p.fetches * 2e6
    assert p.d2h_bytes == (micro_steps * 12 * 2e6 if full else 0)


def test_blocks_of_two_sizes_reuse_those_that_lie_at_the_turns() -> None:
    p = predict(layout([8, 8, 8, 8, 2, 2, 2, 2], outside=5), Workload(tokens=1), H200, window=1)
    assert (
        p.h2d_bytes == ((40 - 24) + (40 - 6)) * 2
    )  # forward starts with three of 8, backward with three of 2
    assert p.device_weight_bytes == (3 * 8 + 5) * 2  # slots fit the largest


def test_a_model_that_fits_the_ring_is_never_fetched_again() -> None:
    p = predict(uniform(3, 1e9), Workload(tokens=1), RTX4090, window=2)
    assert (p.fetches, p.slots, p.transfer_s, p.hidden) == (0, 3, 0.0, True)
    assert p.device_weight_bytes == p.model_bytes


def test_resident_units_are_spread_and_leave_the_link_to_the_others() -> None:
    assert spread(3, 12) == (2, 6, 10) and spread(0, 12) == () and spread(4, 4) == (0, 1, 2, 3)
    p = predict(uniform(12, 1e6, resident=4), Workload(tokens=1), H200, window=1)
    assert p.fetches == 2 * (8 - 3)
    assert p.device_weight_bytes == (3 + 4) * 2e6
    assert p.hidden_from_tokens == pytest.approx(9000 * (1 - 4 / 12))


def test_suggested_resident_units_hide_the_link_and_one_less_does_not() -> None:
    work = Workload(tokens=768)
    wanted = predict(LTX2, work, RTX3090, window=1).suggested_resident
    assert 0 < wanted < 48
    less, enough = (uniform(48, 0.395e9, 4096, resident=wanted - i) for i in (1, 0))
    assert [predict(m, work, RTX3090, window=1).hidden for m in (less, enough)] == [False, True]
    assert predict(WAN, Workload(tokens=32_760), H200, window=1).suggested_resident == 0


def test_backward_costs_two_forwards_for_lora_and_three_for_full_under_checkpointing() -> None:
    for full, checkpointing, ratio in [
        (False, True, 2),
        (True, True, 3),
        (False, False, 1),
        (True, False, 2),
    ]:
        work = Workload(tokens=32_760, checkpointing=checkpointing)
        p = predict(uniform(40, 0.35e9, 5120, full=full), work, H200, window=1)
        assert p.backward.compute_s == pytest.approx(ratio * p.forward.compute_s)
        assert (p.block_input_bytes > 0) == checkpointing


def test_a_full_finetune_waits_for_its_first_unit_its_gradients_and_the_cpu_optimizer() -> None:
    machine, model = (
        Machine(gb_s=50, tflops=450, host_gb_s=150),
        uniform(40, 0.35e9, 5120, full=True),
    )
    p = predict(model, Workload(tokens=32_760), machine, window=2)
    assert p.optimizer_s == pytest.approx(14e9 * 28 / 150e9)  # 2.6 s
    assert p.forward.floor_s == pytest.approx(p.forward.compute_s + 0.014)
    assert p.forward.hidden and p.backward.hidden
    slow = predict(model, Workload(tokens=100), machine, window=2)
    up, back = (40 - 4) * 0.014, 40 * 0.014
    assert slow.backward.transfer_s == pytest.approx((up + back) / 1.5)


def test_a_fixed_time_per_copy_counts_once_a_fetch() -> None:
    free, taxed = (
        predict(
            uniform(12, 1e6), Workload(tokens=1), Machine(gb_s=50, tflops=450, copy_us=c), window=1
        )
        for c in (0, 100)
    )
    assert taxed.transfer_s - free.transfer_s == pytest.approx(18 * 100e-6)


def test_the_layout_comes_from_names_alone() -> None:
    infos = read_model(CENSUS / "ltx2_19b.tsv.gz")
    found = layout_from_names(infos)
    assert len(found.units) == 48 and found.width == 4096
    assert sum(u.device_bytes for u in found.units) + found.fixed_bytes == 2 * sum(
        p.numel for p in infos
    )
    assert all(0 < u.device_bytes < 2 * u.numel for u in found.units)  # norms and tables stay
    flux = layout_from_names(
        read_model(CENSUS / "flux1_dev.tsv.gz"), full=True, host_bytes=1, resident=3
    )
    assert (
        len(flux.units) == 19 + 38
        and flux.width == 3072
        and sum(u.resident for u in flux.units) == 3
    )
    assert all(u.grad_bytes == u.device_bytes == 2 * u.host_bytes for u in flux.units)
    with pytest.raises(ConfigError, match="a model with blocks"):
        layout_from_names(p for p in infos if "blocks" not in p.name)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--tokens", "0"], "tokens=0"),
        (["--gb-s", "0"], "gb_s=0"),
        (["--resident", "49"], "[0, 48]"),
        (["--window", "0"], "window=0"),
    ],
)
def test_the_command_refuses_numbers_out_of_range(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {
        "--tokens": "768",
        "--gb-s": "24",
        "--tflops": "55",
        **dict(zip(arguments[::2], arguments[1::2], strict=True)),
    }
    command = [
        "predict",
        str(CENSUS / "ltx2_19b.tsv.gz"),
        *(word for pair in given.items() for word in pair),
    ]
    assert cli.main(command) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_the_command_prints_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "predict",
        str(CENSUS / "ltx2_19b.tsv.gz"),
        "--tokens",
        "768",
        "--gb-s",
        "24",
        "--tflops",
        "55",
    ]
    assert cli.main(command) == 0
    table = capsys.readouterr().out
    assert "exposed" in table and "3 slots, 0 of 48 units resident" in table
    assert cli.main([*command, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["fetches"] == 2 * (48 - 3) and values["hidden"] is False
    assert values["step_s"] == pytest.approx(
        values["forward"]["floor_s"] + values["backward"]["floor_s"]
    )
