"""Pretrained weights read straight into shards: right in every element, and only a rank's own bytes
are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import nn

from dist_layerlr import attach, bind, plan_model
from dist_layerlr.errors import ModelSourceError
from dist_layerlr.sharders import materialize, partition_empty, sharder_of
from dist_layerlr.weights import check_pretrained, load_pretrained
from dist_layerlr.weights.tensorfile import FileTensor
from tests.support.drivers import SHARDERS, ds_config, fsdp2, start_deepspeed
from tests.support.living import MostLiving, only_new_tensors
from tests.support.parity import Recipe
from tests.support.ranks import run_ranks

BF16 = {"bf16": {"enabled": True}}
OFFLOAD = {"zero": {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}}
ZERO: dict[str, tuple[int, dict[str, Any]]] = {
    **{f"zero {stage}": (stage, {}) for stage in range(4)},
    "zero 1 bf16": (1, BF16),
    "zero 3 bf16": (3, BF16),
    "zero 3 offload": (3, {**OFFLOAD, "zero_force_ds_cpu_optimizer": False}),
}
SHARDED = ("fsdp1", "fsdp1_flat", "fsdp2", "hsdp", "zero 3", "zero 3 bf16", "zero 3 offload")
NAMES = ("none", "ddp", "fsdp1", "fsdp1_flat", "fsdp2", "hsdp", *ZERO)


class Big(Recipe):
    """Weights that are large beside the biases, a persistent and a computed buffer."""

    def model(self) -> Any:
        model: Any = super().model()
        model.wide = nn.Linear(300, 301)
        model.register_buffer("counted", torch.arange(5.0))
        model.register_buffer("angles", torch.arange(7.0), persistent=False)
        return model


def empty() -> Any:
    with init_empty_weights(include_buffers=False):
        model = Big().model()
    model.tie_b.weight = model.tie_a.weight  # accelerate parts what is tied
    return model


def values() -> dict[str, torch.Tensor]:
    """What the checkpoint holds: other values than any initialisation."""
    generator = torch.Generator().manual_seed(9)
    state = Big().model().state_dict()
    del state["tie_b.weight"]
    return {
        name: 0.1 * torch.randn(value.shape, generator=generator) for name, value in state.items()
    }


def native(name: str) -> Any:
    model = empty()
    if name.startswith("fsdp1"):
        return SHARDERS[name](
            model, param_init_fn=lambda module: materialize(module, "cpu", recurse=False)
        )
    if name in ("fsdp2", "hsdp"):
        fsdp2(model, mesh=(2, 1) if name == "hsdp" else None)
    materialize(model, "cpu")
    return SHARDERS["ddp"](model) if name == "ddp" else model


def engine(stage: int, fields: dict[str, Any]) -> Any:
    model, recipe = empty(), Big()
    config = ds_config(stage, recipe, **fields)
    plan = plan_model(model, recipe.config)
    if stage == 3:
        partition_empty(model, config)
    else:
        materialize(model, "cpu")
    optimizer = attach(plan, model, recipe.make, emission="segmented")
    started, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    bind(plan, started)
    return started


def make(name: str) -> Any:
    return engine(*ZERO[name]) if name in ZERO else native(name)


class Counted:
    """Counts what is read from files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.read = 0
        original = FileTensor.read_from

        def read(
            stored: FileTensor, file: Any, start: int, numel: int, out: torch.Tensor | None = None
        ) -> torch.Tensor:
            self.read += numel * stored.dtype.itemsize
            return original(stored, file, start, numel, out)

        monkeypatch.setattr(FileTensor, "read_from", read)


def check_values(name: str, model: Any, wanted: dict[str, torch.Tensor]) -> None:
    held = sharder_of(model).true_weights()
    assert {run.name for run in held} == wanted.keys()
    for run in held:
        part = wanted[run.name].reshape(-1)[run.start : run.start + run.numel]
        assert torch.equal(run.tensor, part.to(run.dtype)), f"{name}: {run.name}"
    if "bf16" in name:
        assert {run.dtype for run in held if run.trainable} == {torch.float32}
    reference = Big().model()
    reference.load_state_dict({**wanted, "tie_b.weight": wanted["tie_a.weight"]})
    inputs = torch.randn(2, 7)
    with torch.no_grad():
        seen = model(inputs.bfloat16() if "bf16" in name else inputs).float()
        close = torch.allclose(seen, reference(inputs), atol=0.05 if "bf16" in name else 1e-5)
    assert close, name
    buffers = {
        n.split("_fsdp_wrapped_module.")[-1].removeprefix("module."): b
        for n, b in model.named_buffers()
    }
    assert torch.equal(buffers["angles"].float(), torch.arange(7.0)), name


def load_all(rank: int, world_size: int, file: str) -> dict[str, int]:
    """{sharder: bytes that this rank read}."""
    start_deepspeed()
    wanted, bytes_read = values(), {}
    for name in NAMES if world_size > 1 else ("none",):
        with pytest.MonkeyPatch.context() as patch:
            counted = Counted(patch)
            model = make(name)
            load_pretrained(model, file)
            bytes_read[name] = counted.read
        check_values(name, model, wanted)
    return bytes_read


def test_every_sharder_is_filled_and_each_rank_of_a_sharded_one_reads_its_part(
    tmp_path: Path,
) -> None:
    state = values()
    save_file(state, str(tmp_path / "model.safetensors"))
    total = sum(4 * value.numel() for value in state.values())
    by_rank = run_ranks(load_all, 2, str(tmp_path))
    for name in NAMES:
        read = [counts[name] for counts in by_rank]
        if (
            name == "hsdp"
            or name not in SHARDED
            and name not in ("zero 1", "zero 2", "zero 1 bf16")
        ):
            assert read == [total, total], name
        else:
            slack = 4 * (
                state["counted"].numel()
                + state["still.weight"].numel()
                + state["still.bias"].numel()
            )
            assert total <= sum(read) <= total + slack, name
            assert max(read) < 0.51 * total + slack, name


def peak_of_loading(
    rank: int, world_size: int, file: str, sharded: bool, dtype: torch.dtype
) -> float:
    """The most bytes of tensors that lived on this rank while it loaded."""
    from dist_layerlr.weights import load

    load.CHUNK = 1 << 16
    with init_empty_weights(include_buffers=False):
        model: Any = nn.Sequential(*(nn.Linear(1000, 1000, bias=False) for _ in range(24)))
    if sharded:
        from torch.distributed.fsdp import fully_shard

        for layer in model:
            fully_shard(layer)
        fully_shard(model)
    with only_new_tensors(), MostLiving() as living:
        model.to(dtype)
        materialize(model, "cpu")
        load_pretrained(model, file)
    return living.most


def test_peak_memory_of_a_rank_is_its_shard_not_the_model(tmp_path: Path) -> None:
    state = {f"{i}.weight": torch.randn(1000, 1000) for i in range(24)}
    save_file(state, str(tmp_path / "model.safetensors"))
    total = sum(4 * value.numel() for value in state.values())
    for ranks, dtype, share in (
        (2, torch.float32, 0.5),
        (2, torch.bfloat16, 0.25),
        (1, torch.float32, 1.0),
    ):
        peaks = run_ranks(peak_of_loading, ranks, str(tmp_path), ranks > 1, dtype)
        assert all(share * total <= peak <= (share + 0.1) * total for peak in peaks), [
            peak / total for peak in peaks
        ]


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    def write(**changes: torch.Tensor | None) -> Path:
        state = {**values(), **{name.replace("__", "."): value for name, value in changes.items()}}
        path = tmp_path / "model.safetensors"
        save_file({name: value for name, value in state.items() if value is not None}, str(path))
        return path

    yield write


def test_what_does_not_fit_is_one_error_naming_file_and_tensor(
    file: Callable[..., Path], tmp_path: Path
) -> None:
    check_pretrained(empty(), file())
    for changes, words in (
        ({"wide__bias": None}, ["lacks tensor 'wide.bias'"]),
        ({"other__bias": torch.ones(2)}, ["model.safetensors", "'other.bias'", "does not have"]),
        (
            {"wide__bias": torch.ones(300)},
            ["'wide.bias' in", "model.safetensors", "(300,)", "(301,)"],
        ),
        (
            {"wide__bias": torch.ones(301, dtype=torch.int32)},
            ["'wide.bias' in", "int32", "float32"],
        ),
    ):
        with pytest.raises(ModelSourceError) as caught:
            check_pretrained(empty(), file(**changes))
        assert all(word in str(caught.value) for word in words), caught.value
    check_pretrained(empty(), file(angles=torch.ones(7)))  # a computed buffer may be there
    path = file(tie_b__weight=values()["tie_a.weight"])  # and the other name of what is tied
    check_pretrained(empty(), path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelSourceError, match="truncated"):
        check_pretrained(empty(), path)


def load_with_one_bad_rank(rank: int, world_size: int, good: str, bad: str) -> tuple[str, bool]:
    """(error, whether the model is unchanged), where rank 1 sees another file."""
    model = fsdp2(Big().model())
    before = [run.tensor.clone() for run in sharder_of(model).true_weights()]
    with pytest.raises(ModelSourceError) as caught:
        load_pretrained(model, bad if rank else good)
    return str(caught.value), all(
        torch.equal(run.tensor, old)
        for run, old in zip(sharder_of(model).true_weights(), before, strict=True)
    )


def test_a_file_that_one_rank_cannot_use_stops_all_before_anything_is_written(
    tmp_path: Path,
) -> None:
    state = values()
    save_file(state, str(tmp_path / "good.safetensors"))
    save_file({**state, "wide.bias": torch.ones(3)}, str(tmp_path / "bad.safetensors"))
    results = run_ranks(
        load_with_one_bad_rank,
        2,
        str(tmp_path / "good.safetensors"),
        str(tmp_path / "bad.safetensors"),
    )
    assert results[0] == results[1]
    assert "bad.safetensors" in results[0][0] and results[0][1]


def test_other_dtypes_and_split_files_are_cast_and_found(tmp_path: Path) -> None:
    state = values()
    names = list(state)
    for part in range(2):
        chosen = {name: state[name].to(torch.bfloat16) for name in names[part::2]}
        save_file(chosen, str(tmp_path / f"model-0000{part + 1}-of-00002.safetensors"))
    model = native("none")
    load_pretrained(model, tmp_path)
    assert all(
        torch.equal(model.state_dict()[n], value.to(torch.bfloat16).float())
        for n, value in state.items()
    )


def test_a_buffer_without_values_is_refused_by_name() -> None:
    with torch.device("meta"):
        model = Big().model()
    with pytest.raises(ModelSourceError, match=r"Buffer 'counted' .*include_buffers=False"):
        materialize(model, "cpu")


def test_tied_parameters_stay_tied() -> None:
    model = empty()
    materialize(model, "cpu")
    assert model.tie_a.weight is model.tie_b.weight
