"""The page, the quotes and the plots follow from the committed runs; the rehearsal goes through."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_layerlr import build_plan, cli
from dist_layerlr.plan import ParamInfo
from dist_layerlr.plan.config import load_config
from dist_layerlr.plan.depth import DEPTH_FUNCTIONS
from dist_layerlr.plan.presets import PRESET_CLASSES, PRESETS
from dist_layerlr.report.evidence import MEASURED, evidence_line
from tests.support.extras import needs_families

ROOT = Path(__file__).resolve().parents[3]
PARAMETERS = [ParamInfo(name=f"blocks.{i}.attn1.to_q.weight", shape=(4, 4)) for i in range(4)]


def line_of(**block: object) -> str | None:
    config = {"learning_rate": 1e-4, "per_layer_lr": {"enabled": True, **block}}
    return evidence_line(build_plan(PARAMETERS, config))


def test_a_plan_says_what_was_measured_of_each_of_its_choices() -> None:
    for name in ("linear", "layer_decay"):
        known = MEASURED.get(name, "not measured")
        line = line_of(depth_strategy=name, component_lr={})
        assert line == f"evidence (docs/evidence.md): {name}: {known}"
    line = line_of(depth_strategy="flat", component_lr={"self_attn": 1e-4, "ffn": 2e-4})
    assert line is not None and line.startswith("evidence (docs/evidence.md): component_lr: ")
    assert line_of(depth_strategy="flat", component_lr={}) is None
    assert evidence_line(build_plan(PARAMETERS, {"learning_rate": 1e-4})) is None


def test_plan_prints_the_line_below_the_grid_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = tmp_path / "model.tsv"
    names.write_text("".join(f"{one.name}\t4,4\n" for one in PARAMETERS))
    config = tmp_path / "config.json"
    block = {"enabled": True, "depth_strategy": "cosine", "component_lr": {}}
    config.write_text(json.dumps({"learning_rate": 1e-4, "per_layer_lr": block}))
    command = ["plan", str(names), "--config", str(config)]
    assert cli.main(command) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert last == line_of(depth_strategy="cosine", component_lr={})
    for form in ("--json", "--csv"):
        assert cli.main([*command, form]) == 0
        assert "evidence" not in capsys.readouterr().out


def test_a_region_of_another_strategy_is_named_too() -> None:
    region = {"match": "blocks.0", "depth_strategy": "layer_decay"}
    line = line_of(depth_strategy="flat", component_lr={}, regions=[region])
    assert line is not None and "layer_decay: " in line
    assert "flat: " not in line


def test_quotes_have_the_names_of_strategies_presets_and_fields() -> None:
    known = {*DEPTH_FUNCTIONS, "layer_decay", *PRESETS, *PRESET_CLASSES}
    known |= {"component_lr", "lora_plus_ratio", "advise"}
    assert MEASURED.keys() <= known


@needs_families
def test_every_choice_of_a_config_has_a_row_in_the_table() -> None:
    from evidence_report import NAMES

    known = {*DEPTH_FUNCTIONS, "layer_decay", *PRESETS, *PRESET_CLASSES} - {"flat"}
    assert NAMES.keys() == known | {"component_lr", "lora_plus_ratio", "advise"}


@needs_families
def test_page_and_quotes_are_those_of_the_committed_runs() -> None:
    import does_it_help
    import evidence_quotes
    from evidence_report import analyse, page

    analyses, results = [], {}
    for name, study in does_it_help.STUDIES.items():
        file = does_it_help.file_of(ROOT, name)
        if not file.exists():
            continue
        results[name] = json.loads(file.read_text(encoding="utf-8"))
        assert results[name]["fingerprint"] == study.fingerprint(False), f"run {name} again"
        analyses.append(analyse(study, does_it_help.read(results[name])))
        assert file.with_suffix(".png").exists()
    assert results, "no study's runs are committed"
    say = "run `python benchmarks/does_it_help.py --report` and commit what it wrote"
    assert (ROOT / "docs/evidence.md").read_text(encoding="utf-8") == page(
        analyses, results, does_it_help.waiting(results)
    ), say
    for file, text in evidence_quotes.quotes(analyses).items():
        assert (ROOT / file).read_text(encoding="utf-8") == text, say


@needs_families
def test_every_arm_plans_rates_that_its_base_rate_scales() -> None:
    """Twice the base rate is twice every rate: else a sweep would sweep something else."""
    import does_it_help
    import evidence_lm
    import evidence_vit
    import evidence_wan
    from dist_layerlr import plan_model

    models = {"vit": evidence_vit.make_vit(0), "wan": evidence_wan.make_wan(0)}
    models["lm"] = evidence_lm.make_llama(0)
    of = dict.fromkeys(("depth", "lora", "word", "advise_depth"), "wan") | {"blockwise": "lm"}
    for study in does_it_help.STUDIES.values():
        model = models[of.get(study.name, "vit")]
        for arm in study.arms:
            once, twice = (plan_model(model, arm.config(rate)) for rate in (1e-3, 2e-3))
            assert once.entries.keys() == twice.entries.keys()
            assert any(entry.lr > 0 for entry in once.entries.values())
            for name, entry in once.entries.items():
                assert twice.entries[name].lr == pytest.approx(2 * entry.lr), f"{arm.name}: {name}"
            load_config(arm.config(1e-3))


def rehearse(out: Path, *arguments: str) -> Path:
    """Run the rehearsal; return the folder of its results."""
    command = [sys.executable, "benchmarks/does_it_help.py", "--quick", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return out / "benchmarks" / "results"


@needs_families
def test_seeds_are_shared_out_among_processes(tmp_path: Path) -> None:
    results = rehearse(tmp_path, "--only", "surgical_labels", "--workers", "2")
    result = json.loads((results / "evidence_surgical_labels.json").read_text())
    assert result["seeds"] == [0, 1, 2]


@needs_families
def test_the_rehearsal_of_all_studies_writes_results_plots_and_page(tmp_path: Path) -> None:
    # In one process: each worker would import torch and diffusers anew for every study.
    results = rehearse(tmp_path, "--workers", "1")
    names = sorted(path.stem.removeprefix("evidence_") for path in results.glob("*.json"))
    assert names == [
        "advise_depth",
        "advise_layer_decay",
        "blockwise",
        "depth",
        "layer_decay",
        "lora",
        "surgical_input",
        "surgical_labels",
        "word",
    ]
    for name in names:
        # A picture of some hundred pixels each way, and not an empty frame.
        assert (results / f"evidence_{name}.png").stat().st_size > 10_000
        result = json.loads((results / f"evidence_{name}.json").read_text())
        assert result["seeds"] == [0, 1, 2]
    assert (results / "evidence_depth_samples.png").stat().st_size > 10_000
    text = (tmp_path / "docs" / "evidence.md").read_text()
    assert text.count("3 seeds, 3 rates per arm") == 9
