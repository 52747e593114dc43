"""Bad input ends before training, with one line on rank 0 and status 2 on every rank; nobody
hangs."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dist_layerlr import fields
from dist_layerlr.errors import ConfigError, ModelSourceError
from dist_layerlr.ranks import alike, is_shared
from launch import train
from launch.trainer.cli import complain
from launch.trainer.data.order import sample_index
from launch.trainer.engines.sharding import SHARDINGS, check_launch
from launch.trainer.families import get_family
from launch.trainer.options import load_options
from launch.trainer.weights import empty_model
from tests.support.jobs import free_port
from tests.support.ranks import run_ranks

ROOT = Path(__file__).resolve().parent.parent.parent
Config = dict[str, Any]


def _edit(path: str, value: Any) -> Callable[[Config, Path], None]:
    def edit(config: Config, folder: Path) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            config = config.setdefault(parent, {})
        config[last] = value

    return edit


def _model_without_safetensors(config: Config, folder: Path) -> None:
    target = folder / "empty_model"
    target.mkdir()
    (target / "config.json").write_text((Path(config["model_path"]) / "config.json").read_text())
    config["model_path"] = str(target)


def _truncated_model(config: Config, folder: Path) -> None:
    _model_without_safetensors(config, folder)
    whole = save_bytes(folder)
    (Path(config["model_path"]) / "diffusion_pytorch_model.safetensors").write_bytes(
        whole[: len(whole) // 2]
    )


def save_bytes(folder: Path) -> bytes:
    file = folder / "some.safetensors"
    save_file({"x": torch.zeros(64, 64)}, str(file))
    return file.read_bytes()


def _block_adapter(config: Config, folder: Path) -> None:
    config.update(training_method="lora", adapter={"target_modules": ["blocks.0"]})


def _wrong_cached_shape(config: Config, folder: Path) -> None:
    cache = folder / "cache"
    cache.mkdir()
    save_file(
        {"latents": torch.zeros(3, 4, 16, 16), "prompt_embeds": torch.zeros(3, 32)},
        str(cache / "a.safetensors"),
    )
    config["data"] = {"kind": "cached", "folder": str(cache)}


CASES: dict[str, tuple[Callable[[Config, Path], None], list[str]]] = {
    "unknown config key": (_edit("trian", {}), ["'trian'", "Did you mean 'train'"]),
    "unknown per_layer_lr key": (
        _edit("per_layer_lr.min_dept_factor", 0.3),
        ["Did you mean 'min_depth_factor'"],
    ),
    "factor out of range": (
        _edit("per_layer_lr.min_depth_factor", 1.3),
        ["min_depth_factor=1.3", "[0, 1]"],
    ),
    "negative rate": (
        _edit("per_layer_lr.component_lr.ffn", -1e-4),
        ["component_lr.ffn=-0.0001", ">= 0"],
    ),
    "NaN rate": (_edit("per_layer_lr.default_lr", float("nan")), ["default_lr=nan"]),
    "unknown strategy": (
        _edit("per_layer_lr.depth_strategy", "cosin"),
        ["'cosin'", "Did you mean 'cosine'"],
    ),
    "table of the wrong type": (
        _edit("per_layer_lr.depth_table", "0.3"),
        ["depth_table='0.3'", "list"],
    ),
    "pattern that matches nothing": (
        _edit("per_layer_lr.patterns", [{"match": "blocs.*", "component": "ffn"}]),
        ["patterns[0].match='blocs.*'", "matches no parameter"],
    ),
    "region that matches nothing": (
        _edit("per_layer_lr.regions", [{"match": "decoder", "lr": 1e-4}]),
        ["regions[0].match='decoder'", "matches no parameter"],
    ),
    "model folder without safetensors": (_model_without_safetensors, ["No .safetensors file"]),
    "truncated safetensors": (
        _truncated_model,
        ["diffusion_pytorch_model.safetensors", "truncated"],
    ),
    "no such model folder": (_edit("model_path", "nowhere"), ["nowhere"]),
    "missing data folder": (_edit("data", {"kind": "cached", "folder": "nowhere"}), ["nowhere"]),
    "cached sample of the wrong shape": (_wrong_cached_shape, ["a", "latents", "(3, 4, 16, 16)"]),
    "batch the ranks cannot share": (_edit("train.global_batch", 7), ["global_batch=7", "2"]),
    "micro batch that does not divide": (_edit("train.micro_batch", 3), ["micro_batch=3", "4"]),
    "warmup longer than the run": (
        _edit("schedule.warmup_steps", 6),
        ["warmup_steps=6", "train.steps=5"],
    ),
    "adapter on a whole block": (
        _block_adapter,
        ["target_modules=['blocks.0']", "linear", "'attn1.to_q'"],
    ),
    "streaming that fsdp2 cannot do": (
        _edit("memory", {"stagehand": {"enabled": True, "mode": "layer"}}),
        ["memory.stagehand.mode='layer'", "fsdp2", "remove it"],
    ),
}


def _broken(case: str, config: Config, folder: Path) -> list[str]:
    edit, wanted = CASES[case]
    broken = copy.deepcopy(config)
    edit(broken, folder)
    (folder / "config.json").write_text(json.dumps(broken))
    return wanted


def _train_on_rank(
    rank: int, world_size: int, files: list[str], ports: list[int], folder: str
) -> list[tuple[int, str]]:
    """Exit status and standard error of every case, on one rank."""
    import contextlib
    import io

    import torch.distributed as dist

    dist.destroy_process_group()
    results = []
    for file, port in zip(files, ports, strict=True):
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            status = train.main(
                ["--config", file, "--sharding", "fsdp2", "--output-dir", f"{folder}/out"]
            )
        results.append((status, said.getvalue()))
    return results


def test_every_rank_ends_with_status_2_and_rank_0_says_one_line(
    run_config: Config, tmp_path: Path
) -> None:
    files, wanted = [], []
    for i, case in enumerate(CASES):
        folder = tmp_path / str(i)
        folder.mkdir()
        wanted.append(_broken(case, run_config, folder))
        files.append(str(folder / "config.json"))
    ports = [free_port() for _ in files]
    by_rank = run_ranks(_train_on_rank, 2, files, ports, str(tmp_path))
    for i, case in enumerate(CASES):
        (status0, said0), (status1, said1) = by_rank[0][i], by_rank[1][i]
        assert (status0, status1) == (2, 2), f"{case}: {said0} {said1}"
        assert said0.startswith("train.py: error: ") and said0.count("\n") == 1, (
            f"{case}: {said0!r}"
        )
        assert said1 == "", f"{case}: rank 1 said {said1!r}"
        for text in wanted[i]:
            assert text in said0, f"{case}: {said0!r} lacks {text!r}"
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_broken_sample_on_one_rank_ends_all_with_its_error(
    run_config: Config, tmp_path: Path
) -> None:
    victim = sample_index(4, 8, run_config["train"]["seed"])  # 4: the first of the second rank
    for i in range(8):
        value = float("nan") if i == victim else 0.0
        sample = {"latents": torch.full((1, 2, 12, 12), value), "prompt_embeds": torch.zeros(2, 32)}
        save_file(sample, str(tmp_path / f"{i}.safetensors"))
    run_config["data"] = {"kind": "cached", "folder": str(tmp_path)}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(run_config))
    first, second = run_ranks(_train_on_rank, 2, [str(file)], [free_port()], str(tmp_path))
    (status0, said0), (status1, said1) = first[0], second[0]
    assert (status0, status1) == (2, 2)
    assert f"train.py: error: {tmp_path}/{victim}.safetensors: latents holds NaN" in said0
    assert "error" not in said1


def _fail_alone(rank: int, world_size: int) -> tuple[bool, bool, str]:
    """Whether an agreed error and an error of one rank count as shared, and what this rank says of
    the latter."""
    import contextlib
    import io

    said = io.StringIO()
    try:
        alike(lambda: fields.integer(rank)("x", 0))
    except ConfigError as error:
        agreed = is_shared(error)
    mine = ConfigError("two\nlines")
    with contextlib.redirect_stderr(said):
        complain("train.py", mine, everywhere=not is_shared(mine))
    return agreed, is_shared(mine), said.getvalue()


def test_an_error_that_ranks_do_not_share_is_said_by_its_own_rank() -> None:
    assert run_ranks(_fail_alone, 2) == [
        (True, False, "train.py: error: two lines\n"),
        (True, False, "train.py: error: [rank 1] two lines\n"),
    ]


def test_everything_that_a_config_lacks_is_named_at_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train.main(["--config", str(ROOT / "launch" / "configs" / "wan.json")]) == 2
    said = capsys.readouterr().err
    assert "model_path, data, train.steps, train.global_batch" in said and said.count("\n") == 1
    assert (
        "--set model_path=DIR --set data.kind=cached --set data.folder=DIR --set train.steps=N"
        in said
    )


def test_a_family_that_cannot_be_trained_is_named_before_anything_else(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = str(ROOT / "launch" / "configs" / "ltx2.json")
    assert train.main(["--config", config, "--plan-only", "--set", "model_type=ltx3"]) == 2
    assert "model_type='ltx3': must be one of chroma_1" in capsys.readouterr().err


def test_a_bad_flag_is_one_line_on_rank_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit, match="2"):
            train.main(["--config", "c.json", "--max-steps", f"many {os.getpid()}"])
        said.append(capsys.readouterr().err)
    assert said[0].startswith("train.py: error: ") and said[0].count("\n") == 1
    assert said[1] == ""


@pytest.mark.parametrize(
    ("name", "value"), [("WORLD_SIZE", "abc"), ("WORLD_SIZE", "0"), ("RANK", "-1")]
)
def test_a_broken_launcher_variable_is_named(
    name: str,
    value: str,
    run_config: Config,
    write_config: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(name, value)
    assert train.main(["--config", str(write_config(run_config))]) == 2
    said = capsys.readouterr().err
    assert f"Invalid {name}={value!r}: must be an integer >=" in said and said.count("\n") == 1


def test_deepspeed_without_a_launcher_names_the_flag_that_was_given() -> None:
    with pytest.raises(ConfigError, match=r"Invalid --deepspeed_config: .*deepspeed --num_gpus 2"):
        check_launch(SHARDINGS["zero"], 8)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        '{"num_layers": "2"}',
        '{"num_layers": 2, "patch_size": 3}',
        '{"num_layers": 2, "text_dim": null}',
    ],
)
def test_a_model_config_that_builds_nothing_is_one_line(
    content: str, run_config: Config, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(content)
    run_config["model_path"] = str(tmp_path / "model")
    with pytest.raises(ModelSourceError, match=r"model/config\.json") as caught:
        empty_model(get_family("wan"), load_options(write_config(run_config)))
    assert "\n" not in str(caught.value)


def test_corrupt_json_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "broken.json"
    file.write_text('{"model_type": "wan",')
    assert train.main(["--config", str(file)]) == 2
    said = capsys.readouterr().err
    assert "broken.json" in said and "not JSON" in said and said.count("\n") == 1


def test_a_sharder_without_a_launcher_names_the_launcher(
    run_config: Config, tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(run_config))
    program = [
        sys.executable,
        str(ROOT / "launch" / "train.py"),
        "--config",
        str(file),
        "--sharding",
        "fsdp2",
    ]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        program, capture_output=True, text=True, timeout=900, env=env, cwd=tmp_path
    )
    assert done.returncode == 2
    assert "torchrun --nproc_per_node 2" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"scheduler": {"type": "WarmupLR", "params": {}}}, "'scheduler' block"),
        ({"optimizer": {"type": "WarmupLR", "params": {}}}, "'optimizer' block"),
        ({"zero_optimization": 3}, "zero_optimization=3: must be a JSON object"),
        ({"zero_optimization": {"stag": 2}}, "zero_optimization.stag=2: "),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"ratio": "x"}}},
            "zero_optimization.offload_optimizer.ratio='x'",
        ),
        ({"bf16": 5}, "bf16=5: must be a JSON object"),
        ({"bf16": {"enabled": "x"}}, "bf16.enabled='x': must be true or false"),
        ({"gradient_clipping": 5}, "gradient_clipping=5, but train.grad_clip=1.0"),
    ],
)
def test_a_ds_config_that_takes_over_contradicts_or_is_wrong_is_refused_in_one_line(
    change: Config, says: str, run_config: Config, write_config: Callable[..., Path]
) -> None:
    from launch.trainer.engines.zero import read_zero_config

    ds = write_config({"zero_optimization": {"stage": 2}, **change}, "ds.json")
    with pytest.raises(ConfigError, match=re.escape(says)) as caught:
        read_zero_config(str(ds), load_options(write_config(run_config)), 2)
    assert "\n" not in str(caught.value)
