"""Traces of a step: what they hold, on the clock of the device, and what the counters say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_layerlr.errors import ConfigError, OffloadError
from dist_layerlr.offload.streaming import stream_on
from dist_layerlr.report import draw_step
from tests.support.families import BLOCKS
from tests.support.training import Case, attach, loss_of

LORA, FULL = Case(lora=True), Case(lora=False)


def _traced(case: Case, backend: Any, device: str, path: Path) -> tuple[list[Any], Any]:
    """The work of one step, and the counters of that step."""
    model = case.model()
    with stream_on(backend, model, case.policy()) as handle:
        loss_of(model, case, 0, device).backward()
        backend.synchronize()
        handle.stats()
        with handle.trace(path):
            loss_of(model, case, 1, device).backward()
        stats = handle.stats().recent
        loss_of(model, case, 2, device).backward()  # is in no trace
    return json.loads(path.read_text())["traceEvents"], stats


def _pieces(events: list[Any], kind: str) -> list[Any]:
    return [e for e in events if e.get("cat") == kind]


@pytest.mark.parametrize("case", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_a_trace_has_each_copy_and_each_visit_of_a_unit(case: Case, device: str, tmp_path: Path):
    from dist_layerlr.offload.device import choose

    if device == "sim":
        from tests.support.races import Detector

        backend: Any = Detector(kernel_ms=1.0, copy_ms=5.0)
    else:
        backend = choose("cpu")
    events, stats = _traced(case, backend, device, tmp_path / "trace.json")
    copies, gradients = _pieces(events, "copy"), _pieces(events, "gradients")
    assert len(copies) == stats.fetches and sum(e["args"]["bytes"] for e in copies) == (
        stats.h2d_bytes
    )
    assert len(gradients) == (0 if case.lora else BLOCKS)
    assert sum(e["args"]["bytes"] for e in gradients) == stats.d2h_bytes
    visits = [(e["name"], e["args"]["backward"]) for e in _pieces(events, "compute")]
    forward = [(f"blocks.{i}", False) for i in range(BLOCKS)]
    backward = [(f"blocks.{i}", True) for i in reversed(range(BLOCKS))]
    assert visits == forward + backward
    assert sum(e["dur"] for e in copies) == pytest.approx(stats.h2d_s * 1e6)
    if device == "sim":
        # Each copy takes 5 ms, so compute waits; gradients are five copies of 5 ms each.
        assert {round(e["dur"]) for e in copies} == {5000}
        assert {round(e["dur"]) for e in gradients} <= {25000}
        waits = _pieces(events, "wait")
        assert len(waits) == stats.stalls
        assert sum(e["dur"] for e in waits) == pytest.approx(stats.stall_s * 1e6)
        assert stats.overlap == pytest.approx(1 - stats.stall_s / stats.h2d_s)
        assert stats.h2d_gb_s == pytest.approx(stats.h2d_bytes / (stats.fetches * 5e-3) / 1e9)
        backend.races.check()


@pytest.mark.parametrize(
    "name, wrong",
    [("trace.txt", "must end in .json"), ("no/x.json", "Make"), ("folder.json", "Is a directory")],
)
def test_a_trace_that_cannot_be_written_is_refused_before_the_step(
    name: str, wrong: str, tmp_path: Path
):
    (tmp_path / "folder.json").mkdir()
    with attach(LORA.model(), LORA, "cpu") as handle:
        with pytest.raises(OffloadError, match=wrong):
            with handle.trace(tmp_path / name):
                raise AssertionError


def test_a_trace_is_drawn_as_a_picture(tmp_path: Path):
    from matplotlib.image import imread

    from dist_layerlr.offload.device import choose

    _traced(FULL, choose("cpu"), "cpu", tmp_path / "trace.json")
    draw_step(tmp_path / "trace.json", tmp_path / "step.png")
    pixels = imread(tmp_path / "step.png")
    assert pixels.shape[1] == 1200
    found = {tuple(round(255 * float(v)) for v in pixel) for row in pixels for pixel in row[:, :3]}
    # Forward, backward, and copies; gradients have the colours of copies.
    assert {(68, 119, 170), (102, 204, 238), (34, 136, 51)} <= found


@pytest.mark.parametrize(
    "text, wrong",
    [
        ("{", "Cannot read trace"),
        ("[]", "Cannot read trace"),
        ('{"traceEvents": []}', "no unit was streamed"),
    ],
)
def test_a_trace_without_work_is_not_drawn(text: str, wrong: str, tmp_path: Path):
    (tmp_path / "trace.json").write_text(text)
    with pytest.raises(ConfigError, match=wrong):
        draw_step(tmp_path / "trace.json", tmp_path / "step.png")
    with pytest.raises(ConfigError, match="must end in .png"):
        draw_step(tmp_path / "trace.json", tmp_path / "step.jpg")
