"""The command line in process: every kind of MODEL, every bad input one line on stderr and status
2."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from dist_layerlr import build_plan
from dist_layerlr.cli import main
from dist_layerlr.plan.read import parse_shape, read_model
from tests.support import census

CONFIG = {
    "model_type": "toy",
    "per_layer_lr": {
        "enabled": True,
        "component_lr": {"self_attn": 4e-4, "cross_attn": 2e-4, "ffn": 3e-4, "norm": 5e-5},
        "default_lr": 1e-4,
    },
}
PARTS = {
    "attn1.to_q.weight": (4, 4),
    "attn2.to_q.weight": (4, 4),
    "ffn.net.2.weight": (8, 4),
    "norm1.weight": (4,),
}
TOY = {f"blocks.{i}.{part}": shape for i in range(3) for part, shape in PARTS.items()} | {
    "proj_out.weight": (2, 4)
}


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def tsv(shapes: dict) -> str:
    return "".join(f"{name}\t{'x'.join(map(str, shape))}\n" for name, shape in shapes.items())


def write_safetensors(path: Path, shapes: dict) -> None:
    """A file of zeros, written byte by byte: 8 bytes of header length, JSON, data."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


def write_sharded(folder: Path, shapes: dict, stem: str = "diffusion_pytorch_model") -> None:
    """Two shards and an index, as save_pretrained writes them."""
    names = list(shapes)
    weight_map = {}
    for shard, chosen in enumerate((names[::2], names[1::2]), 1):
        file = f"{stem}-0000{shard}-of-00002.safetensors"
        write_safetensors(folder / file, {name: shapes[name] for name in chosen})
        weight_map |= dict.fromkeys(chosen, file)
    (folder / f"{stem}.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def plan_json(capsys, model: Path | str, config: str, *extra: str) -> dict:
    assert main(["plan", str(model), "--config", config, "--json", *extra]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return json.loads(shown.out)


def refused(capsys, *argv: object) -> str:
    """The one line that a bad call prints."""
    assert main([str(a) for a in argv]) == 2
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert shown.out == "" and len(lines) == 1 and lines[0].startswith("dist-layerlr: error: "), (
        lines
    )
    return lines[0]


# Kinds of MODEL


def test_a_tsv_with_or_without_header_further_columns_and_gz(tmp_path: Path, config: str, capsys):
    expected = build_plan(TOY, CONFIG).digest
    wide = "name\tshape\tmore\n" + "".join(f"{line}\tx\ty\n" for line in tsv(TOY).splitlines())
    for name, text in {
        "a.tsv": tsv(TOY),
        "b.tsv": wide,
        "c.txt": tsv(TOY).replace("\n", "\r\n") + "\n",
    }.items():
        (tmp_path / name).write_text(text, newline="")
        assert plan_json(capsys, tmp_path / name, config)["digest"] == expected
    with gzip.open(tmp_path / "d.tsv.gz", "wt") as file:
        file.write(wide)
    assert plan_json(capsys, tmp_path / "d.tsv.gz", config)["digest"] == expected


def test_a_census_file_is_a_model(config: str, capsys):
    data = plan_json(capsys, census.FOLDER / "z_image.tsv.gz", config)
    assert data["digest"] == build_plan(census.shapes("z_image"), CONFIG).digest


def test_an_adapter_needs_its_base_when_names_are_flattened(config: str, capsys):
    lora, base = census.FOLDER / "sd15.kohya.tsv.gz", census.FOLDER / "sd15.tsv.gz"
    data = plan_json(capsys, lora, config, "--base", str(base))
    assert len(data["parameters"]) == 556
    assert "--base" in refused(capsys, "plan", lora, "--config", config)


def test_names_from_stdin(config: str, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(tsv(TOY)))
    assert plan_json(capsys, "-", config)["digest"] == build_plan(TOY, CONFIG).digest


def test_a_safetensors_file_is_read_by_its_header(tmp_path: Path, config: str, capsys):
    write_safetensors(tmp_path / "model.safetensors", TOY)
    assert (
        plan_json(capsys, tmp_path / "model.safetensors", config)["digest"]
        == build_plan(TOY, CONFIG).digest
    )


def test_a_folder_with_an_index_one_file_or_unlisted_shards(tmp_path: Path, config: str, capsys):
    expected = build_plan(TOY, CONFIG).digest
    write_sharded(tmp_path / "sharded", TOY)
    write_safetensors(tmp_path / "sharded" / "left_over.safetensors", {"other.weight": (1,)})
    write_safetensors(tmp_path / "single" / "model.safetensors", TOY)
    write_safetensors(tmp_path / "single" / "model.fp16.safetensors", TOY)
    write_sharded(tmp_path / "bare", TOY)
    (tmp_path / "bare" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    for folder in ("sharded", "single", "bare"):
        assert plan_json(capsys, tmp_path / folder, config)["digest"] == expected


def test_a_pipeline_with_one_transformer_has_bare_names_and_with_two_prefixed_ones(
    tmp_path: Path, config: str, capsys
):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one / "transformer", two / "transformer", two / "transformer_2"):
        write_sharded(folder, TOY)
    for folder in (one, two):
        write_safetensors(
            folder / "vae" / "diffusion_pytorch_model.safetensors", {"vae.weight": (1,)}
        )
    assert plan_json(capsys, one, config)["digest"] == build_plan(TOY, CONFIG).digest
    rows = plan_json(capsys, two, config)["parameters"]
    assert rows.keys() == {
        f"{part}.{name}" for part in ("transformer", "transformer_2") for name in TOY
    }
    assert {row["stack"] for row in rows.values()} == {
        "transformer.blocks",
        "transformer_2.blocks",
        None,
    }
    assert {row["blocks"] for row in rows.values()} == {3, None}


def test_a_checkpoint_saved_from_ddp_loses_its_prefix(tmp_path: Path, config: str, capsys):
    (tmp_path / "m.tsv").write_text(tsv({f"module.{name}": shape for name, shape in TOY.items()}))
    assert plan_json(capsys, tmp_path / "m.tsv", config)["digest"] == build_plan(TOY, CONFIG).digest


def test_kohya_alphas_are_constants(tmp_path: Path):
    (tmp_path / "m.tsv").write_text("a.to_q.lora_down.weight\t4x8\na.to_q.alpha\t\nb.alpha\t8\n")
    assert [info.trainable for info in read_model(tmp_path / "m.tsv")] == [True, False, True]


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("4x8", (4, 8)),
        ("4,8", (4, 8)),
        ("(4, 8)", (4, 8)),
        ("[4, 8]", (4, 8)),
        ("(4,)", (4,)),
        ("8", (8,)),
    ]
    + [("", ()), ("-", ()), ("()", ()), ("[]", ()), (" 4 x 8 ", (4, 8)), ("0x3", (0, 3))],
)
def test_shapes_are_read_in_every_usual_spelling(text: str, shape: tuple[int, ...]):
    assert parse_shape(text) == shape


@pytest.mark.parametrize("text", ["4x", "x4", "four", "4.0", "4x8?", "-4x8", "4x-1"])
def test_other_shapes_are_refused(text: str):
    with pytest.raises(ValueError):
        parse_shape(text)


# Commands


def test_plan_prints_the_grid_json_or_csv(tmp_path: Path, config: str, capsys):
    (tmp_path / "m.tsv").write_text(tsv(TOY))
    assert main(["plan", str(tmp_path / "m.tsv"), "--config", config]) == 0
    text = capsys.readouterr().out
    assert (
        text.startswith("[per_layer_lr] model_type=toy strategy=linear")
        and "blocks.000-002.cross_attn" in text
    )
    assert main(["plan", str(tmp_path / "m.tsv"), "--config", config, "--grid", "full"]) == 0
    assert "blocks.002.cross_attn" in capsys.readouterr().out
    assert main(["plan", str(tmp_path / "m.tsv"), "--config", config, "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    plan = build_plan(TOY, CONFIG)
    assert [row["name"] for row in rows] == list(plan.entries)
    for row, entry in zip(rows, plan.entries.values(), strict=True):
        assert (float(row["lr"]), float(row["factor"]), int(row["numel"])) == (
            entry.lr,
            entry.factor,
            entry.numel,
        )
        assert (row["stack"], row["block"]) == (
            (entry.stack, str(entry.block)) if entry.stack else ("", "")
        )


def test_explain_prints_one_parameter(tmp_path: Path, config: str, capsys):
    (tmp_path / "m.tsv").write_text(tsv(TOY))
    assert (
        main(["explain", str(tmp_path / "m.tsv"), "blocks.2.attn2.to_q.weight", "--config", config])
        == 0
    )
    out = capsys.readouterr().out
    assert (
        out.startswith("blocks.2.attn2.to_q.weight\n")
        and "cross_attn" in out
        and "block 2 of 3" in out
    )


def test_plot_writes_a_picture(tmp_path: Path, config: str, capsys):
    pytest.importorskip("matplotlib", reason="needs the plot extra")
    (tmp_path / "m.tsv").write_text(tsv(TOY))
    output = tmp_path / "grid.png"
    assert main(["plot", str(tmp_path / "m.tsv"), "--config", config, "--output", str(output)]) == 0
    assert output.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert capsys.readouterr().out == f"wrote {output}\n"


# Bad input


def test_bad_models_are_one_line_with_status_2(tmp_path: Path, config: str, capsys):
    def refuse(model: object, *parts: str) -> None:
        line = refused(capsys, "plan", model, "--config", config)
        assert [part for part in parts if part not in line] == [], line

    refuse(tmp_path / "nowhere", "nowhere", "no such file")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "empty", "No .safetensors file")
    write_safetensors(tmp_path / "whole.safetensors", TOY)
    whole = (tmp_path / "whole.safetensors").read_bytes()
    for i, damaged in enumerate((whole[:-1], whole[:40], b"", b"\xff" * 64)):
        (tmp_path / f"cut{i}.safetensors").write_bytes(damaged)
        refuse(tmp_path / f"cut{i}.safetensors", f"cut{i}.safetensors", "truncated")
    write_sharded(tmp_path / "half", TOY)
    (tmp_path / "half" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    refuse(tmp_path / "half", "half", "lacks 'diffusion_pytorch_model-00002-of-00002.safetensors'")
    (tmp_path / "text.tsv").write_text("a.weight\t4x4\nno tab here\n")
    refuse(tmp_path / "text.tsv", "line 2 of", "'no tab here'", "name<TAB>shape")
    (tmp_path / "shape.tsv").write_text("a.weight\tfour\n")
    refuse(tmp_path / "shape.tsv", "line 1 of")
    (tmp_path / "nothing.tsv").write_text("name\tshape\n")
    refuse(tmp_path / "nothing.tsv", "no parameters")
    (tmp_path / "twice.tsv").write_text("a.weight\t4\na.weight\t4\n")
    refuse(tmp_path / "twice.tsv", "'a.weight' is listed twice")
    (tmp_path / "model.bin").write_bytes(b"\x80\x02\xff\xfe")
    refuse(tmp_path / "model.bin", "model.bin", "name<TAB>shape")
    (tmp_path / "plain.gz").write_text("a.weight\t4\n")
    refuse(tmp_path / "plain.gz", "plain.gz")


@pytest.mark.parametrize(
    "text",
    ["{", "{}", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}'],
)
def test_a_damaged_index_is_one_line_with_status_2(tmp_path: Path, config: str, capsys, text: str):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors.index.json").write_text(text)
    refused(capsys, "plan", tmp_path / "model", "--config", config)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "not JSON"),
        ('{"per_layer_lr": {"enabled": true, "min_depth_factor": 1.3}}', "min_depth_factor=1.3"),
        ('{"per_layer_lr": {"enabled": true, "default_lr": NaN}}', "default_lr=nan"),
        ('{"per_layer_lr": {"enabled": true, "default_lr": 1' + "0" * 400 + "}}", "default_lr"),
        ('{"per_layer_lr": {"enabled": true, "unmatched": "error"}}', "proj_out.weight"),
        (
            '{"per_layer_lr": {"enabled": true, "regions": [{"match": "blocks.[3-0]", "lr": 1}]}}',
            "blocks.[3-0]",
        ),
        (
            (
                '{"per_layer_lr": {"enabled": true, "patterns": [{"match": "blocks.[", "component":'
                ' "ffn"}]}}'
            ),
            "blocks.[",
        ),
    ],
)
def test_bad_configs_are_one_line_with_status_2(tmp_path: Path, capsys, text: str, part: str):
    (tmp_path / "m.tsv").write_text(tsv(TOY))
    (tmp_path / "bad.json").write_text(text)
    assert part in refused(capsys, "plan", tmp_path / "m.tsv", "--config", tmp_path / "bad.json")


def test_missing_configs_and_unknown_names_are_one_line_with_status_2(
    tmp_path: Path, config: str, capsys
):
    (tmp_path / "m.tsv").write_text(tsv(TOY))
    assert "nowhere.json" in refused(
        capsys, "plan", tmp_path / "m.tsv", "--config", tmp_path / "nowhere.json"
    )
    line = refused(
        capsys, "explain", tmp_path / "m.tsv", "blocks.2.attn2.to_k.weight", "--config", config
    )
    assert "Nearest: blocks.2.attn2.to_q.weight" in line
    assert "nowhere" in refused(
        capsys, "plan", tmp_path / "m.tsv", "--config", config, "--base", tmp_path / "nowhere"
    )


def test_a_picture_that_cannot_be_written_is_one_line_with_status_2(
    tmp_path: Path, config: str, capsys
):
    pytest.importorskip("matplotlib", reason="needs the plot extra")
    (tmp_path / "m.tsv").write_text(tsv(TOY))
    for output in ("nowhere/grid.png", "grid.xyz"):
        line = refused(
            capsys, "plot", tmp_path / "m.tsv", "--config", config, "--output", tmp_path / output
        )
        assert output in line


def test_bad_flags_end_with_status_2(capsys):
    for argv in ([], ["plan"], ["draw", "m"], ["plan", "m", "--config", "c", "--json", "--csv"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
        capsys.readouterr()


# No torch


def test_importing_the_package_and_planning_leave_torch_alone(tmp_path: Path, config: str):
    (tmp_path / "m.tsv").write_text(tsv(TOY))
    code = (
        "import sys, dist_layerlr\nfrom dist_layerlr import build_plan, explain, grid,"
        " load_config, read_model, register_depth\nfrom dist_layerlr.cli import main\nassert"
        f" main(['plan', {str(tmp_path / 'm.tsv')!r}, '--config', {config!r}]) == 0\nheavy ="
        " {'torch', 'numpy', 'deepspeed', 'accelerate', 'safetensors', 'matplotlib'} &"
        " set(sys.modules)\nassert not heavy, heavy\n"
    )
    root = Path(__file__).resolve().parents[3]
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("[per_layer_lr] model_type=toy")
