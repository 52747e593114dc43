"""What every command has: examples and statuses in its help, and JSON."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dist_layerlr.cli import doctor, main
from dist_layerlr.cli.doctor import BAD, Examination, Row
from dist_layerlr.cli.program import make_parser
from dist_layerlr.plan.training_config import SCHEMA_FILE

COMMANDS = (
    *("plan", "explain", "plot", "predict", "diff", "export"),
    *("audit", "convert", "schema", "doctor", "advise", "completion"),
)
CONFIG = {"per_layer_lr": {"enabled": True, "component_lr": {"self_attn": 4e-4}}}
NAME = "blocks.0.attn1.to_q.weight"


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "names.tsv"
    path.write_text("".join(f"blocks.{i}.attn1.to_q.weight\t4x4\n" for i in range(2)))
    return str(path)


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text("per_layer_lr: {enabled: true, component_lr: {self_attn: 4e-4}}")
    return str(path)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_and_every_exit_status(command: str, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert "exit status:\n  0  " in said and "  2  an error, said in one line" in said
    assert ("--json" in said) is (command != "completion")  # which prints no table
    examples = said.partition("\nexamples:\n")[2].splitlines()
    assert examples and all(line.startswith(f"  dist-layerlr {command}") for line in examples)
    for line in examples:
        words = shlex.split(line.partition(" > ")[0])
        assert make_parser().parse_args(words[1:]).run is not None, line


def test_the_programs_own_help_ends_with_examples_and_names_each_status_that_a_command_has(capsys):
    def help_of(*words: str) -> str:
        with pytest.raises(SystemExit):
            main([*words, "--help"])
        return capsys.readouterr().out

    def statuses(text: str) -> set[str]:
        return set(re.findall(r"^  (\d)  ", text.partition("exit status:")[2], re.MULTILINE))

    own = help_of()
    assert set().union(*(statuses(help_of(name)) for name in COMMANDS)) == statuses(own)
    for status in "14":
        (line,) = re.findall(rf"^  {status}  (.*)$", own, re.MULTILINE)
        named = set(re.findall(r"(\w+): ", line))
        assert named == {c for c in COMMANDS if status in statuses(help_of(c))}
    assert re.search(r"\nexamples:\n(  dist-layerlr .*\n)+\Z", own)


def test_the_process_ends_with_the_statuses_that_the_help_names(
    model: str, config: str, tmp_path: Path
):
    other = tmp_path / "other.yaml"
    other.write_text("per_layer_lr: {enabled: true, component_lr: {self_attn: 1e-3}}")
    cases = {
        0: ["diff", config, config, "--model", model],
        1: ["diff", config, str(other), "--model", model],
        2: ["plan", model, "--config", "absent.json"],
    }
    for status, words in cases.items():
        done = subprocess.run(
            [sys.executable, "-m", "dist_layerlr.cli", *words], capture_output=True, text=True
        )
        assert done.returncode == status, done.stderr
        assert (done.stderr.count("\n") == 1) is (status == 2)


def test_completion_is_refused_with_the_line_that_installs_what_it_needs(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    said = capsys.readouterr().err
    assert said.endswith("Run: pip install 'dist_layerlr[completion]'\n") and "shtab" in said


def test_doctor_prints_its_report_first_whatever_deepspeed_logs(monkeypatch):
    environment = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"}
    done = subprocess.run(
        [sys.executable, "-m", "dist_layerlr.cli", "doctor", "--json"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert json.loads(done.stdout)["rows"][0]["what"] == "python"


@pytest.mark.parametrize(
    ("words", "program"),
    [
        (["plna", "model"], "dist-layerlr"),
        (["plan", "model", "--grid", "wide"], "dist-layerlr plan"),
        (["explain"], "dist-layerlr explain"),
        ([], "dist-layerlr"),
    ],
    ids=str,
)
def test_bad_arguments_are_said_in_one_line(words: list[str], program: str, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (2, "")
    assert said.err.startswith("dist-layerlr: error: ") and said.err.count("\n") == 1
    assert said.err.endswith(f"; see {program} --help.\n")


def test_no_command_is_without_a_row_above(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = capsys.readouterr().out.partition("Commands: ")[2].partition(".")[0]
    assert set(listed.replace("\n", " ").split(", ")) == set(COMMANDS)


def test_each_command_writes_json(model: str, config: str, tmp_path: Path, capsys):
    picture = str(tmp_path / "a.png")
    flops = ["--tokens", "64", "--gb-s", "10", "--tflops", "100"]
    cases = {
        "plan": [model, "--config", config],
        "explain": [model, NAME, "--config", config],
        "plot": [model, "--config", config, "--output", picture],
        "predict": [model, *flops],
        "diff": [config, config, "--model", model],
    }
    found = {}
    for command, words in cases.items():
        assert main([command, *words, "--json"]) == 0, command
        found[command] = json.loads(capsys.readouterr().out)
    assert found["explain"]["lr"] == found["plan"]["parameters"][NAME]["lr"] == 4e-4
    assert found["explain"]["text"][0].startswith(NAME)
    assert found["plot"] == {"wrote": [picture]}
    assert found["diff"] == {"differs": False, "lines": []}


def test_convert_writes_a_config_and_says_what_it_left_out(model: str, tmp_path: Path, capsys):
    source = tmp_path / "run.yaml"
    source.write_text("learning_rate: 1e-4\nlr_groups:\n- {name: a, modules: [attn1], lr: 1e-3}\n")
    assert main(["convert", "axolotl", str(source), "--model", model]) == 0
    said = capsys.readouterr()
    written = tmp_path / "converted.json"
    written.write_text(said.out)
    assert (
        said.err.count("note: left out") == 2
    )  # embeddings and norms, which the model has none of
    assert main(["explain", model, NAME, "--config", str(written), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lr"] == 1e-3
    assert main(["convert", "axolotl", str(source), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["learning_rate"] == 1e-4


def test_schema_prints_what_is_installed(capsys):
    assert main(["schema"]) == 0
    assert capsys.readouterr().out == SCHEMA_FILE.read_text(encoding="utf-8")


def test_doctor_says_what_does_not_work(monkeypatch, capsys):
    good = Row(part="versions", what="torch", state="ok", text="2.13")
    bad = Row(part="sharding", what="DeepSpeed", state=BAD, text="ImportError: libcuda")
    for rows, status in (((good,), 0), ((good, bad), 1)):
        monkeypatch.setattr(doctor, "examine", lambda rows=rows: Examination(rows=rows))
        assert main(["doctor", "--json"]) == status
        assert json.loads(capsys.readouterr().out)["well"] is (status == 0)
    assert main(["doctor"]) == 1
    assert "bad     DeepSpeed" in capsys.readouterr().out


def test_doctor_compares_versions_with_what_the_package_asks_for(monkeypatch):
    real = doctor.metadata.version
    monkeypatch.setattr(
        doctor.metadata, "version", lambda name: "0.1" if name == "torch" else real(name)
    )
    states = {row.what: row.state for row in doctor._versions()}
    assert states["torch"] == BAD and states["python"] == "ok"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "Nothing to audit: give a command after --"),
        (["--", "no-such-program"], "Cannot run 'no-such-program'"),
        (["--allow", "deed", "--", "true"], "Did you mean 'dead'?"),
        (["--plan", "absent.json", "--", "true"], "Cannot read config file 'absent.json'"),
    ],
)
def test_a_wrong_audit_is_one_line_before_anything_runs(words: list[str], says: str, capsys):
    assert main(["audit", *words]) == 2
    assert says in capsys.readouterr().err
