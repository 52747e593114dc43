"""Sizes of buckets, and clips and sounds as tensors."""

from __future__ import annotations

import wave
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from dist_layerlr.errors import ConfigError, ModelSourceError
from launch.trainer.data.clips import load_placed, load_sound, measure
from launch.trainer.data.images import Source
from launch.trainer.data.sizes import bucket_sizes, nearest, place
from launch.trainer.data.sources import gather
from tests.support.latents import write_image


def test_buckets_of_a_megapixel_are_those_that_sdxl_was_trained_at():
    sizes = bucket_sizes(1024 * 1024, 64)
    known = [(1024, 1024), (1152, 896), (896, 1152), (1216, 832), (832, 1216), (1344, 768)]
    assert set(known) <= set(sizes) and {(768, 1344), (1536, 640), (640, 1536)} <= set(sizes)
    assert all(h % 64 == w % 64 == 0 and h * w <= 1024 * 1024 for h, w in sizes)
    # No side shorter than half of the square's, none longer than twice, so up to 4 : 1.
    assert min(min(size) for size in sizes) == 512 and max(max(size) for size in sizes) == 2048
    assert {(width, height) for height, width in sizes} == set(sizes), (
        "portrait and landscape alike"
    )


def test_a_picture_goes_to_the_nearest_ratio():
    sizes = bucket_sizes(1024 * 1024, 64)
    assert nearest((3000, 3000), sizes) == (1024, 1024)
    assert nearest((2160, 3840), sizes) == (768, 1344)  # 16 : 9; 1.75 is nearer than 1.90
    assert nearest((3840, 2160), sizes) == (1344, 768)
    assert nearest((100, 10000), sizes) == (512, 2048)


def test_pixels_below_one_step_are_refused():
    with pytest.raises(ConfigError, match=r"--pixels=4095: must be at least 4096"):
        bucket_sizes(4095, 64)
    assert bucket_sizes(4096, 64) == [(64, 64)]


@pytest.mark.parametrize(
    ("original", "size", "scaled", "corner"),
    [
        ((100, 200), (50, 100), (50, 100), (0, 0)),
        ((100, 200), (50, 50), (50, 100), (0, 25)),
        ((200, 100), (50, 50), (100, 50), (25, 0)),
        ((33, 66), (64, 64), (64, 128), (0, 32)),
        # 3 * 64 / 7 = 27.43, rounded to 27: one short of 28, which must be covered.
        ((3, 7), (28, 64), (28, 65), (0, 0)),
    ],
)
def test_a_picture_covers_its_size_and_is_cut_alike_on_both_sides(original, size, scaled, corner):
    found = place(original, size)
    assert (found.scaled, found.corner, found.size) == (scaled, corner, size)
    assert found.enlarged == (scaled[0] > original[0])


def test_frames_of_two_sizes_are_refused(tmp_path: Path):
    write_image(tmp_path / "a" / "0.png", 0, (16, 16))
    write_image(tmp_path / "a" / "1.png", 0, (16, 8))
    (tmp_path / "a.txt").write_text("x")
    (sample,) = gather(tmp_path).samples
    with pytest.raises(ModelSourceError, match="1.png is of another size than 0.png"):
        measure(sample)


def test_a_folder_with_a_caption_is_a_clip_and_others_hold_samples(tmp_path: Path):
    write_image(tmp_path / "clip" / "0.png", 0)
    (tmp_path / "clip" / "caption.txt").write_text("x")
    write_image(tmp_path / "run" / "0.png", 0)
    (tmp_path / "run.txt").write_text("x")
    write_image(tmp_path / "cats" / "big" / "0.png", 0)
    (tmp_path / "cats" / "big" / "0.txt").write_text("x")
    found = gather(tmp_path)
    assert [one.name for one in found.samples] == ["cats/big/0", "clip", "run"]
    assert found.skipped == []


def test_a_video_file_is_a_clip(tmp_path: Path):
    av = pytest.importorskip("av", reason="videos are read by PyAV, which is optional")
    path = tmp_path / "ramp.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(12))
        stream.width, stream.height, stream.bit_rate = 64, 32, 4_000_000
        for level in range(0, 210, 30):
            image = torch.full((32, 64, 3), level, dtype=torch.uint8).numpy()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    path.with_suffix(".txt").write_text("it grows light")
    (sample,) = gather(tmp_path).samples
    assert (sample.caption, sample.video, sample.frames) == ("it grows light", path, ())
    seen = measure(sample)
    assert (seen.size, seen.frames, seen.fps) == ((32, 64), 7, 12.0)
    clip = load_placed(sample, place(seen.size, (16, 32)), 5)
    assert clip.shape == (3, 5, 16, 32)
    # Levels 0, 30, ... 120 of 255 in [-1, 1], as far as the codec keeps them.
    wanted = torch.arange(0, 150, 30) / 127.5 - 1
    torch.testing.assert_close(clip.mean((0, 2, 3)), wanted, atol=0.03, rtol=0)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ModelSourceError, match="ramp.mp4: not a readable video"):
        measure(sample)


def test_without_a_library_for_videos_the_reason_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("launch.trainer.data.clips.find_spec", lambda _: None)
    write_image(tmp_path / "a.png", 0)
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.mp4").write_bytes(b"")
    (skipped,) = gather(tmp_path).skipped
    assert skipped.path == "b.mp4" and "pip install av" in skipped.why


@pytest.mark.parametrize(("width", "kind"), [(2, torch.int16), (4, torch.int32)])
def test_a_sound_beside_a_clip_is_found_and_read(tmp_path: Path, width: int, kind: torch.dtype):
    write_image(tmp_path / "a" / "0.png", 0)
    (tmp_path / "a" / "caption.txt").write_text("x")
    top = 2 ** (8 * width - 1)
    numbers = torch.tensor([[0, -top], [top // 2, top // 4]], dtype=kind)  # (N, channels)
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(width)
        file.setframerate(16_000)
        file.writeframes(numbers.numpy().tobytes())
    found = gather(tmp_path)
    assert found.samples[0].audio == tmp_path / "a.wav" and found.skipped == []
    sound, rate = load_sound(tmp_path / "a.wav")
    assert rate == 16_000 and torch.equal(sound, torch.tensor([[0.0, 0.5], [-1.0, 0.25]]))
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    with pytest.raises(ModelSourceError, match="a.wav: not a readable WAV file"):
        load_sound(tmp_path / "a.wav")


def test_a_clip_that_holds_fewer_frames_than_it_says_is_refused(tmp_path: Path):
    write_image(tmp_path / "0.png", 0)
    source = Source(name="a", frames=(tmp_path / "0.png",), caption="", source="a")
    with pytest.raises(ModelSourceError, match="1 frames can be read, need 2"):
        load_placed(source, place((16, 16), (16, 16)), 2)
