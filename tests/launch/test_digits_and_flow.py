"""Moving digits, flow matching, the Wan family and the sample picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_layerlr.errors import ConfigError, ModelSourceError
from launch import make_tiny_wan
from launch.trainer.data import open_dataset
from launch.trainer.data.digits import DIGIT_WORDS, PATHS, SCAN, MovingDigits
from launch.trainer.families import FAMILIES, get_family
from launch.trainer.objectives.flow import euler_sigmas, make_flow_batch, mix_seed, sample
from launch.trainer.objectives.sigma import SigmaDistribution
from launch.trainer.samples import _short, draw_samples
from tests.support.ranks import run_ranks

TINY = [
    "--layers",
    "2",
    "--heads",
    "2",
    "--head-dim",
    "12",
    "--patch",
    "4",
    "--text-dim",
    "8",
    "--freq-dim",
    "8",
    "--channels",
    "1",
]
CLIP = {"latents": torch.zeros(1, 4, 16, 16), "prompt_embeds": torch.zeros(3, 8)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "wan"
    assert make_tiny_wan.main([str(folder), *TINY]) == 0
    return folder


@pytest.fixture(scope="module")
def model_config(checkpoint: Path) -> dict[str, object]:
    return json.loads((checkpoint / "config.json").read_text())


DRAW = SigmaDistribution(shift=1.5).draw_sigma


def latents(count: int) -> torch.Tensor:
    return torch.randn(count, 1, 2, 8, 8, generator=torch.Generator().manual_seed(1))


# Flow matching


def test_a_batch_of_four_equals_two_batches_of_two() -> None:
    clean = latents(4)
    whole = make_flow_batch(clean, range(40, 44), 3, DRAW)
    halves = [make_flow_batch(clean[i : i + 2], range(40 + i, 42 + i), 3, DRAW) for i in (0, 2)]
    for field in ("noisy", "target", "sigma", "timestep"):
        assert torch.equal(
            getattr(whole, field), torch.cat([getattr(half, field) for half in halves])
        ), field


def test_noise_depends_on_seed_and_sample_number_only() -> None:
    clean = latents(1).expand(3, -1, -1, -1, -1)
    torch.manual_seed(99)
    first, same, other = make_flow_batch(clean, torch.tensor([7, 7, 8]), 0, DRAW).target
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert not torch.equal(first, make_flow_batch(clean[:1], [7], 1, DRAW).target[0])


def test_the_batch_lies_on_the_straight_path() -> None:
    clean = latents(5)
    batch = make_flow_batch(clean, range(5), 0, DRAW)
    share = batch.sigma.view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(batch.noisy - share * batch.target, clean)
    torch.testing.assert_close(batch.timestep, 1000 * batch.sigma)
    assert ((batch.sigma > 0) & (batch.sigma < 1)).all()


def test_noise_is_standard_normal_and_sigma_leans_towards_noise() -> None:
    clean = torch.zeros(512, 1, 2, 8, 8)
    batch = make_flow_batch(clean, range(512), 0, DRAW)
    assert abs(batch.target.mean()) < 0.02 and abs(batch.target.std() - 1) < 0.02
    assert abs(batch.sigma.median() - 0.6) < 0.05


def test_seed_mixing_is_fixed_for_good() -> None:
    assert [mix_seed(0, 1, 0), mix_seed(0, 1, 1), mix_seed(1, 1, 0)] == [
        2300713141190124274,
        3691790751808042391,
        574794275659835832,
    ]
    assert len({mix_seed(0, 1, number) for number in range(10_000)}) == 10_000


def test_euler_with_the_true_velocity_arrives_at_the_data() -> None:
    goal = latents(2)
    # On a straight path every point knows its velocity: (x_sigma - x) / sigma.
    found = sample(
        lambda x, t: (x - goal) / (t / 1000).view(-1, 1, 1, 1, 1),
        goal.shape,
        seed=0,
        steps=4,
        device="cpu",
        shift=3.0,
    )
    torch.testing.assert_close(found, goal)


def test_sampling_starts_from_the_same_noise_for_any_number_of_clips() -> None:
    def still(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)

    three, one = (sample(still, (count, 1, 2, 8, 8), 5, 2, "cpu") for count in (3, 1))
    assert torch.equal(three[:1], one)


def test_shift_spends_steps_near_the_noise() -> None:
    assert euler_sigmas(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert euler_sigmas(4, shift=3.0) == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])


@pytest.mark.parametrize(
    ("steps", "shift", "field"), [(0, 1.0, "samples.steps=0"), (4, 0.0, "samples.shift=0.0")]
)
def test_sampler_values_out_of_range_are_named(steps: int, shift: float, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        euler_sigmas(steps, shift)


# Moving digits


def test_a_clip_is_the_same_from_any_dataset_object() -> None:
    one, two = MovingDigits(clips=30, seed=4), MovingDigits(clips=30, seed=4)
    assert all(torch.equal(one[17][key], two[17][key]) for key in ("latents", "prompt_embeds"))
    assert one.name(17) == two.name(17)
    assert not torch.equal(one[17]["latents"], MovingDigits(clips=30, seed=5)[17]["latents"])


def test_every_frame_shows_a_real_scan_of_the_named_digit() -> None:
    from sklearn.datasets import load_digits

    bundle = load_digits()
    dataset = MovingDigits(clips=40, canvas=16, speed=2, starts=3, scans_per_digit=174)
    for index in range(40):
        scans = bundle.images[bundle.target == DIGIT_WORDS.index(dataset.name(index).split()[0])]
        real = {scan.astype(np.float32).tobytes() for scan in scans}
        for frame in ((dataset[index]["latents"][0] + 1) * 8).numpy():
            places = [(y, x) for y in range(9) for x in range(9)]
            assert any(
                np.ascontiguousarray(frame[y : y + SCAN, x : x + SCAN]).tobytes() in real
                for y, x in places
            )


def test_the_digit_moves_along_the_path_of_its_prompt() -> None:
    dataset = MovingDigits(clips=80, frames=2, canvas=16, speed=2, starts=8)
    pixels = torch.arange(16.0)
    seen = set()
    for index in range(80):
        ink = dataset[index]["latents"][0] + 1  # (2, 16, 16)
        moved = tuple(
            round((ink.sum(axis) @ pixels / ink.sum((1, 2))).diff().item()) for axis in (2, 1)
        )
        along = tuple(2 * step for step in PATHS[dataset.name(index).split()[1]])
        assert moved in (along, tuple(-step for step in along))
        seen.add(moved)
    assert len(seen) == 2 * len(PATHS)


def test_a_long_clip_bounces_and_never_leaves_the_canvas() -> None:
    clip = MovingDigits(clips=10, frames=64, speed=3, canvas=19)[3]["latents"]
    ink = (clip + 1).sum((0, 2, 3))
    torch.testing.assert_close(ink, ink[:1].expand(64))


def test_samples_have_the_promised_layout() -> None:
    item = MovingDigits(clips=10, frames=5, canvas=12, text_dim=8)[9]
    assert item["latents"].shape == (1, 5, 12, 12) and item["prompt_embeds"].shape == (2, 8)
    assert {tensor.dtype for tensor in item.values()} == {torch.float32}
    assert item["latents"].min() == -1 and item["latents"].max() == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("clips", 0),
        ("frames", 65),
        ("canvas", 7),
        ("speed", 0),
        ("starts", 65),
        ("scans_per_digit", 175),
        ("text_dim", 2.5),
    ],
)
def test_a_value_out_of_range_is_named_with_its_range(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{field}={value}: must be an integer in \["):
        open_dataset({"kind": "digits", field: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"data\.kind=None"),
        ({"kind": "digit"}, "Did you mean 'digits'"),
        (
            {"kind": "digits", "canvass": 16},
            "'canvass' in data of kind 'digits'.*Did you mean 'canvas'",
        ),
    ],
)
def test_unknown_kinds_and_keys_name_the_nearest(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_dataset(options)


def test_reading_past_the_end_is_an_index_error() -> None:
    with pytest.raises(IndexError):
        MovingDigits(clips=3)[3]


# The Wan family


def test_unknown_model_type_names_the_allowed_ones() -> None:
    with pytest.raises(
        ConfigError, match="model_type='wam': must be one of .*, wan, .*Did you mean 'wan'"
    ):
        get_family("wam")
    assert all(get_family(key).model_type == key for key in FAMILIES)


def velocity_and_gradients(rank: int, world_size: int, checkpoint: Path) -> tuple[bool, list[str]]:
    """Whether the velocity has the shape of its input, and the parameters that get no gradient."""
    family = get_family("wan")
    model = family.model_class.from_pretrained(checkpoint)
    noisy = torch.randn(2, 1, 4, 16, 16)
    velocity = family.predict(
        model, noisy, torch.tensor([10.0, 990.0]), {"prompt_embeds": torch.randn(2, 3, 8)}
    )
    velocity.square().mean().backward()
    still = [
        name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0
    ]
    return velocity.shape == noisy.shape, still


def test_tiny_checkpoint_loads_and_predicts_a_velocity(checkpoint: Path) -> None:
    assert run_ranks(velocity_and_gradients, 1, checkpoint)[0] == (True, [])


def test_tiny_checkpoint_has_the_names_of_the_full_size_model(checkpoint: Path) -> None:
    from safetensors import safe_open

    with torch.device("meta"):
        real = get_family("wan").model_class(num_layers=2)
    with safe_open(checkpoint / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert set(file.keys()) == set(real.state_dict())


def test_lora_targets_are_linear_layers_of_every_block(checkpoint: Path) -> None:
    family = get_family("wan")
    modules = family.model_class.from_pretrained(checkpoint).named_modules()
    linear = {name for name, module in modules if isinstance(module, torch.nn.Linear)}
    wanted = {
        f"blocks.{block}.{target}" for block in range(2) for target in family.lora_targets({})
    }
    assert wanted == {name for name in linear if name.startswith("blocks.")}


def test_a_fitting_sample_passes(model_config: dict[str, object]) -> None:
    get_family("wan").check_sample(model_config, CLIP)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"latents": torch.zeros(16, 4, 16, 16)},
            r"a\.safetensors: latents has shape \(16, 4, 16, 16\).*needs \(1, F",
        ),
        ({"latents": torch.zeros(1, 4, 16, 18)}, r"latents has shape .*multiples of \(1, 4, 4\)"),
        (
            {"latents": torch.zeros(1, 1, 4, 16, 16)},
            "latents has shape .*without a batch dimension",
        ),
        ({"prompt_embeds": torch.zeros(3, 9)}, r"prompt_embeds has shape \(3, 9\).*\(L, 8\)"),
        ({"prompt_embeds": torch.zeros(0, 8)}, "L >= 1"),
    ],
)
def test_a_misfit_names_file_field_and_both_shapes(
    model_config: dict[str, object], change: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(ModelSourceError, match=message) as caught:
        get_family("wan").check_sample(model_config, {**CLIP, **change}, "a.safetensors")
    assert "\n" not in str(caught.value)


def test_a_missing_field_is_named(model_config: dict[str, object]) -> None:
    with pytest.raises(ModelSourceError, match="prompt_embeds is missing"):
        get_family("wan").check_sample(model_config, {"latents": CLIP["latents"]})


def test_image_to_video_checkpoints_are_refused(model_config: dict[str, object]) -> None:
    with pytest.raises(ModelSourceError, match="image-to-video"):
        get_family("wan").check_sample(
            {**model_config, "in_channels": 36, "out_channels": 16}, CLIP
        )


@pytest.mark.parametrize("patch", [[1, 2], [1, 0, 2], [1, 2, 2.0]])
def test_a_patch_size_that_cuts_nothing_is_refused(
    model_config: dict[str, object], patch: list[int]
) -> None:
    with pytest.raises(ModelSourceError, match=r"patch_size=.*must be 3 integers >= 1"):
        get_family("wan").check_sample({**model_config, "patch_size": patch}, CLIP)


@pytest.mark.parametrize("place", ["taken", "taken/below", "/proc/nowhere"])
def test_tiny_wan_refuses_a_place_it_cannot_write_to(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("")
    assert make_tiny_wan.main([str(tmp_path / place), *TINY]) == 2
    said = capsys.readouterr().err
    assert said.startswith("make_tiny_wan.py: error: Invalid OUT_DIR=") and said.count("\n") == 1


def test_tiny_wan_refuses_a_seed_that_torch_cannot_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        make_tiny_wan.main([str(tmp_path / "wan"), "--seed", str(2**64)])
    said = capsys.readouterr().err
    assert "--seed" in said and "[0, 2**63)" in said and said.count("\n") == 1


# The picture


@pytest.mark.parametrize("channels", [1, 2, 3, 16])
def test_the_picture_is_written_for_any_channel_count(tmp_path: Path, channels: int) -> None:
    clips = torch.randn(2, channels, 3, 8, 8)
    path = tmp_path / "new" / "samples.png"
    draw_samples(path, clips, clips * 40, ["one up left", "two"])
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5_000


@pytest.mark.parametrize("frames", [1, 21])
def test_the_picture_stays_small_whatever_the_captions_say(tmp_path: Path, frames: int) -> None:
    from PIL import Image

    clips = torch.zeros(3, 3, frames, 8, 8)
    draw_samples(tmp_path / "samples.png", clips, clips, ["costs $x_$", "word " * 80, "two\nlines"])
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.width < 2400 and picture.height < 500


def test_a_long_caption_becomes_the_start_of_one_line() -> None:
    assert _short("seven backslash") == "seven backslash"
    assert _short("a\n b\tc") == "a b c"
    assert _short("word " * 80) == "word word word word word word…"
