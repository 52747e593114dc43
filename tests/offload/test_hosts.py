"""Where masters live: pinned arenas, pageable ones behind staging, safetensors files, 8-bit
codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dist_layerlr.errors import ModelSourceError, OffloadError
from dist_layerlr.offload import budget, codec, round_trip
from dist_layerlr.offload.masters import ALIGNMENT, build, payload_bytes, slot_bytes
from dist_layerlr.offload.streaming import stream_on
from dist_layerlr.offload.units import find_units
from tests.support.adversary import Adversary
from tests.support.families import BLOCKS, MIN_NUMEL, toy
from tests.support.training import (
    Case,
    assert_equal,
    backend_of,
    exact,
    identity,
    make_optimizer,
    moments,
    resident,
    train,
    weights,
)

LORA, FULL = Case(lora=True), Case(lora=False, accumulation=2)


def assert_streams_like_resident(
    case: Case, device: str, backend: Any = None, files: Any = None, **policy: Any
) -> Any:
    """Returns the stats."""
    wanted, wanted_moments, losses = resident(case, device)
    model = case.model()
    optimizer = make_optimizer(model)
    before = identity(model, optimizer)[0]
    with stream_on(
        backend or backend_of(device),
        model,
        case.policy(**policy),
        optimizer=optimizer,
        files=files,
    ) as handle:
        assert train(model, optimizer, case, device) == (
            losses if exact(case, device) else pytest.approx(losses, abs=1e-5)
        )
        stats = handle.stats()
    assert identity(model, optimizer)[0] == before
    assert_equal(weights(model), wanted, exact=exact(case, device))
    assert_equal(moments(model, optimizer), wanted_moments, exact=exact(case, device))
    return stats


@pytest.mark.parametrize(
    "device, case, units_in_pool",
    [("cpu", LORA, 1), ("cpu", FULL, 2), ("sim", FULL, 1), ("cuda", LORA, 2)],
    ids=str,
)
def test_masters_beyond_the_pool_pass_through_staging_within_it(
    case: Case, units_in_pool: int, device: str, monkeypatch: pytest.MonkeyPatch
):
    specs = find_units(case.model(), case.policy())
    unit = payload_bytes(specs[0], None)
    gradients = budget.grad_staging_bytes(specs)
    # A pool is given in MiB; the toy's blocks have a few KiB.
    monkeypatch.setattr(budget, "MEBIBYTE", unit * units_in_pool + gradients)
    backend = backend_of(device)
    assert_streams_like_resident(case, device, backend, pinned_pool_mb=1)
    if isinstance(backend, Adversary):
        assert backend.most_locked == unit * units_in_pool + gradients and backend.locked == []


@pytest.mark.parametrize("device", ["cpu"])
def test_pinned_arenas_have_the_exact_size_and_every_parameter_is_aligned(device: str):
    case, backend = Case(lora=False), Adversary(device)
    model = case.model()
    sizes = [p.numel() * 4 for p in model.blocks[0].parameters() if p.numel() >= MIN_NUMEL]
    exact = sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes[:-1]) + sizes[-1]
    with stream_on(backend, model, case.policy()) as handle:
        assert [u.host_bytes for u in handle.units] == [exact] * BLOCKS
        # As many bytes again for gradients, aligned one by one.
        kept = sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)
        assert backend.most_locked == (exact + kept) * BLOCKS
        for unit in handle._engine.units:
            assert unit.arena.nbytes == exact
            assert all(
                m.host.data_ptr() == unit.arena.data_ptr() + m.payload_offset for m in unit.masters
            )
            assert all(
                m.payload_offset % ALIGNMENT == m.slot_offset % ALIGNMENT == 0 for m in unit.masters
            )
    assert backend.locked == []


@pytest.mark.parametrize("device", ["cpu"])
def test_layouts_other_than_rows_are_kept(device: str):
    class Convolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
            self.proj = nn.Linear(8, 8)
            self.proj.weight = nn.Parameter(torch.randn(8, 16)[:, ::2])

    model = nn.ModuleDict(
        {"blocks": nn.ModuleList(Convolution() for _ in range(3))}
    ).requires_grad_(False)
    before = {n: (p.clone(), p.stride()) for n, p in model.named_parameters()}
    units = [build(c, None, None) for c in find_units(model, Case().policy(min_numel=8))]
    for master in (m for u in units for m in u.masters):
        value, stride = before[master.name]
        assert torch.equal(master.host, value) and torch.equal(master.value(), value)
        assert master.host.stride() == (
            stride if "attn" in master.name else value.contiguous().stride()
        )
    assert units[0].device_bytes <= slot_bytes(find_units(model, Case().policy(min_numel=8))[0])


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """The toy's weights as a sharded checkpoint folder."""
    state = toy().state_dict()
    names = sorted(state)
    shards = {f"model-{i}.safetensors": names[i::2] for i in range(2)}
    for file, members in shards.items():
        save_file({n: state[n].clone() for n in members}, tmp_path / file)
    index = {"weight_map": {n: file for file, members in shards.items() for n in members}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def test_frozen_weights_stream_from_their_files(device: str, files: Path):
    stats = assert_streams_like_resident(LORA, device, files=files, host="file")
    assert stats.total.fetches > BLOCKS


@pytest.mark.parametrize("device", ["cpu"])
def test_weights_that_train_live_in_memory_beside_the_file(device: str, files: Path):
    def half(model: Any) -> None:
        for block in model.blocks:
            block.mlp.requires_grad_(False)

    results = []
    for streamed in (False, True):
        model = FULL.model()
        half(model)
        handle = (
            stream_on(backend_of(device), model, FULL.policy(host="file"), files=files)
            if streamed
            else None
        )
        model = model if streamed else model.to(device)
        train(model, make_optimizer(model), FULL, device)
        if handle is not None:
            handle.remove()
        results.append(weights(model))
    assert_equal(results[1], results[0])


def in_file(tensor: torch.Tensor, file: Path) -> bool:
    """Whether the tensor's memory is a mapping of the file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        area, *_, name = line.split(maxsplit=5)
        first, end = (int(address, 16) for address in area.split("-"))
        if first <= tensor.data_ptr() < end:
            return name == str(file)
    return False


@pytest.mark.parametrize("device", ["cpu"])
def test_masters_in_files_take_no_memory_of_their_own(device: str, tmp_path: Path):
    backend = Adversary(device)

    def anonymous_kib() -> float:
        """Of the masters and the slots: storages that are no mapping of the file."""
        held = [*model.parameters(), *backend._memory.values()]
        return sum(t.nbytes for t in held if not in_file(t, tmp_path / "w.safetensors")) / 1024

    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc")
    side = 1500
    blocks = nn.ModuleList(nn.ModuleDict({"attn": nn.Linear(side, side)}) for _ in range(4))
    model = nn.ModuleDict({"blocks": blocks}).requires_grad_(False)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    before = anonymous_kib()
    with stream_on(backend, model, Case().policy(host="file"), files=tmp_path):
        freed = before - anonymous_kib()
    unit = side * side * 4 / 1024
    # Four units leave memory; three slots come.
    assert freed > 0.8 * unit


@pytest.mark.parametrize("device", ["cpu"])
@pytest.mark.parametrize("damage", ["missing", "shape", "dtype", "value", "no folder", "broken"])
def test_files_that_do_not_hold_the_weights_are_refused(damage: str, device: str, files: Path):
    model = LORA.model()
    name = "blocks.2.attn.to_q.base_layer.weight"
    weight = model.get_parameter(name)
    words: tuple[str, ...] = (
        name,
        {"missing": "not in the given files", "value": "changed after loading"}.get(damage, damage),
    )
    path: Any = files
    if damage == "missing":
        path = files / "model-0.safetensors"
        words = ("not in the given files", "host='memory'")
    elif damage == "no folder":
        path, words = files / "nowhere.safetensors", ("Cannot map", "nowhere")
    elif damage == "broken":
        path = files / "model-0.safetensors"
        path.write_bytes(path.read_bytes()[:50])
        words = ("Cannot map", "model-0")
    elif damage == "shape":
        model.blocks[2].attn.to_q.base_layer.weight = nn.Parameter(
            torch.zeros(12, 13), requires_grad=False
        )
    elif damage == "dtype":
        weight.data = weight.data.bfloat16()
    else:
        weight.data += 1
    before = [(p.data_ptr(), p.dtype) for p in model.parameters()]
    with pytest.raises((OffloadError, ModelSourceError)) as error:
        stream_on(backend_of(device), model, LORA.policy(host="file"), files=path)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert [(p.data_ptr(), p.dtype) for p in model.parameters()] == before


@pytest.mark.parametrize(
    "device, form, reentrant",
    [
        ("cpu", "int8", None),
        ("cpu", "float8_e4m3fn", False),
        ("sim", "float8_e4m3fn", None),
        ("cuda", "int8", None),
        ("cuda", "float8_e4m3fn", False),
    ],
)
def test_eight_bit_masters_train_like_a_resident_model_that_was_rounded_once(
    form: str, reentrant: bool | None, device: str
):
    """The numerical contract of ``host_dtype``."""
    case = Case(lora=True, reentrant=reentrant)
    rounded = case.model()
    streamed_names = {w.name for c in find_units(rounded, case.policy()) for w in c.weights}
    for name, p in rounded.named_parameters():
        if name in streamed_names:
            p.data = round_trip(p.data, form)
    rounded.to(device)
    optimizer = make_optimizer(rounded)
    losses = train(rounded, optimizer, case, device)
    model = case.model()
    assert losses != resident(case, device)[2]
    with stream_on(backend_of(device), model, case.policy(host_dtype=form)) as handle:
        ours = make_optimizer(model)
        assert train(model, ours, case, device) == losses
        # The state dict holds what the device sees; loading into codes is refused.
        assert_equal({k: v.cpu() for k, v in model.state_dict().items()}, weights(rounded))
        with pytest.raises(OffloadError, match="stored in 8 bits"):
            model.load_state_dict(model.state_dict())
        unit = handle.units[0]
        assert unit.host_bytes < 0.6 * unit.device_bytes
    assert_equal(weights(model), weights(rounded))


@pytest.mark.parametrize("form, bound", [("int8", 0.5 / 127), ("float8_e4m3fn", 1 / 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_errs_by_at_most_half_a_code_of_the_row(
    form: str, bound: float, dtype: torch.dtype
):
    torch.manual_seed(0)
    weight = (torch.randn(6, 5, 4) * torch.logspace(-6, 3, 6)[:, None, None]).to(dtype)
    weight[2] = 0
    once = round_trip(weight, form)
    assert once.dtype == dtype and torch.equal(once[2], weight[2])
    largest = weight.float().abs().amax(dim=(1, 2), keepdim=True)
    slack = 0.0 if dtype is torch.float32 else 2.0**-8
    assert ((once.float() - weight.float()).abs() <= largest * (bound + slack) * (1 + 1e-6)).all()
    assert torch.equal(round_trip(once.float(), form), once.float()) or dtype is torch.bfloat16


@pytest.mark.parametrize("form, largest", [("int8", 127.0), ("float8_e4m3fn", 448.0)])
def test_codes_are_what_the_formula_says(form: str, largest: float):
    weight = torch.tensor([[1.0, -0.5, 0.25, 0.0], [0.0, 0.0, 0.0, 0.0]])
    codes, scale = codec.encode(weight, form)
    assert scale.tolist() == [[torch.tensor(1.0 / largest).item()], [1.0]]
    assert codes.dtype == getattr(torch, form)
    assert (
        codes.float()[0, 0] == largest and codes.float()[0, 3] == 0 and not codes.float()[1].any()
    )
    vector, row = codec.encode(torch.tensor([2.0, 1.0]), form)
    assert vector.shape == (1, 2) and row.shape == (1, 1)


@pytest.mark.parametrize("lora, kept", [(True, 4), (False, 1)])
@pytest.mark.parametrize("device", ["cpu"])
def test_automatic_residents_leave_room_for_gradients_and_moments(
    lora: bool, kept: int, device: str
):
    case = Case(lora=lora)
    specs = find_units(case.model(), case.policy())
    size = slot_bytes(specs[0])
    backend = Adversary(device)
    # Half of it: three slots, and four blocks' weights.
    backend.free_bytes = lambda: 2 * (3 + 4) * size  # type: ignore[method-assign]
    policy = case.policy(resident_blocks="auto")
    assert budget.resident_count(specs, policy, backend) == kept
