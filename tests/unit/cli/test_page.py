"""The HTML page: what stands in it, and how it looks in a real browser."""

from __future__ import annotations

import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from dist_layerlr import Plan, build_plan, read_model
from dist_layerlr.cli import main
from dist_layerlr.report.page import page, plan_data, write_page
from tests.support.browser import look, needs_browser
from tests.support.jobs import ROOT
from tests.support.plans import config

CENSUS = ROOT / "tests" / "census"
CONFIGS = ROOT / "launch" / "configs"
MODELS = {
    "sd15": "sd15",
    "ltx2_19b": "ltx2",
    "flux2_klein_4b": "flux_2_klein_4b",
    "rfdetr_base": "rfdetr",
}


def large() -> dict[str, tuple[int, ...]]:
    """Two stacks of 60 blocks under long names, and names outside."""
    parts = ("attn.to_q", "attn.add_q_proj", "ff.net.0.proj", "norm1.linear")
    stacks = ("dual_stream_transformer_blocks", "single_stream_transformer_blocks")
    names = [f"{s}.{i}.{p}.weight" for s in stacks for i in range(60) for p in parts]
    return dict.fromkeys([*names, "proj_out.weight", "x_embedder.weight"], (8, 8))


def shipped(model: str) -> Plan:
    """The plan of a published model by the config that is shipped for it."""
    names = read_model(str(CENSUS / f"{model}.tsv.gz"))
    return build_plan(names, str(CONFIGS / f"{MODELS[model]}.json"))


def png(width: int, height: int) -> bytes:
    """A white picture."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\xff" * width) * height)
    ends = chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + ends


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 200 steps on the large model, as the trainer writes it."""
    folder = tmp_path_factory.mktemp("runs") / "a_run_with_a_name_that_is_longer_than_most"
    (folder / "samples").mkdir(parents=True)
    plan = build_plan(large(), config())
    (folder / "plan.json").write_text(plan.to_json())
    cells = sorted({c["name"] for p in plan_data(plan)["panels"] for c in p["cells"]})
    lines = []
    for step in range(200):
        row: dict[str, Any] = {"step": step, "loss": None if step == 7 else 2.0 / (step + 1)}
        row |= {"lr_factor": 1 - step / 200, "samples_per_s": 3.5, "peak_memory_gb": 7.25}
        if step % 2 == 0:
            values = {c: [1e-4, 1e-3 * (step + n + 1), 4.0, 1e-4] for n, c in enumerate(cells)}
            row["cells"] = {**values, cells[0]: [1e-4, None, 0.0, None]}
        lines.append(json.dumps(row))
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 200, "lo']))
    settings = {"train": {"steps": 200}, "model_path": "/a/path/" + "that_goes_on" * 20}
    start = {"config": settings, "command": ["python"], "versions": {"torch": "2.13.0"}}
    before = {**start, "config": {**settings, "train": {"steps": 100}}}
    (folder / "run.json").write_text(json.dumps({"starts": [before, start]}))
    proof = {"sharder": "fsdp2", "ranks": 2, "trial": "AdamW </script><b>"}
    (folder / "verify.json").write_text(json.dumps({"start": proof, "end": proof}))
    for name in ("step_000100", "samples"):
        (folder / "samples" / f"{name}.png").write_bytes(png(900, 200))
    write_page(folder / "page.html", folder, f"Run {folder.name}")
    return folder


def data_of(path: Path) -> dict[str, Any]:
    (text,) = re.findall(r'id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    found: dict[str, Any] = json.loads(text)
    return found


def test_a_page_loads_nothing_and_holds_what_it_shows(run: Path) -> None:
    text = (run / "page.html").read_text()
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in text and not re.search(r"<link|src=\"(?!data:)|@import", text)
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    assert len(text) < 2_000_000


def test_a_runs_page_has_its_curves_pictures_proof_and_what_changed(run: Path) -> None:
    data = data_of(run / "page.html")
    assert [len(data[key]) for key in ("loss", "frames", "samples")] == [200, 60, 2]
    assert (data["frames"][0]["step"], data["frames"][-1]["step"]) == (0, 198)
    assert data["loss"][7] == [7, None]
    rate = next(one for one in data["rates"] if one["name"] == "ffn")
    assert rate["points"][100][1] == pytest.approx(rate["points"][0][1] / 2)
    tables = {title: rows for title, _, _, rows in data["tables"]}
    assert tables["Changed since the last run"] == [["train.steps", "100", "200"]]
    assert ["sharder", "fsdp2"] in tables["Proof, end"]
    assert ["version torch", "2.13.0"] in tables["Machine and versions"]
    assert ["peak memory, GiB", "7.25"] in tables["Machine and versions"]


def test_a_plans_cells_say_rule_and_every_factor() -> None:
    regions = [{"match": "blocks.1", "lr_multiplier": 0.5}]
    settings = config(component_lr={"ffn": 2e-4}, regions=regions, depth_strategy="flat")
    plan = build_plan({f"blocks.{i}.ffn.net.weight": (4, 8) for i in range(3)}, settings)
    (panel,) = plan_data(plan)["panels"]
    cell = panel["cells"][1]
    assert (cell["name"], cell["lr"], cell["numel"]) == ("blocks.001.ffn", 1e-4, 32)
    said = "\n".join(cell["lines"])
    assert "lr 0.000100 = depth factor 1 x base 0.0002 x region 0.5" in said
    assert "blocks.1.ffn.net.weight" in said and "rule: segment 'ffn'" in said


def test_a_unets_nine_blocks_are_one_panel() -> None:
    panels = plan_data(shipped("sd15"))["panels"]
    assert [(p["blocks"], p["outside"]) for p in panels] == [(9, False), (1, True)]


def test_text_of_a_file_cannot_end_the_script_or_open_a_tag() -> None:
    text = page({"summary": "</script><script>alert(1)</script>{{css}}"}, "<b>{{data}}")
    assert text.count("<script") == 2 and "<b>" not in text
    assert "{{css}}" in text and "{{data}}" in text, "what is put in is not searched for marks"


def test_plot_writes_pages_of_runs_and_models(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plot", str(run), "--html"]) == 0
    assert capsys.readouterr().out == "wrote page.html\n"
    assert data_of(tmp_path / "page.html") == data_of(run / "page.html")
    for args, said in (
        ([str(run)], "Missing --config FILE"),
        ([str(tmp_path), "--html"], "holds no plan.json"),
        ([str(run), "--html", "--output", "page.png"], "must end in .html"),
        ([str(run), "--html", "--output", "nowhere/page.html"], "Cannot write page"),
    ):
        assert main(["plot", *args]) == 2
        assert said in capsys.readouterr().err


def test_what_is_damaged_in_a_runs_folder_is_left_out_of_its_page(tmp_path: Path) -> None:
    plan = json.loads(build_plan({"blocks.0.ffn.weight": (4, 8)}, config()).to_json())
    for row in plan["parameters"].values():
        del row["factor"]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    (tmp_path / "run.json").write_text('{"starts": 5, "previous": [1]}')
    (tmp_path / "verify.json").write_text('{"start": 5}')
    lines = [
        b'{"step": 0, "loss": 2.0}',
        b"\xff\xfe\0",
        b'{"loss": 1.0}',
        b'{"step": 1, "loss": 1.0, "cells": 5}',
        b'{"step": 2, "loss": NaN}',
        b'{"step": 2, "val_loss": 1.5, "val_loss/0.1": 1.5}',
    ]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    write_page(tmp_path / "page.html", tmp_path, "Run")
    data = data_of(tmp_path / "page.html")
    assert (data["loss"], data["frames"]) == ([[0, 2.0], [2, None]], [])
    assert data["held"] == [[2, 1.5]]
    assert [title for title, *_ in data["tables"]] == ["Machine and versions"]
    assert "depth factor" not in "".join(data["panels"][0]["cells"][0]["lines"])


@needs_browser
@pytest.mark.parametrize("width", [1200, 700])
def test_nothing_of_a_runs_page_overlaps_or_is_cut(run: Path, width: int) -> None:
    found = look(run / "page.html", width=width)
    assert found["problems"] == [] and found["texts"] > 100


@needs_browser
@pytest.mark.parametrize("model", [*MODELS, "large"])
def test_nothing_of_a_models_page_overlaps_or_is_cut(model: str, tmp_path: Path) -> None:
    plan = build_plan(large(), config()) if model == "large" else shipped(model)
    write_page(tmp_path / "page.html", plan, f"Learning rates of {model}")
    assert look(tmp_path / "page.html")["problems"] == []


@needs_browser
def test_the_check_sees_what_is_cut_and_what_overlaps(run: Path) -> None:
    text = (run / "page.html").read_text()
    for change, said in (
        (("LABEL = 120", "LABEL = 30"), "leaves its drawing"),
        (("ROW = 22", "ROW = 9"), "overlaps"),
        (("overflow-wrap: anywhere", "white-space: nowrap"), "window"),
    ):
        assert change[0] in text
        (run / "worse.html").write_text(text.replace(*change))
        problems = look(run / "worse.html")["problems"]
        assert any(said in problem for problem in problems), (change, problems[:3])


@needs_browser
def test_the_slider_repaints_and_a_cell_says_its_factors(run: Path) -> None:
    script = """
    const rects = document.querySelectorAll("section:nth-of-type(2) rect");
    const last = document.querySelectorAll("section:nth-of-type(2) rect")[9];
    const input = document.querySelector("input[type=range]"), label = input.previousElementSibling;
    found.before = [label.textContent, last.style.fill];
    input.value = 0;
    input.dispatchEvent(new Event("input"));
    found.after = [label.textContent, last.style.fill];
    const cell = document.querySelector("section rect"), tip = document.getElementById("tip");
    cell.dispatchEvent(new MouseEvent("mousemove", { clientX: 1190, clientY: 10 }));
    found.tip = [tip.textContent, tip.hidden, tip.getBoundingClientRect().right <= innerWidth];
    """
    found = look(run / "page.html", script)
    assert found["before"][0] == "after step 199" and found["after"][0] == "after step 1"
    assert found["before"][1] != found["after"][1]
    text, hidden, inside = found["tip"]
    assert "depth factor" in text and "parameters" in text and not hidden and inside
