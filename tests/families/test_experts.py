"""Wan 2.2's two experts: one at a time, or in turn, each with its own plan, optimizer and range."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dist_layerlr.errors import ConfigError, ModelSourceError
from launch.trainer.families.wan22 import Wan22
from launch.trainer.objectives.experts import ExpertFlow
from launch.trainer.team import Turns, own, under
from tests.support.experts import (
    ABOVE,
    BOUNDARY,
    HIGH,
    LOW,
    SHIFT,
    STEPS,
    TURNS,
    config_of,
    make_pipeline,
    published,
    rows,
    succeed,
    trained,
)
from tests.support.forked import in_fork
from tests.support.jobs import ROOT, call_of, largest_difference, run_in_ranks


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("wan22"))


# Which expert, and which shares of noise


def test_a_step_trains_an_expert_as_often_as_the_distribution_falls_into_its_range() -> None:
    count = 20_000
    found = TURNS.count(HIGH, count) / count
    # Three standard deviations of a mean of 20,000 draws.
    assert abs(found - ABOVE) < 3 * (ABOVE * (1 - ABOVE) / count) ** 0.5
    assert TURNS.count(HIGH, count) + TURNS.count(LOW, count) == count
    other = Turns(shares=TURNS.shares, seed=1)
    assert [TURNS.at(step) for step in range(50)] != [other.at(step) for step in range(50)]


def test_draws_can_be_several_steps_apart() -> None:
    turns = Turns(shares=TURNS.shares, every=5)
    drawn = [turns.at(step) for step in range(100)]
    assert drawn == [TURNS.at(step // 5) for step in range(100)]


def test_the_first_and_the_last_step_of_an_expert_are_known() -> None:
    drawn = [TURNS.at(step) for step in range(30)]
    firsts = {drawn.index(HIGH), drawn.index(LOW)}
    assert {step for step in range(30) if TURNS.is_first(step)} == firsts
    assert TURNS.last(HIGH, 0, 30) == 29 - drawn[::-1].index(HIGH)
    assert Turns(shares={"": 1.0}).count("", 7) == 7


def test_both_experts_together_see_the_undivided_distribution(tmp_path: Path) -> None:
    write_index(tmp_path)
    family, draws = Wan22(), {}
    for expert in ("high", "low"):
        objective: Any = family.objective({"expert": expert}, tmp_path / HIGH)
        generator = torch.Generator().manual_seed(0)
        draws[expert] = [objective.draw_sigma(generator, ()) for _ in range(2000)]
        share = ABOVE if expert == "high" else 1 - ABOVE
        assert objective.share() == pytest.approx(share, abs=1e-5)
    assert BOUNDARY <= min(draws["high"]) and max(draws["low"]) <= BOUNDARY
    normal = NormalDist()

    def below(sigma: float) -> float:
        unbent = sigma / (SHIFT - (SHIFT - 1) * sigma)
        return normal.cdf(float(torch.logit(torch.tensor(unbent, dtype=torch.float64))))

    for sigma in (0.5, 0.8, 0.875, 0.95, 0.99):
        high = sum(one <= sigma for one in draws["high"]) / 2000
        low = sum(one <= sigma for one in draws["low"]) / 2000
        assert ABOVE * high + (1 - ABOVE) * low == pytest.approx(below(sigma), abs=0.03)


def write_index(folder: Path, **more: Any) -> None:
    index = {"boundary_ratio": BOUNDARY, **more}
    (folder / "model_index.json").write_text(json.dumps(index))
    for name in (HIGH, LOW):
        (folder / name).mkdir()
        channels = {"in_channels": 16, "out_channels": 16}
        (folder / name / "config.json").write_text(json.dumps(channels))


def test_the_folder_says_which_experts_there_are(tmp_path: Path) -> None:
    write_index(tmp_path)
    family = Wan22()

    def found(name: str, **settings: Any) -> list[str]:
        return list(family.networks(tmp_path / name, settings))

    assert found(HIGH) == [HIGH, LOW] == found(HIGH, expert="both")
    assert found(LOW) == [LOW] == found(HIGH, expert="low")
    assert found(HIGH, expert="high") == [HIGH] == found(LOW, expert="high")
    shutil.rmtree(tmp_path / LOW)
    assert found(HIGH) == [HIGH]
    with pytest.raises(ModelSourceError, match="needs transformer_2/ beside"):
        found(HIGH, expert="both")


@pytest.mark.parametrize(
    ("index", "channels", "shift"),
    [
        ({}, {"in_channels": 16, "out_channels": 16}, 12.0),
        ({}, {"in_channels": 36, "out_channels": 16}, 5.0),
        ({"expand_timesteps": True}, {"in_channels": 48, "out_channels": 48}, 5.0),
    ],
)
def test_the_shift_is_that_of_the_variant(
    tmp_path: Path, index: Mapping[str, Any], channels: Mapping[str, Any], shift: float
) -> None:
    write_index(tmp_path, **index)
    (tmp_path / HIGH / "config.json").write_text(json.dumps(channels))
    objective = Wan22().objective({"expert": "high"}, tmp_path / HIGH)
    assert isinstance(objective, ExpertFlow)
    assert (objective.shift, objective.sample_shift, objective.low) == (shift, shift, BOUNDARY)


def test_an_expert_without_a_boundary_or_outside_its_range_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Set objective\.boundary: 0\.875"):
        Wan22().objective({"expert": "high"}, tmp_path / "alone")
    given: Any = Wan22().objective({"expert": "low", "boundary": 0.9}, tmp_path / "alone")
    assert (given.low, given.high) == (0.0, 0.9)
    with pytest.raises(ConfigError, match=r"a range that meets \[0\.9, 1\.0\].*'high'"):
        settings = {"expert": "high", "boundary": 0.9, "high": 0.5}
        Wan22().objective(settings, tmp_path / "alone")


def test_rates_that_were_seen_are_kept_apart_by_network() -> None:
    seen = {**under(HIGH, {"blocks.0.a": 1.0}), **under(LOW, {"blocks.0.a": 2.0})}
    assert len(seen) == 2 and own(LOW, seen) == {"blocks.0.a": 2.0}
    assert own("", under("", {"blocks.0.a": 1.0})) == {"blocks.0.a": 1.0}


# Runs


def test_a_step_trains_one_expert_and_leaves_the_other_as_it_was(
    pipeline: Path, tmp_path: Path
) -> None:
    succeed(1, call_of(config_of(pipeline), tmp_path, "--max-steps", "1"))
    first = TURNS.at(0)
    other = HIGH if first == LOW else LOW
    assert largest_difference(trained(tmp_path, other), published(pipeline, other)) == 0
    assert largest_difference(trained(tmp_path, first), published(pipeline, first)) > 1e-5
    told = json.loads((tmp_path / "out" / first / "verify.json").read_text())
    assert len(told["first_step_lr"]) > 60
    assert json.loads((tmp_path / "out" / other / "verify.json").read_text())["first_step_lr"] == {}


def test_a_run_of_both_is_what_each_would_do_in_its_own_steps(
    pipeline: Path, tmp_path: Path
) -> None:
    """An expert that trains alone, in a run whose other steps do nothing, ends in the same weights:
    it saw the same samples, noise and schedule. Streaming changes nothing in that."""
    both = call_of(config_of(pipeline), tmp_path / "both")
    stagehand = {"enabled": True, "pinned_pool_mb": 64, "prefetch_window": 1, "min_numel": 100}
    config = {**config_of(pipeline), "memory": {"stagehand": stagehand}}
    streamed = call_of(config, tmp_path / "streamed")
    folders = [tmp_path / "high", tmp_path / "low"]
    single = [call_of(config_of(pipeline, expert=f.name), f) for f in folders]
    succeed(1, both, streamed)
    for name, folder, call in zip((HIGH, LOW), folders, single, strict=True):
        outcome = in_fork(lambda call=call, name=name: only_own_steps(call, name), "cpu")
        assert outcome[0] == "passed", outcome
        file = folder / "out/final/diffusion_pytorch_model.safetensors"
        assert largest_difference(trained(tmp_path / "both", name), load_file(file)) == 0
        # Each expert has its own slots, and blocks on the host while it is not its turn.
        assert largest_difference(trained(tmp_path / "streamed", name), load_file(file)) == 0
    assert [row["network"] for row in rows(tmp_path / "both")] == [
        TURNS.at(step) for step in range(STEPS)
    ]
    assert not (tmp_path / "both/out/plan.json").exists()


def only_own_steps(call: list[str], name: str) -> None:
    """Train one expert, its optimizer asleep in the steps that are the other's."""
    from launch import train
    from launch.trainer.engines.native import NativeEngine

    step, done = NativeEngine.step, 0

    def awake(self: Any, factor: float, **kwargs: Any) -> float:
        nonlocal done
        done += 1
        if TURNS.at(done - 1) == name:
            return step(self, factor, **{**kwargs, "observed": None})
        self.optimizer.zero_grad(set_to_none=True)
        return 0.0

    NativeEngine.step = awake  # type: ignore[method-assign]
    NativeEngine.prove = lambda self, factor, steps: Proved()  # type: ignore[method-assign]
    config = json.loads(Path(call[call.index("--config") + 1]).read_text())
    config["train"].pop("save_every")
    Path(call[call.index("--config") + 1]).write_text(json.dumps(config))
    assert train.main(call) == 0


class Proved:
    """Rates of a step that was left out are not the schedule's."""

    sharder = "unsharded"

    def line(self) -> str:
        return ""

    def to_dict(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_two_ranks_end_in_the_weights_of_one(pipeline: Path, tmp_path: Path, sharding: str) -> None:
    config = config_of(pipeline)
    succeed(1, call_of(config, tmp_path / "one"))
    succeed(2, call_of(config, tmp_path / "two", "--sharding", sharding))
    for name in (HIGH, LOW):
        one, two = (trained(tmp_path / ranks, name) for ranks in ("one", "two"))
        assert largest_difference(one, two) <= 1e-5
        assert largest_difference(one, published(pipeline, name)) > 1e-4


def test_a_run_goes_on_from_the_newest_step_that_both_have(pipeline: Path, tmp_path: Path) -> None:
    whole = call_of(config_of(pipeline), tmp_path / "whole")
    begun = call_of({**config_of(pipeline)}, tmp_path / "cut", "--max-steps", "3")
    succeed(1, whole, begun)
    # As if it had been killed between the two checkpoints of step 3: only one has it.
    again = call_of(config_of(pipeline), tmp_path / "cut", "--resume", "latest")
    ended = succeed(1, again)
    assert ended[0].said.count("resumed ") == 2
    for name in (HIGH, LOW):
        gap = largest_difference(trained(tmp_path / "whole", name), trained(tmp_path / "cut", name))
        assert gap == 0
    shutil.rmtree(tmp_path / "cut/out" / LOW / "checkpoints/step_00000006")
    ended = succeed(1, again)
    assert f"{LOW}/checkpoints/step_00000003 after 3 steps" in ended[0].said
    assert f"{HIGH}/checkpoints/step_00000003 after 3 steps" in ended[0].said
    ended = succeed(1, again)
    assert "nothing to train" in ended[0].said
    ended = run_in_ranks(1, [call_of(config_of(pipeline), tmp_path / "cut")])
    assert ended[0].status == 2 and "checkpoints of an earlier run" in ended[0].complaint


@pytest.mark.parametrize(
    "flags",
    [
        ["--sharding", "fsdp1"],
        ["--deepspeed_config", str(ROOT / "ds_configs/zero2.json")],
    ],
    ids=["fsdp1", "zero 2"],
)
def test_both_are_refused_where_two_models_cannot_share_a_process(
    pipeline: Path, tmp_path: Path, flags: list[str]
) -> None:
    ended = run_in_ranks(1, [call_of(config_of(pipeline), tmp_path, *flags)])
    assert ended[0].status == 2
    assert "objective.expert='both'" in ended[0].complaint
    assert "--sharding ddp" in ended[0].complaint and "'low'" in ended[0].complaint


def test_only_the_expert_that_trains_is_on_the_device(pipeline: Path) -> None:
    kind, text = in_fork(lambda: _watch_the_device(pipeline), "sim")
    assert kind == "passed", text


def _watch_the_device(pipeline: Path) -> None:
    from tests.support import sim_device

    whole = sum(one.numel() * 4 for one in published(pipeline, HIGH).values())
    team = small_team(torch.device("sim"))
    held = []
    for name in (HIGH, LOW, HIGH):
        engine: Any = team.awake(name).engine
        for param in engine.model.parameters():
            param.grad = torch.ones_like(param)
        engine.step(1.0)
        held.append(sim_device.allocated())
        assert {p.device.type for p in engine.model.parameters()} == {"sim"}
        other: Any = team.jobs[LOW if name == HIGH else HIGH].engine
        tensors = [*other.model.parameters()]
        tensors += [v for state in other.optimizer.state.values() for v in state.values()]
        assert {tensor.device.type for tensor in tensors} == {"cpu"}
    buffers = 0
    for job in team.jobs.values():
        buffers += sum(b.numel() * b.element_size() for b in job.engine.model.buffers())
    # Weights and two moments of one network, and little else; buffers of both stay.
    assert max(held) - buffers < 3.2 * whole, (held, buffers, whole)


def small_team(device: torch.device) -> Any:
    """Two real engines without the rest of a run."""
    from types import SimpleNamespace

    from dist_layerlr import attach, plan_model
    from launch.trainer.engines.native import NativeEngine
    from launch.trainer.engines.sharding import NONE
    from launch.trainer.team import Team
    from launch.trainer.tiny.wan import PARTS

    jobs: dict[str, Any] = {}
    for name, network in PARTS["wan22"]().items():
        if name not in (HIGH, LOW):
            continue
        engine: Any = NativeEngine.__new__(NativeEngine)
        plan = plan_model(network, {"learning_rate": 1e-3})
        engine._handle, engine._device, engine.plan = None, device, plan
        engine._clip, engine._sharding = 0.0, NONE
        engine.model = network.to(device)
        engine.optimizer = attach(plan, engine.model, lambda groups: torch.optim.AdamW(groups))
        engine.rest()
        jobs[name] = SimpleNamespace(engine=engine)
    face: Any = SimpleNamespace()
    steering: Any = None
    return Team(face=face, jobs=jobs, turns=TURNS, steering=steering)
